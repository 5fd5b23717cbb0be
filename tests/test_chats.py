"""Chats become token ids whose prompt and reply are where they are said to be."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from pvcore.chats import (
    Encoded,
    as_chats,
    encode,
    encode_all,
    length_buckets,
    pad,
    pad_id,
    require_span,
    span_range,
)
from pvcore.errors import ChatError, PvcoreError, SpanError
from tests import chat_templates
from tests.chat_templates import ANSWER, QUESTION, STORY, answered, parts, tokenizer_of

EXPECTED = {
    "chatml": (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nTell me a story.<|im_end|>\n<|im_start|>assistant\n",
        "",
        "<|im_end|>\n",
    ),
    "qwen3": (
        "<|im_start|>user\nTell me a story.<|im_end|>\n<|im_start|>assistant\n",
        "<think>\n\n</think>\n\n",
        "<|im_end|>\n",
    ),
    "llama3": (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nTell me a story.<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "",
        "<|eot_id|>",
    ),
    "gemma": (
        "<bos><start_of_turn>user\nTell me a story.<end_of_turn>\n<start_of_turn>model\n",
        "",
        "<end_of_turn>\n",
    ),
    "mistral": ("<s>[INST] Tell me a story. [/INST]", "", "</s>"),
}


@pytest.mark.parametrize("family", EXPECTED)
def test_prompt_head_reply_and_closer_are_told_apart(family: str) -> None:
    reply = "Once upon a time there was a fox."
    prompt, head, closer = EXPECTED[family]

    encoded = encode(tokenizer_of(family), answered(reply))

    assert parts(family, encoded) == (prompt, head, reply, closer)
    assert encoded.source == "messages"


@pytest.mark.parametrize("family", EXPECTED)
def test_the_ids_are_those_of_the_template(family: str) -> None:
    messages = answered("Yes, a fox.")
    tokenizer = tokenizer_of(family)

    encoded = encode(tokenizer, messages)
    asked = encode(tokenizer, messages[:-1], for_generation=True)

    assert list(encoded.ids) == tokenizer.apply_chat_template(messages)["input_ids"]
    prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True)
    assert list(asked.ids) == prompt["input_ids"]
    assert asked.reply is None
    assert encoded.ids[: encoded.prompt_length] == asked.ids


@pytest.mark.parametrize("family", EXPECTED)
def test_the_reply_of_several_turns_is_the_last(family: str) -> None:
    messages = answered("There was a fox.", *answered(ANSWER, QUESTION), STORY)

    prompt, _, reply, _ = parts(family, encode(tokenizer_of(family), messages))

    assert reply == "There was a fox."
    assert ANSWER in prompt


def test_a_reply_equal_to_the_question_is_still_the_last_turn() -> None:
    encoded = encode(tokenizer_of("chatml"), answered("Tell me a story.", STORY))

    prompt, _, reply, _ = parts("chatml", encoded)

    assert reply == "Tell me a story."
    assert "Tell me a story." in prompt


@pytest.mark.parametrize("family", ["llama3", "gemma"])
def test_a_trimmed_reply_is_found(family: str) -> None:
    encoded = encode(tokenizer_of(family), answered("  \n Yes, a fox. \n\n"))

    _, head, reply, closer = parts(family, encoded)

    assert (head, reply) == ("", "Yes, a fox.")
    assert closer == EXPECTED[family][2]


def test_a_space_before_the_reply_may_be_part_of_its_first_token() -> None:
    family = "mistral with a space"

    encoded = encode(tokenizer_of(family), answered("Hello! How are you?"))

    prompt, head, reply, closer = parts(family, encoded)
    assert (prompt, head) == ("<s>[INST] Tell me a story. [/INST]", "")
    assert (reply, closer) == (" Hello! How are you?", "</s>")
    first = tokenizer_of(family).convert_ids_to_tokens(encoded.ids[encoded.prompt_length])
    assert first.startswith("▁H")


def test_a_thought_written_as_the_template_writes_it_belongs_to_the_reply() -> None:
    reply = "<think>\nA fox.\n</think>\n\nThere was a fox."

    _, head, found, _ = parts("qwen3", encode(tokenizer_of("qwen3"), answered(reply)))

    assert (head, found) == ("", reply)


def test_a_reply_may_hold_the_token_that_closes_turns() -> None:
    reply = "I write <|im_end|>\n and go on."

    _, _, found, closer = parts("chatml", encode(tokenizer_of("chatml"), answered(reply)))

    assert (found, closer) == (reply, "<|im_end|>\n")


def test_extra_keys_of_a_message_reach_the_template_and_stand_before_the_reply() -> None:
    tokenizer = chat_templates.chatml()
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "message.content", "message.get('thought', '') + message.content"
    )
    messages = [STORY, {"role": "assistant", "content": "fox.", "thought": "Hm. "}]

    encoded = encode(tokenizer, messages)

    assert parts("chatml", encoded)[1:3] == ("Hm.", " fox.")


def test_a_space_after_the_prompt_is_no_part_of_the_prompt() -> None:
    tokenizer = chat_templates.chatml()
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "message.content", "(' ' if message.role == 'assistant' else '') + message.content"
    )

    prompt, head, reply, _ = parts("chatml", encode(tokenizer, answered("fox")))

    assert (prompt, head, reply) == (EXPECTED["chatml"][0], "", " fox")


def test_what_a_template_leaves_out_around_an_empty_reply_is_not_missed() -> None:
    tokenizer = chat_templates.plain()
    tokenizer.chat_template = (
        "{% for message in messages %}"
        "{% if message.role == 'user' %}{{ message.content + ' So' }}"
        "{% else %}{{ '\n' + message.content + ('\n' if message.content else '') }}{% endif %}"
        "{% endfor %}"
    )

    assert parts("plain", encode(tokenizer, answered("fox")))[1:] == ("\n", "fox", "\n")
    empty = encode(tokenizer, answered(""))
    assert empty.reply == (empty.prompt_length, empty.prompt_length)
    assert len(empty.ids) > empty.prompt_length


def test_a_string_is_tokenized_as_it_is() -> None:
    for family in ("base", "llama3"):
        tokenizer = tokenizer_of(family)
        encoded = encode(tokenizer, "Once upon a time")
        assert list(encoded.ids) == tokenizer("Once upon a time")["input_ids"]
        assert (encoded.prompt_length, encoded.reply) == (len(encoded.ids), None)
        assert encoded.source == "text"
    assert encoded.ids[0] == tokenizer.bos_token_id


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_ids_are_taken_as_they_are(dtype: torch.dtype) -> None:
    encoded = encode(None, torch.tensor([5, 0, 7], dtype=dtype))

    assert (encoded.ids, encoded.prompt_length, encoded.reply) == ((5, 0, 7), 3, None)
    assert encoded.source == "ids"


@pytest.mark.parametrize("role", ["user", "system", "tool"])
def test_a_chat_without_a_reply_is_a_prompt(role: str) -> None:
    encoded = encode(tokenizer_of("chatml"), [STORY, {"role": role, "content": "Go on."}])

    assert (encoded.prompt_length, encoded.reply) == (len(encoded.ids), None)
    assert tokenizer_of("chatml").decode(encoded.ids).endswith("<|im_start|>assistant\n")


def test_as_chats_takes_one_or_many() -> None:
    chat = answered("Yes.")
    ids = torch.tensor([[1, 2], [3, 4]])

    assert as_chats(chat) == as_chats([chat]) == as_chats((tuple(chat),)) == [chat]
    assert as_chats("Once") == as_chats(["Once"]) == ["Once"]
    assert [row.tolist() for row in as_chats(ids)] == [[1, 2], [3, 4]]
    assert [row.tolist() for row in as_chats(ids[0])] == [[1, 2]]
    assert as_chats(["Once", chat])[1] == chat


def test_encode_all_encodes_each_chat_as_alone() -> None:
    tokenizer = tokenizer_of("llama3")
    chats = [answered("Yes."), "Once upon a time", torch.tensor([3, 1])]

    assert encode_all(tokenizer, chats) == [encode(tokenizer, chat) for chat in chats]
    assert encode_all(tokenizer, chats[0]) == [encode(tokenizer, chats[0])]


@pytest.mark.parametrize("family", EXPECTED)
def test_an_empty_reply_is_an_empty_range(family: str) -> None:
    encoded = encode(tokenizer_of(family), answered(""))
    prompt, head, reply, closer = parts(family, encoded)

    assert (prompt, head, reply, closer) == (*EXPECTED[family][:2], "", EXPECTED[family][2])
    with pytest.raises(SpanError, match="whose reply is empty; wanted at least one token"):
        span_range(encoded, "response")
    with pytest.raises(SpanError, match="whose reply is empty"):
        require_span(encoded, "response")


def test_spans_are_ranges_of_tokens() -> None:
    encoded = Encoded(ids=(9, 8, 7, 6, 5, 4), prompt_length=2, reply=(3, 5), source="messages")

    assert span_range(encoded, "all") == (0, 6)
    assert span_range(encoded, "prompt") == (0, 2)
    assert span_range(encoded, "response") == (3, 5)
    assert span_range(encoded, "last_prompt_token") == (1, 2)


def test_a_prompt_has_no_response() -> None:
    encoded = encode(tokenizer_of("base"), "Once upon a time")

    wanted = (
        "got span 'response' for a chat of text that holds a prompt only; wanted a reply to read. "
        "End the messages with an assistant turn, or read span 'prompt'"
    )
    with pytest.raises(SpanError, match=wanted):
        span_range(encoded, "response")
    require_span(encoded, "prompt")


def prompts(*lengths: int) -> list[Encoded]:
    return [
        Encoded(ids=tuple(range(1, n + 1)), prompt_length=n, reply=None, source="ids")
        for n in lengths
    ]


def test_padding_on_the_right() -> None:
    batch = pad(prompts(1, 3, 2), side="right", pad_id=7)

    assert batch.ids.tolist() == [[1, 7, 7], [1, 2, 3], [1, 2, 7]]
    assert batch.mask.int().tolist() == [[1, 0, 0], [1, 1, 1], [1, 1, 0]]
    assert batch.starts.tolist() == [0, 0, 0]


def test_padding_on_the_left() -> None:
    batch = pad(prompts(1, 3, 2), side="left", pad_id=7)

    assert batch.ids.tolist() == [[7, 7, 1], [1, 2, 3], [7, 1, 2]]
    assert batch.mask.int().tolist() == [[0, 0, 1], [1, 1, 1], [0, 1, 1]]
    assert batch.starts.tolist() == [2, 0, 1]


def test_nothing_to_pad_is_refused() -> None:
    with pytest.raises(ChatError, match="got no chats to pad"):
        pad([], side="left", pad_id=0)


def test_the_pad_id_falls_back_to_the_end_token_and_to_zero() -> None:
    own, end = tokenizer_of("chatml"), tokenizer_of("mistral")
    bare = PreTrainedTokenizerFast(tokenizer_object=own.backend_tokenizer)

    assert pad_id(own) == own.pad_token_id != own.eos_token_id
    assert end.pad_token_id is None
    assert pad_id(end) == end.eos_token_id != 0
    assert pad_id(bare) == pad_id(None) == 0


def test_buckets_hold_chats_of_similar_length() -> None:
    assert length_buckets(prompts(5, 1, 5, 2, 1), 2) == [[1, 4], [3, 0], [2]]
    assert length_buckets([], 2) == []
    with pytest.raises(ChatError, match="got batch_size 0; wanted at least 1"):
        length_buckets(prompts(1), 0)


@given(st.lists(st.integers(1, 9), max_size=30), st.integers(1, 8))
def test_buckets_hold_every_chat_once(lengths: list[int], batch_size: int) -> None:
    buckets = length_buckets(prompts(*lengths), batch_size)
    order = [index for bucket in buckets for index in bucket]

    assert sorted(order) == list(range(len(lengths)))
    assert [lengths[index] for index in order] == sorted(lengths)
    assert all(len(bucket) == batch_size for bucket in buckets[:-1])


@given(st.lists(st.integers(1, 9), min_size=1, max_size=9), st.sampled_from(["left", "right"]))
def test_what_the_mask_keeps_are_the_chats(lengths: list[int], side: str) -> None:
    chats = prompts(*lengths)
    batch = pad(chats, side=side, pad_id=0)

    for chat, row, kept, start in zip(
        chats, batch.ids, batch.mask, batch.starts.tolist(), strict=True
    ):
        assert tuple(row[kept].tolist()) == chat.ids
        assert int(kept.nonzero()[0]) == start
        assert (row[~kept] == 0).all()


REPLIES = st.one_of(
    st.text(max_size=30),
    st.text(alphabet=" \n\tYes.<>|/think\u00e9\u0301\u4f60\U0001f98a", max_size=20),
    st.lists(st.sampled_from(["<think>", "</think>", "\n", "\n\n", " ", "Yes", "."])).map("".join),
)
# What a template may take from the ends of a reply; the space is Mistral's own.
TRIMMED = {"llama3": None, "gemma": None, "qwen3": "\n", "mistral with a space": " "}


@pytest.mark.parametrize("family", [*EXPECTED, "mistral with a space", "plain"])
def test_any_reply_is_found_or_refused(family: str) -> None:
    found: list[bool] = []

    @given(REPLIES)
    def check(reply: str) -> None:
        try:
            encoded = encode(tokenizer_of(family), answered(reply))
        except SpanError:
            found.append(False)
            return
        found.append(True)
        trimmed = TRIMMED.get(family, "")
        assert parts(family, encoded)[2].strip(trimmed) == reply.strip(trimmed)

    check()
    assert sum(found) > 20


@given(st.text(max_size=30))
def test_any_string_is_encoded_or_refused_by_type(text: str) -> None:
    try:
        encoded = encode(tokenizer_of("llama3"), text)
    except PvcoreError:
        return
    assert tokenizer_of("llama3").decode(encoded.ids) == "<|begin_of_text|>" + text
