"""A chat that cannot be encoded without guessing is one typed error that says what to do."""

import pytest
import torch

from pvcore.chats import as_chats, encode, encode_all
from pvcore.errors import ChatError, SpanError
from tests import chat_templates
from tests.chat_templates import QUESTION, STORY, WHY, answered, parts, tokenizer_of


def test_a_token_shared_by_prompt_and_reply_is_refused() -> None:
    with pytest.raises(SpanError) as refusal:
        encode(tokenizer_of("mistral"), answered("Yes.", WHY))

    assert encode(tokenizer_of("mistral"), answered("Hello!", WHY)).reply is not None
    assert str(refusal.value) == (
        "the reply shares a token with the prompt: no token ends between "
        "'>[INST] Why? [/INST]' and 'Yes.</s>'; wanted a token boundary there. "
        "Separate the two in tokenizer.chat_template, or drop the chat"
    )


def test_a_token_shared_by_the_head_and_the_reply_is_refused() -> None:
    tokenizer = chat_templates.chatml()
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "message.content", "'t' + message.content"
    )

    with pytest.raises(SpanError, match="shares a token with the text the template puts before it"):
        encode(tokenizer, answered("he fox"))
    assert parts("chatml", encode(tokenizer, answered(" fox")))[1:3] == ("t", " fox")


def test_a_token_shared_by_the_reply_and_its_closer_is_refused() -> None:
    wanted = "shares a token with the text the template puts after it: no token ends between"
    with pytest.raises(SpanError, match=wanted):
        encode(tokenizer_of("plain"), answered(" There was a fox."))

    assert parts("plain", encode(tokenizer_of("plain"), answered(" a fox")))[2] == " a fox"


@pytest.mark.parametrize("reply", ["A fox.", "<think>\nA fox.\n</think>\n\nThere was a fox."])
def test_a_template_that_opens_a_thought_it_leaves_out_of_replies_is_named(reply: str) -> None:
    with pytest.raises(SpanError) as refusal:
        encode(tokenizer_of("deepseek_r1"), answered(reply))

    assert str(refusal.value).startswith(
        "the chat template rewrote the prompt: wanted '<think>\\n', got "
    )
    assert "(a reasoning template that drops or inserts <think> blocks)" in str(refusal.value)
    assert "set tokenizer.chat_template to one that keeps every turn as it was" in str(
        refusal.value
    )


def test_a_template_that_rewrites_a_thought_is_named() -> None:
    with pytest.raises(SpanError) as refusal:
        encode(tokenizer_of("qwen3"), answered("<think>A fox.</think>Yes."))

    assert str(refusal.value).startswith(
        "the chat template rewrote the reply: wanted '<think>A fox.</think>Yes.', got "
        "'<think>\\nA fox.\\n</think>\\n\\nYes.<|im_end|>\\n' (a reasoning template"
    )


def test_a_template_that_changes_a_reply_without_thoughts_is_refused_without_naming_them() -> None:
    tokenizer = chat_templates.chatml()
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "message.content", "message.content | upper"
    )

    with pytest.raises(SpanError) as refusal:
        encode(tokenizer, answered("A fox."))

    assert "rewrote the reply: wanted 'A fox.', got 'A FOX.<|im_end|>" in str(refusal.value)
    assert "think" not in str(refusal.value)


def test_a_template_that_closes_turns_by_what_they_say_is_refused() -> None:
    tokenizer = chat_templates.chatml()
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "'<|im_end|>\\n'", "('<|im_end|> ' if message.content == 'Yes.' else '<|im_end|>\\n')"
    )

    with pytest.raises(
        SpanError, match=r"rewrote the reply: wanted 'Yes\.', got 'Yes\.<.im_end.> '"
    ):
        encode(tokenizer, answered("Yes."))
    assert parts("chatml", encode(tokenizer, answered("No.")))[2] == "No."


def test_a_template_that_speaks_for_a_silent_assistant_is_refused() -> None:
    tokenizer = chat_templates.chatml()
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "message.content", "('says ' if message.content else 'mute ') + message.content"
    )

    with pytest.raises(SpanError, match="rewrote the reply: wanted '', got 'mute "):
        encode(tokenizer, answered(""))
    assert parts("chatml", encode(tokenizer, answered("No.")))[1:3] == ("says ", "No.")


def test_a_reasoning_template_still_encodes_prompts() -> None:
    messages = answered("<think>\nHm.\n</think>\n\nA fox.", STORY)
    encoded = encode(tokenizer_of("deepseek_r1"), [*messages, QUESTION], for_generation=True)

    text = tokenizer_of("deepseek_r1").decode(encoded.ids)
    assert text.endswith(f"{QUESTION['content']}<|Assistant|><think>\n")
    assert "Hm." not in text


REFUSED_CHATS = {
    "no messages": ("chatml", [], "a chat without messages; wanted at least one"),
    "no content": ("chatml", [{"role": "user"}], "got nothing for 'content' of message 0"),
    "no role": ("chatml", [STORY, {"content": "Hi."}], "got nothing for 'role' of message 1"),
    "content of parts": (
        "chatml",
        [{"role": "user", "content": [{"type": "text", "text": "Hi."}]}],
        "got list for 'content' of message 0; wanted a string",
    ),
    "content of None": ("chatml", [STORY, {"role": "user", "content": None}], "got NoneType for"),
    "a lone surrogate": (
        "chatml",
        [{"role": "user", "content": "a\ud800"}],
        "got a lone surrogate at character 1 of the 'content' of message 0",
    ),
    "a lone surrogate in a string": (
        "base",
        "\udfff",
        "a lone surrogate at character 0 of the str",
    ),
    "no template": (
        "base",
        [STORY],
        "a chat without a template: .* Pass plain strings, or set tok",
    ),
    "no system role": (
        "gemma",
        [{"role": "system", "content": "Be brief."}, STORY],
        "template refused the chat: no system role here; got messages of roles system, user",
    ),
    "turns out of order": ("gemma", [STORY, STORY], "refused the chat: turns must alternate"),
    "an unknown role": (
        "mistral",
        [{"role": "narrator", "content": "Once"}],
        "refused the chat: only user and assistant roles are supported; got .* roles narrator",
    ),
    "only a reply": ("chatml", answered("Yes.")[1:], "got a reply with an empty prompt"),
    "an empty string": ("base", "", "got an empty prompt: no tokens"),
    "no ids": ("base", torch.tensor([], dtype=torch.long), "got an empty prompt: a tensor without"),
    "real numbers": ("base", torch.ones(3), r"shape \(3,\) and torch.float32 for a chat"),
    "truth values": ("base", torch.ones(3, dtype=torch.bool), "wanted token ids: one axis of int"),
    "two axes": ("base", torch.ones(1, 3, dtype=torch.long), r"a tensor of shape \(1, 3\)"),
    "no axis": ("base", torch.tensor(3), r"a tensor of shape \(\)"),
    "masked labels": ("base", torch.tensor([1, -100]), "got token id -100; wanted ids from 0"),
    "a BOS the tokenizer adds": (
        "llama3",
        "<|begin_of_text|>Once",
        "got a doubled BOS: the chat of text begins with token 0 twice; wanted it once",
    ),
    "two BOS ids": ("llama3", torch.tensor([0, 0, 5]), "a doubled BOS: the chat of ids begins"),
    "a BOS the template adds": (
        "deepseek_r1",
        [{"role": "system", "content": "<|begin|>Be brief."}, STORY],
        "a doubled BOS: the chat of messages begins .* Remove the one you wrote",
    ),
}


@pytest.mark.parametrize(("family", "chat", "text"), REFUSED_CHATS.values(), ids=REFUSED_CHATS)
def test_a_chat_that_cannot_be_encoded_is_one_typed_error(
    family: str, chat: object, text: str
) -> None:
    with pytest.raises(ChatError, match=text):
        encode(tokenizer_of(family), chat)


@pytest.mark.parametrize("chat", ["Once upon a time", [STORY]])
def test_text_without_a_tokenizer_is_refused(chat: object) -> None:
    with pytest.raises(ChatError, match="got a chat as text but no tokenizer; wanted one to make"):
        encode(None, chat)


@pytest.mark.parametrize("chat", [[STORY], answered("Yes.")])
def test_a_template_that_leaves_nothing_before_a_reply_is_an_empty_prompt(
    chat: list[dict[str, str]],
) -> None:
    tokenizer = chat_templates.chatml()
    tokenizer.chat_template = "{{ messages[1].content if messages | length > 1 else '' }}"

    with pytest.raises(ChatError, match="got an empty prompt: no tokens"):
        encode(tokenizer, chat)


def test_a_reply_is_nothing_to_generate() -> None:
    with pytest.raises(ChatError, match="there is nothing to generate"):
        encode(tokenizer_of("chatml"), answered("Yes."), for_generation=True)

    assert encode(tokenizer_of("chatml"), answered("Yes.")).reply is not None


def test_a_chat_longer_than_the_model_allows_is_never_truncated() -> None:
    tokenizer = tokenizer_of("chatml")
    length = len(encode(tokenizer, answered("Yes.")).ids)

    assert len(encode(tokenizer, answered("Yes."), max_length=length).ids) == length
    wanted = f"longer than the model allows: {length} tokens; wanted at most {length - 1}"
    with pytest.raises(ChatError, match=wanted):
        encode(tokenizer, answered("Yes."), max_length=length - 1)


@pytest.mark.parametrize(
    ("chats", "text"),
    [
        ([], "got no chats; wanted at least one"),
        (torch.ones(0, 3, dtype=torch.long), "got no chats"),
        (None, "got NoneType for chats; wanted a list of chats"),
        (STORY, "got dict for chats; .* Wrap a lone message in a list"),
        (b"Once", "got bytes for chats"),
        (iter(["Once"]), "got str_.*iterator for chats|got list_iterator for chats"),
        ([1, 2, 3], "chat 0: got int for a chat; wanted a list of message dicts"),
        (["Once", b"upon"], "chat 1: got bytes for a chat"),
        (["Once", []], "chat 1: got a chat without messages"),
        (["Once", [STORY, "Hi."]], "chat 1: got str as message 1; wanted a dict such as"),
        ([STORY, "Once"], "chat 0: got str as message 1"),
        (["Once", STORY], "chat 1: got dict for a chat"),
        (torch.ones(2, 3), "chat 0: got a tensor of shape"),
        (torch.ones(1, 2, 3, dtype=torch.long), "chat 0: got a tensor of shape"),
    ],
)
def test_what_is_no_chat_is_named_by_its_index(chats: object, text: str) -> None:
    with pytest.raises(ChatError, match=f"^{text}"):
        as_chats(chats)


def test_encode_all_names_the_chat_and_keeps_the_type_of_its_error() -> None:
    tokenizer = tokenizer_of("mistral")

    with pytest.raises(SpanError, match=r"^chat 1: the reply shares a token with the prompt"):
        encode_all(tokenizer, [[STORY], answered("Yes.", WHY)])
    with pytest.raises(ChatError, match=r"^chat 2: got a chat longer than the model allows"):
        encode_all(tokenizer, ["No.", "No.", "No. No. No."], max_length=5)
    with pytest.raises(ChatError, match=r"^chat 1: got nothing for 'role' of message 0"):
        encode_all(tokenizer, [[STORY], [{"content": "Hi."}]])
