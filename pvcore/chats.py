"""Chats: conversations, strings and token ids, turned into token ids with verified boundaries."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from pvcore.errors import ChatError, PvcoreError, SpanError
from pvcore.spans import Span, check_span

Message = Mapping[str, object]
Chat = Sequence[Message] | str | Tensor
Chats = Sequence[Chat] | Chat

# Stands in for a reply to find what the template writes around it. No template treats it specially.
SENTINEL = "pvcore-reply-sentinel"


@runtime_checkable
class Tokenizer(Protocol):
    """What is asked of a Hugging Face tokenizer, beside its special tokens."""

    chat_template: Any

    def __call__(self, text: Any, **kwargs: Any) -> Any: ...

    def apply_chat_template(self, conversation: Any, **kwargs: Any) -> Any: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """One chat as token ids.

    `prompt_length` counts the tokens the model is given before it replies: `prompt_length - 1` is
    the last prompt token. `reply` is the token range of the last reply's text, without what the
    template writes around it; empty for an empty reply, None for a chat that is a prompt only.
    """

    ids: tuple[int, ...]
    prompt_length: int
    reply: tuple[int, int] | None
    source: Literal["messages", "text", "ids"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Chats padded to one length. `mask` is true on their own tokens, which begin at `starts`."""

    ids: Int64[Tensor, "batch pos"]
    mask: Bool[Tensor, "batch pos"]
    starts: Int64[Tensor, " batch"]


def as_chats(chats: object) -> list[Chat]:
    """The chats one by one: a single chat becomes a list of one, a 2-D tensor its rows.

    Raises `ChatError` with the index of the first chat that is none.
    """
    if isinstance(chats, Tensor) and chats.ndim == 2:
        chats = list(chats)
    elif isinstance(chats, str | Tensor):
        chats = [chats]
    if not isinstance(chats, Sequence) or isinstance(chats, bytes | bytearray):
        raise ChatError(
            f"got {type(chats).__name__} for chats; wanted a list of chats, each a list of "
            "message dicts, a string or a 1-D tensor of token ids. Wrap a lone message in a list"
        )
    if not chats:
        raise ChatError("got no chats; wanted at least one. Pass a chat or a list of chats")
    checked: list[Chat] = []
    for index, chat in enumerate([chats] if isinstance(chats[0], Mapping) else chats):
        with naming_chat(index):
            checked.append(_checked(chat))
    return checked


def encode_all(
    tokenizer: Tokenizer | None,
    chats: object,
    *,
    max_length: int | None = None,
    for_generation: bool = False,
) -> list[Encoded]:
    """`encode` each of the chats; the text of an error begins with the index of its chat."""
    encoded = []
    for index, chat in enumerate(as_chats(chats)):
        with naming_chat(index):
            encoded.append(
                encode(tokenizer, chat, max_length=max_length, for_generation=for_generation)
            )
    return encoded


def encode(
    tokenizer: Tokenizer | None,
    chat: Chat,
    *,
    max_length: int | None = None,
    for_generation: bool = False,
) -> Encoded:
    """Token ids of one chat, its prompt and its reply located and verified, never truncated.

    Messages are rendered with the tokenizer's chat template; those that end with an assistant turn
    hold a reply. Strings are tokenized as they are, tensors of ids are taken as they are.
    Raises `ChatError` for a chat that cannot be encoded as asked and `SpanError` for one whose
    prompt and reply cannot be told apart in the tokens.
    """
    chat = _checked(chat)
    if isinstance(chat, Tensor):
        ids = tuple(chat.tolist())
        encoded = Encoded(ids=ids, prompt_length=len(ids), reply=None, source="ids")
    elif tokenizer is None:
        raise ChatError(
            "got a chat as text but no tokenizer; wanted one to make token ids. "
            "Give the model its tokenizer, or pass 1-D tensors of token ids"
        )
    elif isinstance(chat, str):
        ids = _tokenize(tokenizer, chat, add_special_tokens=True)
        encoded = Encoded(ids=ids, prompt_length=len(ids), reply=None, source="text")
    else:
        encoded = _encode_messages(tokenizer, chat, for_generation=for_generation)
    _check_ids(encoded, tokenizer, max_length)
    return encoded


def span_range(encoded: Encoded, span: Span) -> tuple[int, int]:
    """The token range that `span` reads; `SpanError` when the chat has no such tokens."""
    check_span(span)
    if span == "all":
        return 0, len(encoded.ids)
    if span == "prompt":
        return 0, encoded.prompt_length
    if span == "last_prompt_token":
        return encoded.prompt_length - 1, encoded.prompt_length
    if encoded.reply is None:
        raise SpanError(
            f"got span 'response' for a chat of {encoded.source} that holds a prompt only; wanted "
            "a reply to read. End the messages with an assistant turn, or read span 'prompt'"
        )
    start, end = encoded.reply
    if start == end:
        raise SpanError(
            "got span 'response' for a chat whose reply is empty; wanted at least one token of "
            "reply. Drop the chat, or read span 'prompt'"
        )
    return start, end


def require_span(encoded: Encoded, span: Span) -> None:
    """Refuse, with a `SpanError`, a chat that has no token of `span`."""
    span_range(encoded, span)


def pad(encoded: Sequence[Encoded], *, side: Literal["left", "right"], pad_id: int) -> Batch:
    """The chats as one batch, as long as its longest; padding is masked out."""
    if not encoded:
        raise ChatError("got no chats to pad; wanted at least one")
    lengths = torch.tensor([len(chat.ids) for chat in encoded])
    longest = int(lengths.max())
    starts = longest - lengths if side == "left" else torch.zeros_like(lengths)
    ids = torch.full((len(encoded), longest), pad_id)
    for row, start, chat in zip(ids, starts.tolist(), encoded, strict=True):
        row[start : start + len(chat.ids)] = torch.tensor(chat.ids)
    positions = torch.arange(longest)
    mask = (positions >= starts[:, None]) & (positions < (starts + lengths)[:, None])
    return Batch(ids=ids, mask=mask, starts=starts)


def pad_id(tokenizer: Tokenizer | None) -> int:
    """The id to pad with: the tokenizer's own, else its end token, else 0; it is always masked."""
    tokens = (getattr(tokenizer, f"{name}_token_id", None) for name in ("pad", "eos"))
    return next((token for token in tokens if token is not None), 0)


def length_buckets(encoded: Sequence[Encoded], batch_size: int) -> list[list[int]]:
    """Indices of the chats in batches of similar length, shortest first; each index once."""
    if batch_size < 1:
        raise ChatError(f"got batch_size {batch_size}; wanted at least 1")
    order = sorted(range(len(encoded)), key=lambda index: len(encoded[index].ids))
    return [order[first : first + batch_size] for first in range(0, len(order), batch_size)]


def _encode_messages(
    tokenizer: Tokenizer, messages: Sequence[Message], *, for_generation: bool
) -> Encoded:
    if tokenizer.chat_template is None:
        raise ChatError(
            "got a chat without a template: these are messages and the tokenizer has no "
            "chat_template. Pass plain strings, or set tokenizer.chat_template"
        )
    if messages[-1]["role"] != "assistant":
        _, ids = render(tokenizer, messages, for_reply=True)
        return Encoded(ids=ids, prompt_length=len(ids), reply=None, source="messages")
    if for_generation:
        raise ChatError(
            "got a chat that ends with an assistant turn: there is nothing to generate. "
            "Drop the last turn to have it answered anew"
        )
    if len(messages) == 1:
        raise ChatError("got a reply with an empty prompt; put the user's message before it")
    return _encode_conversation(tokenizer, messages)


def _encode_conversation(tokenizer: Tokenizer, messages: Sequence[Message]) -> Encoded:
    prompt, prompt_ids = render(tokenizer, messages[:-1], for_reply=True)
    text, ids = render(tokenizer, messages, for_reply=False)
    if not text.startswith(prompt):
        kept = _shared_length(prompt, text)
        if prompt.rfind("<", 0, kept) > prompt.rfind(">", 0, kept):
            kept = prompt.rfind("<", 0, kept)  # quote a tag as a whole
        raise SpanError(_rewritten("prompt", prompt[kept:], text[kept:]))
    if ids[: len(prompt_ids)] != prompt_ids:
        raise SpanError(_shared_token("prompt", prompt, text[len(prompt) :]))
    first, last = _reply_characters(tokenizer, messages, prompt, text)
    start = len(prompt_ids)
    if first > len(prompt):
        start = max(start, reply_start(tokenizer, text, ids, first))
    end = reply_end(tokenizer, text, ids, last)
    return Encoded(ids=ids, prompt_length=len(prompt_ids), reply=(start, end), source="messages")


def _reply_characters(
    tokenizer: Tokenizer, messages: Sequence[Message], prompt: str, text: str
) -> tuple[int, int]:
    """Where the reply stands in the rendered text, found by rendering another in its place."""
    reply = str(messages[-1]["content"])
    twin = [*messages[:-1], {**messages[-1], "content": SENTINEL}]
    around = str(_apply_template(tokenizer, twin, tokenize=False, for_reply=False))
    head, _, closer = around.removeprefix(prompt).partition(SENTINEL)
    # A reply may bring the head itself: a reasoning template leaves a written thought alone.
    for opening in (prompt + head, prompt):
        first, last = len(opening), len(text) - len(closer)
        framed = first <= last and text.startswith(opening) and text.endswith(closer)
        if framed and text[first:last].strip() == reply.strip():
            return first, last
    raise SpanError(_rewritten("reply", reply, text[len(prompt) :]))


def reply_start(tokenizer: Tokenizer, text: str, ids: tuple[int, ...], first: int) -> int:
    """The first token of a reply that begins after a head, such as an empty thought."""
    # A space before the reply may be part of its first token, as in "[/INST] yes".
    for opening in (text[:first], text[:first].rstrip()):
        alone = _tokenize(tokenizer, opening, add_special_tokens=False)
        if ids[: len(alone)] == alone:
            return len(alone)
    raise SpanError(_shared_token("text the template puts before it", text[:first], text[first:]))


def reply_end(tokenizer: Tokenizer, text: str, ids: tuple[int, ...], last: int) -> int:
    """One past the last token of a reply that ends at a character of the text."""
    alone = _tokenize(tokenizer, text[:last], add_special_tokens=False)
    if ids[: len(alone)] != alone:
        raise SpanError(_shared_token("text the template puts after it", text[:last], text[last:]))
    return len(alone)


def _shared_length(left: str, right: str) -> int:
    pairs = zip(left, right, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _shared_token(with_what: str, before: str, after: str) -> str:
    return (
        f"the reply shares a token with the {with_what}: no token ends between "
        f"{before[-20:]!r} and {after[:20]!r}; wanted a token boundary there. "
        "Separate the two in tokenizer.chat_template, or drop the chat"
    )


def _rewritten(what: str, wanted: str, got: str) -> str:
    thoughts = any(tag in wanted + got[:60] for tag in ("<think>", "</think>"))
    cause = " (a reasoning template that drops or inserts <think> blocks)" if thoughts else ""
    return (
        f"the chat template rewrote the {what}: wanted {wanted[:60]!r}, got {got[:60]!r}{cause}. "
        "Write the chat as the template would, or set tokenizer.chat_template to one that keeps "
        "every turn as it was"
    )


def render(
    tokenizer: Tokenizer, messages: Sequence[Message], *, for_reply: bool
) -> tuple[str, tuple[int, ...]]:
    """The messages as the template writes them, and as its token ids."""
    text = _apply_template(tokenizer, messages, tokenize=False, for_reply=for_reply)
    ids = _apply_template(tokenizer, messages, tokenize=True, for_reply=for_reply)
    return str(text), tuple(ids)


def _apply_template(
    tokenizer: Tokenizer, messages: Sequence[Message], *, tokenize: bool, for_reply: bool
) -> Any:
    from jinja2 import TemplateError  # here, so that importing this module stays cheap

    try:
        return tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            tokenize=tokenize,
            add_generation_prompt=for_reply,
            return_dict=False,
        )
    except (TemplateError, TypeError, ValueError) as error:
        roles = ", ".join(str(message["role"]) for message in messages)
        raise ChatError(
            f"the tokenizer's chat template refused the chat: {error}; got messages of roles "
            f"{roles}. Bring them into the order and the roles the template knows"
        ) from error


def _tokenize(tokenizer: Tokenizer, text: str, *, add_special_tokens: bool) -> tuple[int, ...]:
    return tuple(tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"])


def _check_ids(encoded: Encoded, tokenizer: Tokenizer | None, max_length: int | None) -> None:
    ids = encoded.ids
    if not ids or encoded.prompt_length == 0:
        raise ChatError("got an empty prompt: no tokens; wanted at least one. Drop the chat")
    bos = getattr(tokenizer, "bos_token_id", None)
    if bos is not None and ids[:2] == (bos, bos):
        raise ChatError(
            f"got a doubled BOS: the chat of {encoded.source} begins with token {bos} twice; "
            "wanted it once. Remove the one you wrote: the template or tokenizer adds its own"
        )
    if max_length is not None and len(ids) > max_length:
        raise ChatError(
            f"got a chat longer than the model allows: {len(ids)} tokens; wanted at most "
            f"{max_length}. Shorten or drop it: chats are never truncated"
        )


def _checked(chat: object) -> Chat:
    if isinstance(chat, Tensor):
        return _checked_tensor(chat)
    if isinstance(chat, str):
        _check_unicode(chat, "string")
        return chat
    if not isinstance(chat, Sequence) or isinstance(chat, bytes | bytearray):
        raise ChatError(
            f"got {type(chat).__name__} for a chat; wanted a list of message dicts, a string or "
            "a 1-D tensor of token ids"
        )
    if not chat:
        raise ChatError("got a chat without messages; wanted at least one. Drop it")
    return [_checked_message(index, message) for index, message in enumerate(chat)]


def _checked_tensor(ids: Tensor) -> Tensor:
    integer = not (ids.is_floating_point() or ids.is_complex() or ids.dtype is torch.bool)
    if ids.ndim != 1 or not integer:
        raise ChatError(
            f"got a tensor of shape {tuple(ids.shape)} and {ids.dtype} for a chat; wanted token "
            "ids: one axis of integers"
        )
    if ids.numel() == 0:
        raise ChatError("got an empty prompt: a tensor without token ids. Drop the chat")
    if int(ids.min()) < 0:
        raise ChatError(f"got token id {int(ids.min())}; wanted ids from 0, not masked labels")
    return ids


def _checked_message(index: int, message: object) -> Message:
    if not isinstance(message, Mapping):
        raise ChatError(
            f"got {type(message).__name__} as message {index}; wanted a dict such as "
            '{"role": "user", "content": "..."}'
        )
    for key in ("role", "content"):
        if not isinstance(message.get(key), str):
            got = type(message[key]).__name__ if key in message else "nothing"
            raise ChatError(
                f"got {got} for {key!r} of message {index}; wanted a string. "
                "Give each message a role and its text"
            )
        _check_unicode(message[key], f"{key!r} of message {index}")
    return message


def _check_unicode(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ChatError(
            f"got a lone surrogate at character {error.start} of the {where}; wanted Unicode "
            "text. Clean or drop the chat"
        ) from error


@contextmanager
def naming_chat(index: int) -> Iterator[None]:
    """Put the index of a chat before the text of its errors."""
    try:
        yield
    except PvcoreError as error:
        raise type(error)(f"chat {index}: {error}") from error
