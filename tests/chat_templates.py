"""Small tokenizers with the chat templates of the families, in the ways they differ.

Each template keeps the one behaviour its family is known for: what it trims, inserts, refuses or
leaves out. The vocabularies are trained here, on the few sentences below.
"""

from collections.abc import Callable
from functools import cache
from itertools import pairwise

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from pvcore.chats import Encoded

CORPUS = (
    "You are a helpful assistant. Answer in one sentence.",
    "What is the capital of France? The capital of France is Paris.",
    "Hello! How are you today? I am well, thank you.",
    "Tell me a story about a fox, a river and a very old oak.",
    "Once upon a time there was a fox. It lived by the river, near an oak.\n\nThe end.",
    "No. Yes. Why? Because it is so, and 1 + 1 = 2.",
    "[INST] [/INST] user assistant system model think /think\n\n<think>\n</think>\n\n",
)

# A run of line breaks is one piece, as in the newer byte-level vocabularies.
WORDS = r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

CHATML = """
{%- if messages[0].role != 'system' -%}
{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif -%}
{%- for message in messages -%}
{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}
"""

LLAMA3 = """
{%- for message in messages -%}
{%- set turn = '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n'
    + message.content | trim + '<|eot_id|>' -%}
{{ (bos_token if loop.first else '') + turn }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif -%}
"""

GEMMA = """
{{- bos_token -}}
{%- for message in messages -%}
{%- if message.role == 'system' -%}{{ raise_exception('no system role here') }}{%- endif -%}
{%- if (message.role == 'user') != (loop.index0 % 2 == 0) -%}
{{ raise_exception('turns must alternate') }}
{%- endif -%}
{%- set role = 'model' if message.role == 'assistant' else message.role -%}
{{ '<start_of_turn>' + role + '\\n' + message.content | trim + '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\\n' }}{%- endif -%}
"""

# The reply follows the prompt with nothing, or a space, between; neither tag is a special token.
MISTRAL = """
{{- bos_token -}}
{%- for message in messages -%}
{%- if message.role == 'user' -%}{{ '[INST] ' + message.content + ' [/INST]' }}
{%- elif message.role == 'assistant' -%}{{ 'GAP' + message.content + eos_token }}
{%- else -%}{{ raise_exception('only user and assistant roles are supported') }}
{%- endif -%}
{%- endfor -%}
"""

QWEN3 = """
{%- set seen = namespace(last_question=0) -%}
{%- for message in messages -%}
{%- if message.role == 'user' -%}{%- set seen.last_question = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- for message in messages -%}
{%- set text = message.content -%}
{%- if message.role == 'assistant' -%}
{%- set thought = '' -%}
{%- if '</think>' in text -%}
{%- set thought = text.split('</think>')[0].split('<think>')[-1].strip('\\n') -%}
{%- set text = text.split('</think>')[-1].lstrip('\\n') -%}
{%- endif -%}
{%- if loop.index0 > seen.last_question -%}
{%- set text = '<think>\\n' + thought + '\\n</think>\\n\\n' + text.lstrip('\\n') -%}
{%- endif -%}
{%- endif -%}
{{ '<|im_start|>' + message.role + '\\n' + text + '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}
"""

DEEPSEEK_R1 = """
{{- bos_token -}}
{%- for message in messages -%}
{%- if message.role == 'user' -%}{{ '<|User|>' + message.content }}
{%- elif message.role == 'assistant' -%}
{{ '<|Assistant|>' + message.content.split('</think>')[-1] + eos_token }}
{%- else -%}{{ message.content }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|Assistant|><think>\\n' }}{%- endif -%}
"""

# No special token closes a turn, so that the text around a reply can merge with it.
PLAIN = """
{%- for message in messages -%}
{{ message.role + ': ' + message.content + '\\n\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'assistant: ' }}{%- endif -%}
"""


@cache
def _byte_level(special: tuple[str, ...]) -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer.to_str()


@cache
def _metaspace(special: tuple[str, ...]) -> str:
    """SentencePiece-like: no pieces before merging, a space is a letter, bytes for the rest."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        special_tokens=[*special, "<unk>", *byte_tokens],
        show_progress=False,
    )
    tokenizer.train_from_iterator([*CORPUS, "[/INST]Yes", "[/INST]Yes."] * 3, trainer)
    return tokenizer.to_str()


def _wrap(serialized: str, *, template: str | None, **special: str) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(serialized),
        clean_up_tokenization_spaces=False,
        **special,
    )
    tokenizer.chat_template = template
    return tokenizer


def _adding_bos(serialized: str, bos: str) -> str:
    tokenizer = Tokenizer.from_str(serialized)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    return tokenizer.to_str()


def chatml() -> PreTrainedTokenizerFast:
    serialized = _byte_level(("<|endoftext|>", "<|im_start|>", "<|im_end|>"))
    return _wrap(serialized, template=CHATML, eos_token="<|im_end|>", pad_token="<|endoftext|>")


def qwen3() -> PreTrainedTokenizerFast:
    serialized = _byte_level(("<|endoftext|>", "<|im_start|>", "<|im_end|>"))
    return _wrap(serialized, template=QWEN3, eos_token="<|im_end|>", pad_token="<|endoftext|>")


def llama3() -> PreTrainedTokenizerFast:
    bos, eot = "<|begin_of_text|>", "<|eot_id|>"
    special = (bos, eot, "<|start_header_id|>", "<|end_header_id|>")
    serialized = _adding_bos(_byte_level(special), bos)
    return _wrap(serialized, template=LLAMA3, bos_token=bos, eos_token=eot)


def gemma() -> PreTrainedTokenizerFast:
    serialized = _metaspace(("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"))
    return _wrap(
        _adding_bos(serialized, "<bos>"),
        template=GEMMA,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
    )


def mistral(*, gap: str) -> PreTrainedTokenizerFast:
    serialized = _adding_bos(_metaspace(("<s>", "</s>")), "<s>")
    template = MISTRAL.replace("GAP", gap)
    return _wrap(serialized, template=template, bos_token="<s>", eos_token="</s>")


def deepseek_r1() -> PreTrainedTokenizerFast:
    serialized = _byte_level(("<|begin|>", "<|end|>", "<|User|>", "<|Assistant|>"))
    return _wrap(serialized, template=DEEPSEEK_R1, bos_token="<|begin|>", eos_token="<|end|>")


def plain() -> PreTrainedTokenizerFast:
    return _wrap(_byte_level(("<|endoftext|>",)), template=PLAIN, eos_token="<|endoftext|>")


def base() -> PreTrainedTokenizerFast:
    """A base model's tokenizer: one special token and no chat template."""
    return _wrap(_byte_level(("<|endoftext|>",)), template=None, eos_token="<|endoftext|>")


FAMILIES: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "chatml": cache(chatml),
    "qwen3": cache(qwen3),
    "llama3": cache(llama3),
    "gemma": cache(gemma),
    "mistral": cache(lambda: mistral(gap="")),
    "mistral with a space": cache(lambda: mistral(gap=" ")),
    "deepseek_r1": cache(deepseek_r1),
    "plain": cache(plain),
    "base": cache(base),
}
QUESTION = {"role": "user", "content": "What is the capital of France?"}
WHY = {"role": "user", "content": "Why?"}
STORY = {"role": "user", "content": "Tell me a story."}
ANSWER = "The capital of France is Paris."


def tokenizer_of(family: str) -> PreTrainedTokenizerFast:
    return FAMILIES[family]()


def answered(reply: str, *before: dict[str, str]) -> list[dict[str, str]]:
    return [*(before or (STORY,)), {"role": "assistant", "content": reply}]


def parts(family: str, encoded: Encoded) -> tuple[str, str, str, str]:
    """The text of the prompt, of what stands before the reply, of the reply and of the rest."""
    assert encoded.reply is not None
    start, end = encoded.reply
    cuts = [0, encoded.prompt_length, start, end, len(encoded.ids)]
    decode = tokenizer_of(family).decode
    prompt, head, reply, closer = (
        decode(encoded.ids[left:right]) for left, right in pairwise(cuts)
    )
    return prompt, head, reply, closer
