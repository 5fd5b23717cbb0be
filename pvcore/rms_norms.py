"""RMSNorms: which of them the fused op stands in for, found out by running them on random rows."""

import copy
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pvcore.errors import ModelError
from pvcore_kernels.layout import ALIGNMENT
from pvcore_kernels.paths import DTYPES
from pvcore_kernels.routes import ops

# transformers' two names of it.
EPSILON = ("variance_epsilon", "eps")
# Rows this small are normed by epsilon alone.
SCALES = (1e-4, 1e-2, 1.0, 1e2)
ROWS_EACH = 8
# Beside float64: a few roundings of float32. Of 16 bits: where the sums' order tips a rounding; the
# other way of rounding differs in a fifth of all elements.
FLOAT32_BOUND, TIPPED = 1e-6, 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class RmsNorm:
    """A norm with the op's arithmetic. `offset`: Gemma's, which multiplies by one plus the weight.

    Weight and epsilon are looked up at every call, as the norm itself does.
    """

    module: nn.Module
    epsilon: str
    offset: bool

    @property
    def eps(self) -> float:
        eps: float = getattr(self.module, self.epsilon)
        return eps

    @property
    def weight(self) -> Tensor:
        weight: Tensor = self.module.weight  # type: ignore[assignment]
        return weight


def as_rms_norm(module: nn.Module, path: str) -> RmsNorm:
    """The norm as the op knows it; `ModelError` where it computes anything else.

    Rows of very different lengths tell epsilon and the arithmetic, in a copy in float32 beside
    float64; rows in the norm's own dtype tell where it rounds.
    """
    names = [name for name in EPSILON if isinstance(getattr(module, name, None), float)]
    others = dict(module.named_parameters())
    weight = others.pop("weight", None)
    if not names or others or type(weight) is not nn.Parameter or weight.ndim != 1:
        raise _refused(module, path, "has not one plain weight and an epsilon")
    if weight.is_meta or weight.dtype not in DTYPES or weight.numel() % ALIGNMENT:
        got = f"{weight.numel()} of {weight.dtype} on {weight.device}"
        raise _refused(module, path, f"has a weight of {got}, which no kernel takes")
    for offset in (False, True):
        norm = RmsNorm(module=module, epsilon=names[0], offset=offset)
        if _computes(norm) and _rounds(norm):
            return norm
    raise _refused(module, path, "computes, or rounds, other than transformers' RMSNorms do")


def _refused(module: nn.Module, path: str, why: str) -> ModelError:
    return ModelError(
        f"got {path}, a {type(module).__name__} that {why}; wanted the RMSNorm of llama, qwen or "
        "gemma: run the model without fused_norms"
    )


def _rows(norm: RmsNorm) -> Float[Tensor, "rows d_model"]:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(ROWS_EACH, len(norm.weight), generator=generator)
    return torch.cat([scale * rows for scale in SCALES]).to(norm.weight.device)


@torch.no_grad()
def _computes(norm: RmsNorm) -> bool:
    """Whether a float32 copy gives what the formula gives in float64."""
    rows = _rows(norm)
    wide, weight = rows.double(), norm.weight.float().double()
    scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + norm.eps)
    wanted = scaled * (1 + weight if norm.offset else weight)
    got = copy.deepcopy(norm.module).float()(rows)
    return _like(got, rows) and _within(got, wanted)


@torch.no_grad()
def _rounds(norm: RmsNorm) -> bool:
    """Whether the op, run as it will be run, gives what the norm gives in its own dtype."""
    rows = _rows(norm).to(norm.weight.dtype)
    got = norm.module(rows)
    idle = torch.full((len(rows),), -1, dtype=torch.int32, device=rows.device)
    made: Tensor = ops().add_rmsnorm_steer_project.default(
        rows, torch.zeros_like(rows), norm.weight, norm.eps, rows[:1], idle, rows[:0], norm.offset
    )[0]
    if not _like(got, rows):
        return False
    if rows.dtype == torch.float32:
        return _within(made, got.double())
    return float((made != got).float().mean()) <= TIPPED


def _like(got: object, rows: Tensor) -> bool:
    return isinstance(got, Tensor) and (got.shape, got.dtype) == (rows.shape, rows.dtype)


def _within(got: Tensor, wanted: Float[Tensor, "rows d_model"]) -> bool:
    return bool(((got.double() - wanted).abs() <= FLOAT32_BOUND * wanted.abs()).all())
