"""Conversations: every assistant turn of a chat located in the tokens of one forward."""

from collections.abc import Sequence
from dataclasses import dataclass

from pvcore.chats import (
    SENTINEL,
    Chat,
    Encoded,
    Message,
    Tokenizer,
    as_chats,
    encode,
    render,
    reply_end,
    reply_start,
)
from pvcore.errors import ChatError, SpanError


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One assistant turn: the message it is, and the token range of its text.

    `prompt_length - 1` is the last token the model was given before it.
    """

    message: int
    prompt_length: int
    start: int
    end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """A chat of messages as token ids, with its assistant turns that have text."""

    messages: tuple[Message, ...]
    ids: tuple[int, ...]
    turns: tuple[Turn, ...]


def located(
    tokenizer: Tokenizer | None, chat: Chat, *, max_length: int | None, for_generation: bool = False
) -> Conversation:
    """A chat and where its assistant turns lie, each verified against the token ids.

    Raises `ChatError` for a chat that is no list of messages, and `SpanError` where a template
    leaves out some of an earlier turn once others follow, as those that drop thoughts do.
    """
    (checked,) = as_chats([chat])
    if isinstance(checked, str):
        whole = encode(tokenizer, checked, max_length=max_length)
        return Conversation(
            messages=({"role": "user", "content": checked},), ids=whole.ids, turns=()
        )
    if not isinstance(checked, list):
        raise ChatError(
            f"got a chat as {type(checked).__name__}; wanted messages or a string, whose text can "
            "be shown: use model.monitor(...) for token ids"
        )
    messages = tuple(checked)
    whole = encode(tokenizer, list(messages), max_length=max_length, for_generation=for_generation)
    turns = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant" or index == 0:
            continue
        part = whole
        if index + 1 < len(messages):
            part = encode(tokenizer, list(messages[: index + 1]), max_length=max_length)
        turns += _turn(index, _located_in(tokenizer, messages, index, part, whole))
    return Conversation(messages=messages, ids=whole.ids, turns=tuple(turns))


def _located_in(
    tokenizer: Tokenizer | None,
    messages: Sequence[Message],
    index: int,
    part: Encoded,
    whole: Encoded,
) -> tuple[int, int, int]:
    """Where a prompt ends and its reply lies in the whole, given the chat up to that reply."""
    assert part.reply is not None
    start, end = part.reply
    if whole.ids[:end] == part.ids[:end]:
        return part.prompt_length, start, end
    assert tokenizer is not None
    return _written_anew(tokenizer, messages, index)


def _written_anew(
    tokenizer: Tokenizer, messages: Sequence[Message], index: int
) -> tuple[int, int, int]:
    """The same for a turn around which less is written once others follow, as no empty thought.

    Another text in its place shows what stands around it.
    """
    prompts = messages[-1]["role"] != "assistant"
    text, ids = render(tokenizer, messages, for_reply=prompts)
    twin = [*messages[:index], {**messages[index], "content": SENTINEL}, *messages[index + 1 :]]
    around, _ = render(tokenizer, twin, for_reply=prompts)
    head, found, closer = around.partition(SENTINEL)
    first, last = len(head), len(text) - len(closer)
    framed = found and first <= last and text.startswith(head) and text.endswith(closer)
    if not framed or text[first:last].strip() != str(messages[index]["content"]).strip():
        raise SpanError(
            f"the chat template writes message {index} differently once others follow it, so its "
            "tokens in this chat cannot be told; write the chat as the template would, or read the "
            "turns one by one"
        )
    start = reply_start(tokenizer, text, ids, first)
    return start, start, reply_end(tokenizer, text, ids, last)


def _turn(index: int, at: tuple[int, int, int]) -> list[Turn]:
    prompt_length, start, end = at
    if start == end:
        return []
    return [Turn(message=index, prompt_length=prompt_length, start=start, end=end)]
