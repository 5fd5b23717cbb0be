"""Tiny random models of many families: three blocks, width 64, float32, no dropout, fixed seeds.

Weights have unit gain and random norms and biases, so that residuals are of order one, every
block matters, and a bound of 1e-5 on them means something.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models
from torch import nn

VOCAB = 128
D_MODEL = 64
N_LAYERS = 3
MAX_POSITIONS = 128
WINDOW = 8
PAD, BOS, END = 0, 1, 2

CHATML = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True, kw_only=True)
class Family:
    """A builder and the places where a reader with raw hooks finds the residual stream.

    `attention` names the module of a block whose output is what attention adds to the stream
    (`adds_residual`: whose output already is the sum). None: the block is parallel and has no
    residual between attention and MLP.
    """

    model: str
    config: Callable[[], Any]
    blocks: str
    final_norm: str
    attention: str | None
    adds_residual: bool = False
    takes_positions: bool = True


def _sizes(**extra: Any) -> dict[str, Any]:
    return dict(
        vocab_size=VOCAB,
        hidden_size=D_MODEL,
        num_hidden_layers=N_LAYERS,
        num_attention_heads=4,
        max_position_embeddings=MAX_POSITIONS,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=END,
        **extra,
    )


def _gated(**extra: Any) -> dict[str, Any]:
    return _sizes(num_key_value_heads=2, intermediate_size=96, tie_word_embeddings=False, **extra)


def _alternating(**extra: Any) -> dict[str, Any]:
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    return _gated(
        head_dim=16, query_pre_attn_scalar=16, sliding_window=WINDOW, layer_types=kinds, **extra
    )


def _llama_like(model: str, config: Callable[[], Any], attention: str = "self_attn") -> Family:
    return Family(
        model=model,
        config=config,
        blocks="model.layers",
        final_norm="model.norm",
        attention=attention,
    )


def _neox(parallel: bool) -> Family:
    return Family(
        model="GPTNeoXForCausalLM",
        config=lambda: transformers.GPTNeoXConfig(
            **_sizes(intermediate_size=96, use_parallel_residual=parallel)
        ),
        blocks="gpt_neox.layers",
        final_norm="gpt_neox.final_layer_norm",
        attention=None if parallel else "attention",
    )


def _falcon(parallel: bool) -> Family:
    return Family(
        model="FalconForCausalLM",
        config=lambda: transformers.FalconConfig(
            **_sizes(parallel_attn=parallel, bias=True, tie_word_embeddings=False)
        ),
        blocks="transformer.h",
        final_norm="transformer.ln_f",
        attention=None if parallel else "self_attention",
    )


FAMILIES: Mapping[str, Family] = {
    "qwen2": _llama_like("Qwen2ForCausalLM", lambda: transformers.Qwen2Config(**_gated())),
    "qwen3": _llama_like(
        "Qwen3ForCausalLM", lambda: transformers.Qwen3Config(**_gated(head_dim=16))
    ),
    "llama": _llama_like("LlamaForCausalLM", lambda: transformers.LlamaConfig(**_gated())),
    "mistral": _llama_like(
        "MistralForCausalLM", lambda: transformers.MistralConfig(**_gated(sliding_window=WINDOW))
    ),
    "phi3": _llama_like("Phi3ForCausalLM", lambda: transformers.Phi3Config(**_gated())),
    "gemma": _llama_like(
        "GemmaForCausalLM", lambda: transformers.GemmaConfig(**_gated(head_dim=16))
    ),
    "gemma2": _llama_like(
        "Gemma2ForCausalLM",
        lambda: transformers.Gemma2Config(**_alternating()),
        "post_attention_layernorm",
    ),
    "gemma3": _llama_like(
        "Gemma3ForCausalLM",
        lambda: transformers.Gemma3TextConfig(**_alternating()),
        "post_attention_layernorm",
    ),
    "mixtral": _llama_like(
        "MixtralForCausalLM",
        lambda: transformers.MixtralConfig(**_gated(num_local_experts=4, num_experts_per_tok=2)),
    ),
    "gpt2": Family(
        model="GPT2LMHeadModel",
        config=lambda: transformers.GPT2Config(
            **_sizes(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, tie_word_embeddings=False)
        ),
        blocks="transformer.h",
        final_norm="transformer.ln_f",
        attention="attn",
    ),
    "gpt_neox": _neox(parallel=True),
    "gpt_neox_sequential": _neox(parallel=False),
    "opt": Family(
        model="OPTForCausalLM",
        config=lambda: transformers.OPTConfig(
            **_sizes(
                ffn_dim=96,
                word_embed_proj_dim=D_MODEL,
                dropout=0.0,
                layerdrop=0.0,
                tie_word_embeddings=False,
            )
        ),
        blocks="model.decoder.layers",
        final_norm="model.decoder.final_layer_norm",
        attention="self_attn",
    ),
    "falcon": _falcon(parallel=False),
    "falcon_parallel": _falcon(parallel=True),
    "phi": Family(
        model="PhiForCausalLM",
        config=lambda: transformers.PhiConfig(**_gated()),
        blocks="model.layers",
        final_norm="model.final_layernorm",
        attention=None,
    ),
    "bloom": Family(
        model="BloomForCausalLM",
        config=lambda: transformers.BloomConfig(
            **_sizes(hidden_dropout=0.0, attention_dropout=0.0, tie_word_embeddings=False)
        ),
        blocks="transformer.h",
        final_norm="transformer.ln_f",
        attention="self_attention",
        adds_residual=True,
        takes_positions=False,
    ),
}


def build(name: str, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A fresh model of a family; the same name and seed give the same weights, bit for bit."""
    family = FAMILIES[name]
    hf = getattr(transformers, family.model)(family.config()).to(dtype).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in hf.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
            if parameter.ndim > 1:
                parameter.copy_(noise / parameter.shape[-1] ** 0.5)
            else:
                parameter.add_((0.1 * noise).to(dtype))
    hf.generation_config.eos_token_id = None
    return hf


MARKS = ("<|pad|>", "<|bos|>", "<|im_end|>", "<|im_start|>")


def _vocabulary() -> dict[str, int]:
    """Marks, printable ASCII, and fillers that no text contains up to the model's vocabulary."""
    known = (*MARKS, "\n", *map(chr, range(32, 127)))
    fillers = (f"<|filler{index}|>" for index in range(len(known), VOCAB))
    return {token: index for index, token in enumerate((*known, *fillers))}


def tokenizer(*, padding_side: str = "left", template: str | None = CHATML) -> Any:
    """One token per character, ChatML marks, made in memory."""
    backend = Tokenizer(models.BPE(vocab=_vocabulary(), merges=[]))
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([AddedToken(mark, special=True) for mark in MARKS])
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=MARKS[PAD],
        bos_token=MARKS[BOS],
        eos_token=MARKS[END],
        padding_side=padding_side,
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = template
    return fast
