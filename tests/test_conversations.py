"""Conversations: every assistant turn's tokens, from the template's own rendering."""

import pytest

from pvcore.conversations import located
from pvcore.errors import ChatError, SpanError
from tests.chat_templates import ANSWER, QUESTION, STORY, WHY, answered, tokenizer_of
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


@pytest.mark.parametrize("for_generation", [False, True])
def test_earlier_turns_are_found_where_a_template_writes_an_empty_thought_before_the_last(
    for_generation: bool,
) -> None:
    qwen3 = tokenizer_of("qwen3")
    chat = [*answered(ANSWER, QUESTION), *answered("Because.", WHY), *answered("Once.", STORY)]
    chat = chat[:-1] if for_generation else chat
    one = located(qwen3, chat, max_length=None, for_generation=for_generation)
    assert one.ids == tuple(
        qwen3.apply_chat_template(chat, add_generation_prompt=for_generation, return_dict=False)
    )
    assert [turn.message for turn in one.turns] == ([1, 3] if for_generation else [1, 3, 5])
    for turn in one.turns:
        asked = qwen3.decode(one.ids[: turn.prompt_length])
        reply = qwen3.decode(one.ids[turn.start : turn.end])
        assert reply == chat[turn.message]["content"]
        assert asked.endswith("<|im_start|>assistant\n")
        assert asked.count("assistant\n") == (turn.message + 1) // 2
        if turn.message < 5:
            assert turn.start == turn.prompt_length
    thinking = [*answered(f"<think>\nHm.\n</think>\n\n{ANSWER}", QUESTION), WHY]
    with pytest.raises(SpanError, match="message 1 differently once others follow"):
        located(qwen3, thinking, max_length=None, for_generation=True)


def test_token_ids_have_no_messages() -> None:
    with pytest.raises(ChatError, match=r"use model\.monitor"):
        located(tokenizer(), prompts([4])[0], max_length=None)
