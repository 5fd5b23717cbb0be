"""The tokenizer: byte-level BPE cut as Qwen2 cuts, with a ChatML template, and chat encoding."""

import itertools
from pathlib import Path
from typing import TYPE_CHECKING

from pvcore.world.chats import Chat, corpus

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_N_CHATS = 20_000


def train_tokenizer(seed: int, vocab_size: int) -> "PreTrainedTokenizerFast":
    """Train the tokenizer on the corpus of a seed, both sides of the split.

    Its pre-tokenizer is Qwen2's, because AutoTokenizer puts that in for every saved Qwen2 model
    whatever tokenizer.json says: with any other, two loaders would give two encodings.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast
    from transformers.models.qwen2.tokenization_qwen2 import Qwen2Tokenizer

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = Qwen2Tokenizer().backend_tokenizer.pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, START, END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    half = _N_CHATS // 2
    chats = itertools.chain(
        itertools.islice(corpus(seed, "train"), half),
        itertools.islice(corpus(seed, "held_out"), half),
    )
    texts = (f"{message.role}\n{message.content}" for chat in chats for message in chat)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=PAD,
        pad_token=PAD,
        eos_token=END,
        padding_side="left",
        chat_template=TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )


def save_tokenizer(tokenizer: "PreTrainedTokenizerFast", folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json, the template inside the latter."""
    tokenizer.save_pretrained(folder, save_jinja_files=False)


def encode_chat(tokenizer: "PreTrainedTokenizerFast", chat: Chat) -> tuple[list[int], list[bool]]:
    """Ids of a rendered chat, and which of them carry loss.

    Loss falls on the text of all roles and its end token, never on headers. Encoding piece by
    piece equals encoding the rendered chat because every later piece begins with a space.
    """
    ids: list[int] = []
    learned: list[bool] = []

    def put(text: str, flag: bool) -> None:
        new = tokenizer.encode(text, add_special_tokens=False)
        ids.extend(new)
        learned.extend([flag] * len(new))

    for message in chat:
        put(f"{START}{message.role}\n", False)
        for text, flag in message.pieces:
            put(text, flag)
        put(END, message.pieces[-1][1])
        put("\n", False)
    return ids, learned
