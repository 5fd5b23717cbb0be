"""Conversations: every assistant turn's tokens, from the template's own rendering."""

import pytest

from pvcore.conversations import located
from pvcore.errors import ChatError, SpanError
from tests.families import CHATML, tokenizer
from tests.subjects import prompts

CHAT = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Is it 3?"},
    {"role": "assistant", "content": "Yes, of course."},
    {"role": "user", "content": "Sure?"},
    {"role": "assistant", "content": ""},
    {"role": "user", "content": "Well?"},
    {"role": "assistant", "content": "no"},
]
FORGETFUL = CHATML.replace(
    "{{ message['content'] }}",
    "{% if loop.last or message['role'] != 'assistant' %}{{ message['content'] }}{% endif %}",
)


def text_of(ids: tuple[int, ...]) -> str:
    return str(tokenizer().decode(ids))


def test_every_turn_with_text_is_found_where_it_stands() -> None:
    one = located(tokenizer(), CHAT, max_length=None)
    assert [turn.message for turn in one.turns] == [2, 6]
    for turn in one.turns:
        assert text_of(one.ids[turn.start : turn.end]) == CHAT[turn.message]["content"]
        assert text_of(one.ids[: turn.prompt_length]).endswith("<|im_start|>assistant\n")
    assert text_of(one.ids).startswith("<|im_start|>system\nBe kind.<|im_end|>")


def test_a_prompt_has_the_turns_before_it() -> None:
    one = located(tokenizer(), CHAT[:4], max_length=None, for_generation=True)
    assert [turn.message for turn in one.turns] == [2]
    assert text_of(one.ids).endswith("<|im_start|>assistant\n")
    alone = located(tokenizer(), "Is it 3?", max_length=None)
    assert (text_of(alone.ids), alone.turns) == ("Is it 3?", ())
    assert alone.messages == ({"role": "user", "content": "Is it 3?"},)


def test_a_template_that_rewrites_earlier_turns_is_refused() -> None:
    with pytest.raises(SpanError, match="message 2 differently once others follow"):
        located(tokenizer(template=FORGETFUL), CHAT, max_length=None)
    assert located(tokenizer(template=FORGETFUL), CHAT[:3], max_length=None).turns


def test_token_ids_have_no_messages() -> None:
    with pytest.raises(ChatError, match=r"use model\.monitor"):
        located(tokenizer(), prompts([4])[0], max_length=None)
