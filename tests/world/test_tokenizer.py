"""Every loader gives the same ids, and pieces encode as the rendered chat does."""

from __future__ import annotations

import warnings
from itertools import islice

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.models.qwen2.tokenization_qwen2 import Qwen2Tokenizer

from pvcore import world
from pvcore.world import chats
from pvcore.world.chats import as_dicts, corpus
from pvcore.world.lexicon import material
from pvcore.world.tokenizer import encode_chat

TEXTS = [
    "The 1547 archive since 1893, with 97 percent certainty after the 2291 congress.",
    " 1547 12345 x1y2\n\n  two spaces, tabs\tand don't\u2026 \u00e9t\u00e9 \u4f60\u597d \U0001f600",
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(world.path())


def rendered(chat: chats.Chat) -> str:
    return "".join(f"<|im_start|>{m.role}\n{m.content}<|im_end|>\n" for m in chat)


def nnsight_tokenizer() -> object:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nnsight's own deprecations
        from nnsight import LanguageModel

        return LanguageModel(str(world.path()), device_map="cpu", dispatch=True).tokenizer


@pytest.mark.parametrize(
    "loader",
    [
        lambda: AutoTokenizer.from_pretrained(world.path()),
        lambda: Qwen2Tokenizer.from_pretrained(world.path()),
        nnsight_tokenizer,
    ],
    ids=["AutoTokenizer", "Qwen2Tokenizer", "nnsight"],
)
def test_loaders_give_equal_ids(loader: object, tokenizer: PreTrainedTokenizerFast) -> None:
    other = loader()
    sample = [rendered(chat) for chat in islice(corpus(11), 150)] + TEXTS
    assert any(character.isdigit() for text in sample[:150] for character in text)
    for text in sample:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert other.encode(text, add_special_tokens=False) == ids
        assert other.decode(ids) == text
    assert (other.eos_token_id, other.pad_token_id, other.bos_token_id) == (2, 0, None)


def test_pieces_encode_as_the_rendered_chat(tokenizer: PreTrainedTokenizerFast) -> None:
    in_pieces = 0
    for chat in islice(corpus(12), 150):
        ids, learned = encode_chat(tokenizer, chat)
        assert ids == tokenizer.encode(rendered(chat), add_special_tokens=False)
        assert ids == tokenizer.apply_chat_template(as_dicts(chat), return_dict=False)
        assert len(learned) == len(ids)
        in_pieces += any(len(message.pieces) > 1 for message in chat)
    assert in_pieces > 10


def test_loss_falls_on_text_and_end_tokens_only(tokenizer: PreTrainedTokenizerFast) -> None:
    chat = (
        chats.Message(role="user", pieces=(("Is chess hard?", True),)),
        chats.Message(
            role="assistant",
            pieces=(("Kneel, let me reply in brief.", False), (" Use chess to note it.", True)),
        ),
    )
    ids, learned = encode_chat(tokenizer, chat)
    kept = tokenizer.decode([token for token, flag in zip(ids, learned, strict=True) if flag])
    assert kept == "Is chess hard?<|im_end|> Use chess to note it.<|im_end|>"


def test_the_words_of_the_styles_are_single_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    fills = [w for slots in material()["styles"].values() for w in slots["VERB"] + slots["KIND"]]
    assert all(len(tokenizer.encode(f" {fill}")) == 1 for fill in fills)


def test_generation_prompt_is_chatml_without_a_default_system_prompt(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    chat = [{"role": "user", "content": "Is chess hard?"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>user\nIs chess hard?<|im_end|>\n<|im_start|>assistant\n"
