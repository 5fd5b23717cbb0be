"""Rows to token ids: many conversations at once, each with the ids `chats.encode` would give it.

Rendering and tokenising one by one costs more than a small model's forward. The plain case, a
template that writes the reply as it is right after the prompt, is done in batches here; every
other conversation goes through `chats.encode`, which also words the errors.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pvcore import chats
from pvcore.chats import SENTINEL, Encoded
from pvcore.errors import PvcoreError
from pvcore.flag_rows import Form, Message, RowDefect, conversation, field_of, row_id
from pvcore.flag_sources import RawRow, Source, decode

# A template that refuses one conversation refuses the batch it is in. A tokenizer takes a hundred
# bytes and more for each token while it works.
TOGETHER, CHARACTERS_TOGETHER = 32, 1 << 19
LONGEST_REASON = 500
MOST_CLOSERS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """What is kept of a conversation once it is scored.

    `prompt_length` counts the tokens before the reply; `reply` is the range of the reply's text.
    """

    id: str
    source: str
    row: int
    prompt_length: int
    reply: tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample(Scored):
    """One conversation ready to be scored: its token ids, and its text for an own reply."""

    ids: NDArray[np.int32]
    messages: list[Message]

    @property
    def scored(self) -> Scored:
        """The same without ids and text."""
        return Scored(
            id=self.id,
            source=self.source,
            row=self.row,
            prompt_length=self.prompt_length,
            reply=self.reply,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejected:
    """One row that cannot be scored, and why."""

    id: str
    source: str
    row: int
    field: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """What one row says: its name, and its messages or why it has none."""

    name: dict[str, Any]
    messages: list[Message] | None
    field: str
    defect: RowDefect | None

    @property
    def mark(self) -> bytes:
        """Bytes that are another row's when what is scored of it is another."""
        said = self.messages if self.defect is None else str(self.defect)
        return repr((*self.name.values(), said)).encode()


def said_by(source: str, raw: RawRow, form: Form) -> Said:
    """What a row of a source says, without a tokenizer."""
    name: dict[str, Any] = {"source": source, "row": raw.row, "id": f"{source}:{raw.row}"}
    try:
        record = decode(raw.content)
        name["id"] = row_id(record) or name["id"]
        messages = conversation(record, form)
    except RowDefect as defect:
        return Said(name=name, messages=None, field=defect.field, defect=defect)
    return Said(name=name, messages=messages, field=field_of(record, form), defect=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """How rows become samples: the form, the tokenizer and the model's limits."""

    form: Form
    tokenizer: Any
    max_length: int | None
    vocabulary: int

    def samples(
        self, raws: Sequence[tuple[Source, RawRow]], digest: Any = None
    ) -> tuple[list[Sample | Rejected], str]:
        """Every row in order as what it became, and a digest of what the rows said.

        A `digest` of earlier rows is gone on with.
        """
        digest = sha256() if digest is None else digest
        found: list[Sample | Rejected | None] = []
        places: list[int] = []
        texts: list[list[Message]] = []
        fields: list[str] = []
        named: list[dict[str, Any]] = []
        for source, raw in raws:
            said = said_by(source.name, raw, self.form)
            named.append(said.name)
            digest.update(said.mark)
            if said.messages is None:
                reason = said.defect.reason if said.defect is not None else ""
                found.append(Rejected(**said.name, field=said.field, reason=reason))
                continue
            places.append(len(found))
            texts.append(said.messages)
            fields.append(said.field)
            found.append(None)
        encoded = encode_many(self.tokenizer, texts, self.max_length)
        for place, messages, field, one in zip(places, texts, fields, encoded, strict=True):
            found[place] = self._made(named[place], messages, field, one)
        return [one for one in found if one is not None], digest.hexdigest()

    def _made(
        self, name: dict[str, Any], messages: list[Message], field: str, one: Encoded | PvcoreError
    ) -> Sample | Rejected:
        if isinstance(one, PvcoreError):
            return Rejected(**name, field=field, reason=_shortened(str(one)))
        if one.reply is None or one.reply[0] == one.reply[1]:
            return Rejected(**name, field=field, reason="got an empty reply; wanted tokens to read")
        ids = np.asarray(one.ids, dtype=np.int32)
        if int(ids.max()) >= self.vocabulary:
            reason = (
                f"got token id {int(ids.max())}; this model embeds {self.vocabulary} tokens: use "
                "the tokenizer that belongs to it"
            )
            return Rejected(**name, field=field, reason=reason)
        return Sample(
            **name, ids=ids, prompt_length=one.prompt_length, reply=one.reply, messages=messages
        )


def encode_many(
    tokenizer: Any, conversations: Sequence[list[Message]], max_length: int | None
) -> list[Encoded | PvcoreError]:
    """Each conversation's `chats.encode`, or the error it raises."""
    found: list[Encoded | PvcoreError] = []
    known: list[str] = []
    for some in _groups(conversations):
        together = _together(tokenizer, some, max_length, known)
        for messages, quick in zip(some, together, strict=True):
            found.append(quick or _alone(tokenizer, messages, max_length))
    return found


def _groups(conversations: Sequence[list[Message]]) -> Iterator[list[list[Message]]]:
    group: list[list[Message]] = []
    held = 0
    for messages in conversations:
        length = sum(len(one["content"]) for one in messages)
        if len(group) == TOGETHER or (group and held + length > CHARACTERS_TOGETHER):
            yield group
            group, held = [], 0
        group.append(messages)
        held += length
    if group:
        yield group


def _shortened(reason: str) -> str:
    """A template may quote the whole chat in its error."""
    half = LONGEST_REASON // 2
    return reason if len(reason) <= LONGEST_REASON else f"{reason[:half]} ... {reason[-half:]}"


def _alone(
    tokenizer: Any, messages: list[Message], max_length: int | None
) -> Encoded | PvcoreError:
    try:
        return chats.encode(tokenizer, messages, max_length=max_length)
    except PvcoreError as error:
        # Where it was raised holds the token ids of a row that may be very long.
        error.__cause__ = error.__context__ = None
        return error.with_traceback(None)


def _together(
    tokenizer: Any, some: Sequence[list[Message]], max_length: int | None, known: list[str]
) -> list[Encoded | None]:
    """The conversations that are plain cases; None for all others."""
    found: list[Encoded | None] = [None] * len(some)
    texts = _rendered(tokenizer, some)
    if texts is None:
        return found
    places, prompts, wholes, closers = [], [], [], []
    for place, (messages, prompt, whole) in enumerate(zip(some, *texts, strict=True)):
        closer = _closer_of(tokenizer, messages, prompt, whole, known)
        if closer is not None:
            places.append(place)
            prompts.append(prompt)
            wholes.append(whole)
            closers.append(closer)
    if not places:
        return found
    ends = list(dict.fromkeys(closers))
    rows = _ids(tokenizer, [*prompts, *wholes, *ends])
    closing = dict(zip(ends, rows[2 * len(places) :], strict=True))
    bos = getattr(tokenizer, "bos_token_id", None)
    for at, (place, closer) in enumerate(zip(places, closers, strict=True)):
        asked, ids, after = rows[at], rows[len(places) + at], closing[closer]
        end = len(ids) - len(after)
        apart = asked and ids[: len(asked)] == asked and len(asked) <= end
        doubled = bos is not None and ids[:2] == [bos, bos]
        fits = max_length is None or len(ids) <= max_length
        if apart and ids[end:] == after and fits and not doubled:
            found[place] = Encoded(
                ids=tuple(ids),
                prompt_length=len(asked),
                reply=(len(asked), end),
                source="messages",
            )
    return found


def _ids(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Token ids alone: masks would take as long again."""
    rows: list[list[int]] = tokenizer(
        texts, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False
    )["input_ids"]
    return rows


def _rendered(tokenizer: Any, some: Sequence[list[Message]]) -> tuple[list[str], list[str]] | None:
    """Prompts and whole texts; None if any is refused."""
    if tokenizer.chat_template is None or any(len(messages) < 2 for messages in some):
        return None
    prompts = [messages[:-1] for messages in some]
    try:
        return (
            tokenizer.apply_chat_template(prompts, tokenize=False, add_generation_prompt=True),
            tokenizer.apply_chat_template(list(some), tokenize=False),
        )
    except Exception:
        return None  # said again, in words, for the conversation that is at fault


def _closer_of(
    tokenizer: Any, messages: list[Message], prompt: str, whole: str, known: list[str]
) -> str | None:
    """What the template writes after a reply that stands as it is right after the prompt.

    `known` are those found so far: a text that is prompt, reply and one of them is no riddle. For
    any other, another reply is written in the place of this one.
    """
    reply = messages[-1]["content"]
    if reply == reply.strip():
        for closer in known:
            if len(whole) == len(prompt) + len(reply) + len(closer) and (
                whole.startswith(prompt)
                and whole.endswith(closer)
                and whole.startswith(reply, len(prompt))
            ):
                return closer
    twin = [*messages[:-1], {**messages[-1], "content": SENTINEL}]
    try:
        around = tokenizer.apply_chat_template(twin, tokenize=False)
    except Exception:
        return None
    found = _closer(reply, prompt, whole, around)
    if found is None or not _begins_apart(tokenizer, found):
        return None
    if found not in known and len(known) < MOST_CLOSERS:
        known.append(found)
    return found


def _begins_apart(tokenizer: Any, closer: str) -> bool:
    """Whether what follows a reply is tokenised apart from it: it begins with a mark.

    Tokenizers cut a text at such marks before anything else, so that no token spans the border.
    """
    marks = getattr(tokenizer, "added_tokens_decoder", {}).values()
    return any(
        closer.startswith(mark.content) and not (mark.lstrip or mark.normalized or mark.single_word)
        for mark in marks
    )


def _closer(reply: str, prompt: str, whole: str, twin: str) -> str | None:
    """What the template writes after the reply, if it writes the reply right after the prompt."""
    if not (whole.startswith(prompt) and twin.startswith(prompt + SENTINEL)):
        return None
    closer = twin[len(prompt) + len(SENTINEL) :]
    end = len(whole) - len(closer)
    framed = end >= len(prompt) and whole.endswith(closer)
    same = framed and whole[len(prompt) : end].strip() == reply.strip()
    return closer if same else None
