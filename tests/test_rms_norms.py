"""RMSNorms are known by what they compute and where they round, not by their names."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pvcore.errors import ModelError
from pvcore.rms_norms import as_rms_norm
from tests.families import D_MODEL, build

SIXTEEN = (torch.float16, torch.bfloat16)
DTYPES = (*SIXTEEN, torch.float32)


class Norm(nn.Module):
    """RMSNorm in float32, with each thing that may differ."""

    def __init__(
        self,
        dtype: torch.dtype = torch.float32,
        *,
        width: int = D_MODEL,
        says: Any = 1e-6,
        uses: float = 1e-6,
        offset: bool = False,
        late: bool = False,
        power: float = 2.0,
    ) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.weight = nn.Parameter((1 + torch.randn(width, generator=generator)).to(dtype))
        self.eps, self.uses, self.offset, self.late, self.power = says, uses, offset, late, power

    def forward(self, x: Tensor) -> Tensor:
        mean = x.float().abs().pow(self.power).mean(-1, keepdim=True)
        scaled = x.float() * (mean + self.uses).pow(-1 / self.power)
        if self.late:
            return (scaled * (self.weight.float() + self.offset)).to(x.dtype)
        return (self.weight + self.offset) * scaled.to(x.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "mistral", "phi3", "mixtral"])
def test_llamas_norm_casts_before_the_weight(name: str, dtype: torch.dtype) -> None:
    norm = as_rms_norm(build(name, dtype=dtype).model.norm, "model.norm")
    assert (norm.offset, norm.eps) == (False, norm.module.variance_epsilon)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["gemma", "gemma2", "gemma3"])
def test_gemmas_norm_multiplies_by_one_plus_the_weight(name: str, dtype: torch.dtype) -> None:
    norm = as_rms_norm(build(name, dtype=dtype).model.norm, "model.norm")
    assert (norm.offset, norm.eps) == (True, norm.module.eps)


@pytest.mark.parametrize("dtype", SIXTEEN)
def test_where_sixteen_bits_are_rounded_is_told_apart(dtype: torch.dtype) -> None:
    assert not as_rms_norm(Norm(dtype), "norm").offset
    assert as_rms_norm(Norm(dtype, offset=True, late=True), "norm").offset
    for other in (Norm(dtype, late=True), Norm(dtype, offset=True)):
        with pytest.raises(ModelError, match="got norm, a Norm that computes, or rounds, other"):
            as_rms_norm(other, "norm")


def test_in_float32_there_is_one_way_to_round() -> None:
    assert not as_rms_norm(Norm(late=True), "norm").offset
    assert as_rms_norm(Norm(offset=True), "norm").offset
    assert not as_rms_norm(nn.RMSNorm(D_MODEL, eps=1e-6), "norm").offset


OTHERS: dict[str, tuple[nn.Module, str]] = {
    "a larger epsilon": (Norm(uses=1.1e-6), "computes"),
    "no epsilon": (Norm(uses=0.0), "computes"),
    "another mean": (Norm(power=3.0), "computes"),
    "an epsilon of no number": (Norm(says=None), "has not one plain weight and an epsilon"),
    "LayerNorm": (nn.LayerNorm(D_MODEL), "a LayerNorm that has not one plain weight"),
    "no weight": (nn.RMSNorm(D_MODEL, eps=1e-6, elementwise_affine=False), "has not one plain"),
    "a wide dtype": (Norm(torch.float64), "64 of torch.float64"),
    "an odd width": (Norm(width=40), "a weight of 40 of torch.float32 on cpu, which no kernel"),
    "no memory": (Norm().to("meta"), "on meta, which no kernel takes"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_anything_else_is_refused(kind: str) -> None:
    module, words = OTHERS[kind]
    with pytest.raises(ModelError, match=words):
        as_rms_norm(module, "norm")
