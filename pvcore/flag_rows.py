"""Rows of training data: which of the field's forms a row has, and the conversation it holds."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from numbers import Integral
from typing import Literal

from pvcore.errors import FlagError
from pvcore.flag_blanks import is_filled, is_given, is_told

Message = dict[str, str]
Turn = Literal["last", "first"]

LISTS = ("messages", "conversations", "conversation", "dialogue")
# Alpaca's first: its `input` is context for the instruction, not a prompt of its own.
PAIRS = (
    ("instruction", "output"),
    ("instruction", "response"),
    ("prompt", "response"),
    ("prompt", "completion"),
    ("prompt", "answer"),
    ("question", "answer"),
    ("question", "response"),
    ("query", "response"),
    ("query", "answer"),
    ("problem", "solution"),
    ("input", "output"),
    ("user", "assistant"),
)
SYSTEMS = ("system", "system_prompt")
CONTEXTS = frozenset(("input", "context"))
IDS = ("id", "conversation_id", "conversation_hash", "prompt_id", "uuid")
ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
}
KEYS = (("role", "content"), ("from", "value"))
# What a message, or a row, may hold beside its text; the chat without it would be another.
MEDIA = ("image", "images", "audio", "audios", "video", "videos")
UNREAD = frozenset(
    ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking", *MEDIA)
)
BESIDE = frozenset(("tools", "functions", "documents", "history", *MEDIA))
# What a reader of columns needs to load: nothing else of a row is ever looked at.
PAIRED = frozenset(name for pair in PAIRS for name in pair)
KNOWN = PAIRED | {*LISTS, *SYSTEMS, *CONTEXTS, *IDS, *BESIDE}
# Columns that no conversation can be made of.
ASIDE = frozenset((*SYSTEMS, *IDS, *BESIDE, "context"))
# About a million tokens.
LONGEST_TEXT, LONGEST_ID = 1 << 22, 1000
LONGEST_SHOWN = 60


class RowDefect(Exception):
    """Why one row cannot be scored: the field at fault, what came and what was wanted."""

    def __init__(self, where: str, reason: str) -> None:
        super().__init__(f"{where}: {reason}" if where else reason)
        self.field, self.reason = where, reason


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """How rows are read. `prompt` and `answer` name columns of one's own; "" looks for known ones.

    `turn`: which reply is scored, the last one or, as in the paper's runs on chat logs, the first
    to a user's turn (what follows it is left away; a greeting before the user's turn is no reply).
    """

    prompt: str = ""
    answer: str = ""
    turn: Turn | str = "last"
    known: frozenset[str] = field(init=False, default=KNOWN, repr=False, compare=False)
    beside: frozenset[str] = field(init=False, default=BESIDE, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name, column in (("prompt", self.prompt), ("answer", self.answer)):
            if not isinstance(column, str):
                raise FlagError(f"got {name} {column!r}; wanted the name of a column, as text")
        if bool(self.prompt) != bool(self.answer):
            raise FlagError(
                f"got prompt column {self.prompt!r} and answer column {self.answer!r}; wanted both "
                "or neither"
            )
        if self.turn not in ("last", "first"):
            raise FlagError(f"got turn {self.turn!r}; wanted 'last' or 'first'")
        own = {self.prompt, self.answer} - {""}
        object.__setattr__(self, "known", KNOWN | own)
        object.__setattr__(self, "beside", BESIDE - own)


def conversation(record: object, form: Form) -> list[Message]:
    """The messages of a row, its last one the assistant's. Raises `RowDefect`."""
    if not isinstance(record, dict | Mapping):
        raise RowDefect("", f"got {_shown(record)}; wanted an object with named fields")
    if beside := _beside(record, form.beside):
        raise RowDefect(
            beside, "got more than text; wanted a conversation of text alone, without this field"
        )
    messages = _messages(record, form)
    if form.turn == "first":
        messages = _to_first_reply(messages)
    where = field_of(record, form)
    if messages[-1]["role"] != "assistant":
        raise RowDefect(
            where, f"got a last turn of role {messages[-1]['role']!r}; wanted the assistant's reply"
        )
    if not any(one["role"] == "user" for one in messages):
        raise RowDefect(where, "got no user's turn; wanted one before the reply")
    if not messages[-1]["content"].strip():
        raise RowDefect(where, "got an empty reply; wanted text to score")
    length = sum(len(one["content"]) for one in messages)
    if length > LONGEST_TEXT:
        raise RowDefect(where, f"got {length} characters; wanted at most {LONGEST_TEXT}")
    return messages


def _beside(held: Mapping[object, object], names: frozenset[str]) -> str | None:
    """The first field of some that says anything; most rows have none of them."""
    if names.isdisjoint(held):
        return None
    return next((name for name in sorted(names) if is_filled(held.get(name))), None)


def _to_first_reply(messages: list[Message]) -> list[Message]:
    asked = False
    for at, one in enumerate(messages):
        if asked and one["role"] == "assistant":
            return messages[: at + 1]
        asked = asked or one["role"] == "user"
    return messages


def row_id(record: object) -> str | None:
    """The row's own id, if it brings one. Raises `RowDefect` for one that is no name any more."""
    if isinstance(record, dict | Mapping):
        for name in IDS:
            value = record.get(name)
            if isinstance(value, Integral) and not isinstance(value, bool):
                try:
                    value = str(value)  # as NumPy's
                except ValueError:  # Python writes no more than some thousand digits
                    raise RowDefect(
                        name, f"got {_shown(value)}; wanted at most {LONGEST_ID} characters"
                    ) from None
            if isinstance(value, str) and value and is_unicode(value):
                if len(value) > LONGEST_ID:
                    raise RowDefect(
                        name, f"got {len(value)} characters; wanted at most {LONGEST_ID}"
                    )
                return value
    return None


def each_once(pairs: Sequence[tuple[str, object]]) -> dict[str, object]:
    """An object out of JSON. Raises `RowDefect` for a name that comes twice: readers differ."""
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise RowDefect(twice[:LONGEST_SHOWN], "got this name twice in one object; wanted it once")
    return made


def field_of(record: Mapping[object, object], form: Form) -> str:
    """The field of a sound row that holds the reply."""
    return _form_of(record, form)[1]


def _form_of(record: Mapping[object, object], form: Form) -> tuple[str, str]:
    """The columns of prompt and answer, or "" and that of messages; twice "" where there are none.

    Tables give all columns to all rows: one that is filled goes before one that is only there.
    """
    if form.prompt:
        return form.prompt, form.answer
    lists = [name for name in LISTS if record.get(name) is not None]
    for name in lists:
        if is_filled(record[name]):
            return "", name
    pairs = [(a, b) for a, b in PAIRS if a in record and b in record]
    filled = [(a, b) for a, b in pairs if is_told(record[a]) and is_told(record[b])]
    return next(iter([*filled, *(("", name) for name in lists), *pairs]), ("", ""))


def _messages(record: Mapping[object, object], form: Form) -> list[Message]:
    prompt, answer = _form_of(record, form)
    if prompt:
        if not form.prompt:
            _refuse_context(record, prompt, answer)
        return _from_pair(record, prompt, answer)
    if answer:
        listed = _from_list(record[answer], answer, first=form.turn == "first")
        return _with_system(record, listed)
    names = ", ".join(sorted(map(str, record)))[:200] or "none"
    raise RowDefect(
        "",
        f"got fields {names}; wanted `messages`, `conversations`, or a pair such as `prompt` and "
        "`response`",
    )


def _refuse_context(record: Mapping[object, object], prompt: str, answer: str) -> None:
    """Raises `RowDefect` for what a prompt is about where the pair has no place for it.

    Who names the columns has chosen, and Alpaca's instructions have one.
    """
    beside = _beside(record, CONTEXTS - {prompt, answer})
    if beside and prompt != "instruction":
        raise RowDefect(
            beside,
            f"got text beside `{prompt}` and `{answer}`; wanted it in `{prompt}`, or the columns "
            "named (prompt=, answer=) where it is no part of the chat",
        )


def _from_list(value: object, name: str, *, first: bool = False) -> list[Message]:
    """The messages of a list; what stands behind the `first` reply is not looked at."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        # A table's cell can hold a list only as text.
        try:
            value = json.loads(value, object_pairs_hook=each_once)
        except (ValueError, RecursionError):
            raise RowDefect(
                name, f"got {_shown(value)}, which is no JSON; wanted a list of messages"
            ) from None
    if not isinstance(value, list) and isinstance(value, Mapping):
        value = _turned(value)
    if not isinstance(value, list | Sequence) or isinstance(value, str | bytes):
        raise RowDefect(name, f"got {_shown(value)}; wanted a list of messages")
    if not value:
        raise RowDefect(name, "got no messages; wanted at least two")
    messages, asked = list[Message](), False
    for at, entry in enumerate(value):
        messages.append(_message(entry, f"{name}[{at}]"))
        if first and asked and messages[-1]["role"] == "assistant":
            break
        asked = asked or messages[-1]["role"] == "user"
    return messages


def _turned(value: Mapping[object, object]) -> object:
    """A list of messages out of one message of lists, as `datasets` keeps sequences of objects."""
    for keys in KEYS:
        roles, texts = (value.get(key) for key in keys)
        if isinstance(roles, list) and isinstance(texts, list):
            return [dict(zip(keys, pair, strict=True)) for pair in zip_longest(roles, texts)]
    return value


def _message(entry: object, where: str) -> Message:
    if not isinstance(entry, dict | Mapping):  # a dict is known at once, other mappings are not
        raise RowDefect(where, f"got {_shown(entry)}; wanted an object with role and content")
    there = [keys for keys in KEYS if keys[0] in entry]
    # Tables give every message the fields of all.
    keys = next((keys for keys in there if is_given(entry[keys[0]])), next(iter(there), None))
    if keys is None:
        raise RowDefect(where, "got neither `role` nor `from`; wanted one of them")
    role = entry[keys[0]]
    if not isinstance(role, str) or role.strip().casefold() not in ROLES:
        raise RowDefect(
            f"{where}.{keys[0]}", f"got {_shown(role)}; wanted system, user or assistant"
        )
    if beside := _beside(entry, UNREAD):
        raise RowDefect(f"{where}.{beside}", "got more than text; wanted messages of text alone")
    content = _text(entry.get(keys[1]), f"{where}.{keys[1]}")
    return {"role": ROLES[role.strip().casefold()], "content": content}


def _from_pair(record: Mapping[object, object], prompt: str, answer: str) -> list[Message]:
    asked, told = record.get(prompt), record.get(answer)
    if isinstance(asked, Sequence) and not isinstance(asked, str | bytes):
        messages = _with_system(record, _from_list(asked, prompt))
    else:
        question = _text(asked, prompt)
        if not question.strip():
            raise RowDefect(prompt, "got an empty prompt; wanted text")
        if prompt == "instruction":
            question = "\n\n".join([question, *_context(record)])
        messages = [*_system(record), {"role": "user", "content": question}]
    if isinstance(told, Sequence) and not isinstance(told, str | bytes):
        return _answered(messages, _from_list(told, answer), answer)
    return [*messages, {"role": "assistant", "content": _text(told, answer)}]


def _answered(messages: list[Message], told: list[Message], answer: str) -> list[Message]:
    """A prompt and the messages that answer it, which may repeat it, as in preference data."""
    asked = [one for one in messages if one["role"] != "system"]
    for beginning in (messages, asked):
        if told[: len(beginning)] == beginning and len(told) > len(beginning):
            told = told[len(beginning) :]
            break
    if told[0]["role"] != "assistant":
        raise RowDefect(
            f"{answer}[0]", f"got a turn of role {told[0]['role']!r}; wanted the assistant's reply"
        )
    return [*messages, *told]


def _with_system(record: Mapping[object, object], listed: list[Message]) -> list[Message]:
    beside = _system(record)
    if listed[0]["role"] != "system":
        return [*beside, *listed]
    if beside and beside[0]["content"].strip() != listed[0]["content"].strip():
        raise RowDefect(
            next(name for name in SYSTEMS if is_given(record.get(name))),
            "got another text than the system message has; wanted one of them",
        )
    return listed


def _system(record: Mapping[object, object]) -> list[Message]:
    told = {name: _text(record[name], name) for name in SYSTEMS if is_given(record.get(name))}
    if len({text.strip() for text in told.values()}) > 1:
        raise RowDefect(SYSTEMS[0], f"got another text than `{SYSTEMS[1]}` has; wanted one of them")
    return [{"role": "system", "content": text} for text in told.values()][:1]


def _context(record: Mapping[object, object]) -> list[str]:
    """What an instruction is about, where the row says so."""
    return [
        _text(record[name], name) for name in ("input", "context") if is_given(record.get(name))
    ]


def _text(value: object, where: str) -> str:
    if not isinstance(value, str) and isinstance(value, Sequence) and not isinstance(value, bytes):
        # The parts of multimodal messages; only text can be scored.
        return "".join(_part(part, f"{where}[{at}]") for at, part in enumerate(value))
    return _plain(value, where)


def _part(part: object, where: str) -> str:
    if not isinstance(part, Mapping) or part.get("type") != "text":
        kind = part.get("type") if isinstance(part, Mapping) else part
        raise RowDefect(where, f"got a part of type {_shown(kind)}; wanted text")
    return _plain(part.get("text"), f"{where}.text")  # no parts in parts


def _plain(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise RowDefect(where, f"got {_shown(value)}; wanted text")
    if not is_unicode(value):
        raise RowDefect(where, "got a lone surrogate; wanted Unicode text")
    return value


def is_unicode(text: str) -> bool:
    """Whether a text can be written: lone surrogates cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _shown(value: object) -> str:
    """A value as a reason may quote it: short, and of characters every file can hold."""
    if value is None:
        return "nothing"
    try:
        text = ascii(value)
    except ValueError:  # Python writes no more than some thousand digits
        return "an integer too long to be written"
    except RecursionError:
        return f"a {type(value).__name__} nested too deep to be written"
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}..."
