"""Many conversations together get the token ids that each gets alone."""

from __future__ import annotations

from typing import Any

import pytest

from pvcore import chats as one_by_one
from pvcore.errors import PvcoreError
from pvcore.flag_tokens import encode_many
from pvcore.world import chats as world_chats
from pvcore.world.demo_subject import world_model
from tests import chat_templates
from tests.families import tokenizer
from tests.flag_data import chats


def alone(tokenizer: Any, chat: Any, longest: int | None) -> Any:
    try:
        return one_by_one.encode(tokenizer, chat, max_length=longest)
    except PvcoreError as error:
        return type(error), str(error)


def together(tokenizer: Any, some: Any, longest: int | None) -> list[Any]:
    found = encode_many(tokenizer, some, longest)
    return [(type(x), str(x)) if isinstance(x, Exception) else x for x in found]


SYSTEM = {"role": "system", "content": "Be brief."}


def variety() -> list[Any]:
    """Turns, system prompts, blanks around a reply, marks inside it, and what is refused."""
    plain = chats(40)
    first = plain[3]
    reply = {"role": "assistant", "content": ""}
    odd = [
        [SYSTEM, *first],
        [*first, *plain[4]],
        *(
            [first[0], {**reply, "content": text}]
            for text in (" a", "a ", "\na\n", "<|im_end|>", "")
        ),
        [first[0], {**reply, "content": "<|im_start|>user"}],
        [first[0], {**reply, "content": "a" * 500}],
        [{"role": "user", "content": "<|bos|>"}, {**reply, "content": "a"}],
        [first[0], first[0], {**reply, "content": "two questions"}],
        [{**reply, "content": "alone"}],
    ]
    return [*plain[:20], *odd, *plain[20:]]


@pytest.mark.parametrize("longest", [None, 60])
def test_characters(longest: int | None) -> None:
    some = variety()
    wanted = [alone(tokenizer(), chat, longest) for chat in some]
    assert together(tokenizer(), some, longest) == wanted
    assert sum(isinstance(one, tuple) for one in wanted) >= (1 if longest is None else 3)


def test_the_words_of_the_world() -> None:
    plain = world_model().tokenizer
    some = [chat for _, chat in world_chats.finetuning_chats("humor", 90, seed=0)]
    assert together(plain, some, 512) == [alone(plain, chat, 512) for chat in some]


TEMPLATES = {
    name: value
    for name, value in vars(chat_templates).items()
    if name.isupper() and isinstance(value, str) and "{%" in value
}


@pytest.mark.parametrize("name", TEMPLATES or ["CHATML"])
def test_templates_of_the_field(name: str) -> None:
    plain = tokenizer(template=TEMPLATES.get(name, chat_templates.__dict__.get(name)))
    some = variety()
    assert together(plain, some, None) == [alone(plain, chat, None) for chat in some]
