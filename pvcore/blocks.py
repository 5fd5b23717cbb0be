"""Where a Hugging Face decoder keeps its residual stream: its blocks and the norms inside them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pvcore.errors import ChatError, ModelError, SiteError
from pvcore.sites import Site

# The norm whose input is the residual between attention and MLP, by family. Names alone do not
# tell (olmo2 norms the attention's output under the same name), so unknown families are refused.
MID_NORM = {
    "bloom": "post_attention_layernorm",
    "falcon": "post_attention_layernorm",
    "gemma": "post_attention_layernorm",
    "gemma2": "pre_feedforward_layernorm",
    "gemma3_text": "pre_feedforward_layernorm",
    "gpt_neox": "post_attention_layernorm",
    "granite": "post_attention_layernorm",
    "llama": "post_attention_layernorm",
    "mistral": "post_attention_layernorm",
    "mixtral": "post_attention_layernorm",
    "phi3": "post_attention_layernorm",
    "qwen2": "post_attention_layernorm",
    "qwen2_moe": "post_attention_layernorm",
    "qwen3": "post_attention_layernorm",
    "qwen3_moe": "post_attention_layernorm",
    "smollm3": "post_attention_layernorm",
    "starcoder2": "post_attention_layernorm",
    "gpt2": "ln_2",
    "opt": "final_layer_norm",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoder:
    """The decoder inside a causal language model.

    `root` is the whole model, `owner` the module whose forward runs the `blocks` one after
    another; `path` names the block list inside the model, as in `model.layers`. `no_mid` says why
    `resid_mid` does not exist, or is empty.
    """

    root: nn.Module
    owner: nn.Module
    blocks: tuple[nn.Module, ...]
    path: str
    d_model: int
    family: str
    no_mid: str

    @property
    def n_layers(self) -> int:
        return len(self.blocks)

    def require(self, site: Site) -> None:
        """Raise `SiteError` unless this decoder has the site."""
        if site.layer >= self.n_layers:
            raise SiteError(
                f"got site {site}; this {self.family} model has {self.n_layers} blocks, "
                f"0 to {self.n_layers - 1}"
            )
        if site.kind == "resid_mid":
            self.mid_norm(site.layer)

    def mid_norm(self, layer: int) -> nn.Module:
        """The norm that reads `resid_mid` of a block; `SiteError` where there is none."""
        if self.no_mid:
            raise SiteError(
                f"got resid_mid.{layer}; the blocks of this {self.family} model {self.no_mid}, so "
                "no such tensor exists: use resid_pre or resid_post"
            )
        name = MID_NORM.get(self.family)
        norm = getattr(self.blocks[layer], name, None) if name else None
        if not isinstance(norm, nn.Module):
            raise SiteError(
                f"got resid_mid.{layer}; where {self.family} models keep it is not known "
                f"(known: {', '.join(sorted(MID_NORM))}): use resid_pre or resid_post"
            )
        return norm


def find_decoder(model: nn.Module) -> Decoder:
    """Locate the decoder blocks by the configuration's layer count; never by guessing names.

    Raises `ModelError` for encoder-decoder models, for configurations without a layer count or
    width, and when no or more than one list of blocks fits.
    """
    config = getattr(model, "config", None)
    if config is None:
        raise ModelError(
            f"got a {type(model).__name__} without a config; wanted a transformers causal LM"
        )
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"got the encoder-decoder {type(model).__name__}; wanted a decoder-only causal LM"
        )
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    n_layers, d_model = (getattr(text, key, None) for key in ("num_hidden_layers", "hidden_size"))
    if not isinstance(n_layers, int) or not isinstance(d_model, int):
        raise ModelError(
            f"got {type(config).__name__} with num_hidden_layers={n_layers!r} and "
            f"hidden_size={d_model!r}; wanted both as whole numbers"
        )
    path = _block_list(model, n_layers)
    owner = model.get_submodule(path.rpartition(".")[0])
    return Decoder(
        root=model,
        owner=owner,
        blocks=tuple(model.get_submodule(path).children()),
        path=path,
        d_model=d_model,
        family=str(getattr(text, "model_type", type(model).__name__)),
        no_mid=_no_mid(text),
    )


def _block_list(model: nn.Module, n_layers: int) -> str:
    """The shallowest ModuleList of `n_layers` equal blocks outside vision and audio towers."""
    found: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or len(module) != n_layers:
            continue
        if any(tower in path for tower in ("vision", "visual", "audio", "encoder.")):
            continue
        if all(isinstance(block, nn.Linear | nn.Embedding) for block in module):
            continue
        found.setdefault(path.count("."), []).append(path)
    candidates = found[min(found)] if found else []
    if len(candidates) != 1:
        seen = ", ".join(candidates) if candidates else "none"
        raise ModelError(
            f"got {type(model).__name__} with block lists of length {n_layers}: {seen}; wanted "
            "exactly one list of decoder blocks (a module that keeps them in an nn.ModuleList)"
        )
    return candidates[0]


def _no_mid(config: Any) -> str:
    """Why the blocks of this configuration have no residual between attention and MLP, or ""."""
    family = getattr(config, "model_type", "")
    parallel = family in {"phi", "gptj", "cohere", "cohere2", "codegen"}
    if family == "gpt_neox":
        parallel = config.use_parallel_residual
    if family == "falcon":
        parallel = config.parallel_attn or config.new_decoder_architecture
    if parallel:
        return "run attention and MLP in parallel"
    if family == "opt" and not config.do_layer_norm_before:
        return "norm the residual itself after attention"
    if family == "bloom" and config.apply_residual_connection_post_layernorm:
        return "carry the residual on from inside the norm"
    return ""


def input_device(hf: Any) -> torch.device:
    """Where token ids go: the embedding's device, also when later blocks live elsewhere."""
    embedding = hf.get_input_embeddings()
    device: torch.device = embedding.weight.device
    if device.type != "meta":
        return device
    # Offloaded weights sit on "meta" until accelerate brings them to the device of the hook.
    hook = getattr(embedding, "_hf_hook", None)
    return torch.device(getattr(hook, "execution_device", None) or "cpu")


def max_length(hf: Any) -> int | None:
    """How many positions a model has, where its configuration says so."""
    return getattr(_text_config(hf), "max_position_embeddings", None)


def length_borders(hf: Any) -> tuple[int, ...]:
    """Lengths beyond which a model turns the positions of a whole batch otherwise (longrope)."""
    text = _text_config(hf)
    held = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    rules = [one for one in (held, *held.values()) if isinstance(one, Mapping)]
    found = {
        one.get("original_max_position_embeddings")
        or getattr(text, "original_max_position_embeddings", None)
        for one in rules
        if one.get("rope_type", one.get("type")) == "longrope"
    }
    return tuple(sorted(border for border in found if border is not None))


def _text_config(hf: Any) -> Any:
    config = hf.config
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def require_embedded(hf: Any, token_ids: Sequence[Sequence[int]]) -> None:
    """`ChatError` for a token that the model has no embedding of."""
    size = len(hf.get_input_embeddings().weight)
    for index, ids in enumerate(token_ids):
        if max(ids) >= size:
            raise ChatError(
                f"chat {index}: got token id {max(ids)}; this model embeds {size} tokens: use the "
                "tokenizer that belongs to it"
            )


def is_sharded(model: nn.Module) -> bool:
    """Whether processes hold a part of the weights each: a forward then takes all of them."""
    # By name, because asking torch for these classes loads all of its distributed training.
    kinds = {base.__name__ for module in model.modules() for base in type(module).__mro__}
    return not kinds.isdisjoint(("FSDPModule", "FullyShardedDataParallel"))
