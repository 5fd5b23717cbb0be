"""Random models of Qwen2's shape, and random persona vectors for them: speed needs no training."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import pvcore as pv

TRAITS = ("evil", "sycophancy", "hallucination", "politeness", "apathy", "humor", "optimism")


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """The size of a model; heads are 64 wide, two query heads share one key head."""

    hidden: int
    layers: int
    vocabulary: int

    def __str__(self) -> str:
        return f"{self.hidden} x {self.layers}, vocabulary {self.vocabulary}"


def random_qwen2(shape: Shape, *, seed: int = 0) -> Any:
    """A float32 Qwen2 with residuals of order one, that never ends a reply by itself."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    hf = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=shape.vocabulary,
            hidden_size=shape.hidden,
            intermediate_size=shape.hidden * 11 // 4,
            num_hidden_layers=shape.layers,
            num_attention_heads=max(shape.hidden // 64, 2),
            num_key_value_heads=max(shape.hidden // 128, 1),
            max_position_embeddings=1024,
            initializer_range=shape.hidden**-0.5,
            pad_token_id=0,
            eos_token_id=None,
            bos_token_id=None,
        )
    )
    return hf.eval()


def twin(hf: nn.Module) -> Any:
    """A copy on the same weights: where memory lies cannot make one of the two faster."""
    return copy.deepcopy(hf, {id(weight): weight for weight in hf.parameters()})


def random_vectors(
    d_model: int, layers: Sequence[int], *, traits: Sequence[str] = TRAITS, seed: int = 0
) -> list[pv.PersonaVector]:
    """One raw vector per trait, of norm about the square root of `d_model` at every layer."""
    generator = torch.Generator().manual_seed(seed)
    sites = [pv.resid_post(layer) for layer in layers]
    return [
        pv.PersonaVector(
            trait=trait,
            sites=sites,
            directions=torch.randn(len(sites), d_model, generator=generator),
        )
        for trait in traits
    ]


def random_prompts(lengths: Sequence[int], vocabulary: int, *, seed: int = 0) -> list[Tensor]:
    """Token ids without the padding id."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, vocabulary, (length,), generator=generator) for length in lengths]
