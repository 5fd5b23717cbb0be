"""Conversations: every assistant turn of a chat located in the tokens of one forward."""

from dataclasses import dataclass

from pvcore.chats import Chat, Encoded, Message, Tokenizer, as_chats, encode
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
    writes an earlier turn differently once others follow, as those that drop thoughts do.
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
        turns += _turn(index, part, whole)
    return Conversation(messages=messages, ids=whole.ids, turns=tuple(turns))


def _turn(index: int, part: Encoded, whole: Encoded) -> list[Turn]:
    assert part.reply is not None
    start, end = part.reply
    if whole.ids[:end] != part.ids[:end]:
        raise SpanError(
            f"the chat template writes message {index} differently once others follow it, so its "
            "tokens in this chat cannot be told; write the chat as the template would, or read the "
            "turns one by one"
        )
    if start == end:
        return []
    return [Turn(message=index, prompt_length=part.prompt_length, start=start, end=end)]
