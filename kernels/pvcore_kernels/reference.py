"""Projection space in plain torch: the specification of every kernel, and the CPU path.

For a row `h`, raw vectors `v_k` and their unit rows `u_k = v_k/|v_k|`:
scores `s = h Uᵀ`, a program turns them into coefficients `b` of the unit rows, and the only write
is `h' = h + b U`. What a later step sees is `s + b G` with the Gram matrix `G = U Uᵀ`, so `h` is
read once. Arithmetic is float32, or float64 for float64 rows, and `h'` is rounded once.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import no_type_check

import torch
from jaxtyping import Float
from torch import Tensor

Bound = Float[Tensor, "*#rows 1"] | float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """Opens a step on the rows whose projection on the vector at `index` passes `bound`.

    The projection is the one the step finds. `sign` is 1 where it has to lie above the bound, -1
    where below. Gradients take the rows that pass as given.
    """

    index: int
    sign: float
    bound: Float[Tensor, "*#rows 1"] | float


@dataclass(frozen=True, slots=True, kw_only=True)
class AddStep:
    """Add `shift` to the coefficients of the unit rows.

    `shift` broadcasts to `[..., n_vec]`: the coefficient of each raw vector times its norm.
    """

    shift: Float[Tensor, "*#rows n_vec"]
    mask: Float[Tensor, "*#rows 1"] | None = None
    gates: tuple[Gate, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class AblateStep:
    """Send the projections of the vectors at `index` to zero, jointly."""

    index: tuple[int, ...]
    gram_inverse: Float[Tensor, "n_step n_step"]
    mask: Float[Tensor, "*#rows 1"] | None = None
    gates: tuple[Gate, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class CapStep:
    """Clip the projections of the vectors at `index` into `[low, high]`, jointly."""

    index: tuple[int, ...]
    gram_inverse: Float[Tensor, "n_step n_step"]
    low: Bound = None
    high: Bound = None
    mask: Float[Tensor, "*#rows 1"] | None = None
    gates: tuple[Gate, ...] = ()


Step = AddStep | AblateStep | CapStep


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype sums are made in: float64 for float64 rows, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


_EXACT = nullcontext()


@no_type_check  # traced by compilers, which a run-time type checker would stop
def exact(device: torch.device) -> AbstractContextManager[object]:
    """Products in the dtype of their operands: autocast would round them to sixteen bits."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return _EXACT
    return torch.autocast(device.type, enabled=False)


# Before torch 2.9 there was one flag; it may not be read once the newer one was set.
_TF32 = torch.backends.cuda.matmul
_FLAG, _ALLOWED, _FORBIDDEN = (
    ("fp32_precision", "tf32", "ieee")
    if hasattr(_TF32, "fp32_precision")
    else ("allow_tf32", True, False)
)


@no_type_check
def precise(device: torch.device) -> AbstractContextManager[object]:
    """Like `exact`, and without the TF32 that a process may allow its products on CUDA."""
    if device.type != "cuda" or getattr(_TF32, _FLAG) != _ALLOWED:
        return exact(device)
    return _without_tf32(device)


@no_type_check
@contextmanager
def _without_tf32(device: torch.device) -> Iterator[None]:
    setattr(_TF32, _FLAG, _FORBIDDEN)
    try:
        with exact(device):
            yield
    finally:
        if _FLAG == "fp32_precision":
            setattr(_TF32, _FLAG, "none")  # it may have been inherited, and then goes on to be
        if getattr(_TF32, _FLAG) != _ALLOWED:
            setattr(_TF32, _FLAG, _ALLOWED)


def project(
    h: Float[Tensor, "*rows d_model"], units: Float[Tensor, "n_vec d_model"]
) -> Float[Tensor, "*rows n_vec"]:
    """Scores `<h, u_k>` in the units of the residual."""
    with precise(h.device):
        return h.to(units.dtype) @ units.mT


def project_layers(
    rows: Float[Tensor, "site rows d_model"], units: Float[Tensor, "site n_vec d_model"]
) -> Float[Tensor, "site rows n_vec"]:
    """Scores of one set of rows per site against that site's own unit vectors."""
    with precise(rows.device):
        return torch.bmm(rows.to(units.dtype), units.mT)


def segment_mean(
    h: Float[Tensor, "batch pos d_model"], starts: Sequence[int], ends: Sequence[int]
) -> Float[Tensor, "batch d_model"]:
    """Mean of `h[b, starts[b]:ends[b]]` for every row `b`, summed in float64."""
    sums = [
        h[b, s:e].sum(0, dtype=torch.float64)
        for b, (s, e) in enumerate(zip(starts, ends, strict=True))
    ]
    counts = torch.tensor([e - s for s, e in zip(starts, ends, strict=True)], dtype=torch.float64)
    return torch.stack(sums) / counts.to(h.device)[:, None]


def add(
    h: Float[Tensor, "*rows d_model"],
    delta: Float[Tensor, "*#rows d_model"],
    mask: Tensor | None = None,
) -> Float[Tensor, "*rows d_model"]:
    """`h + delta`, rounded once to `h`'s dtype; rows where `mask` is False stay bit-identical."""
    moved = (h + delta).to(h.dtype)
    return moved if mask is None else torch.where(mask, moved, h)


def joint_inverse(
    units: Float[Tensor, "n_step d_model"],
) -> tuple[Float[Tensor, "n_step n_step"], float]:
    """Inverse of the Gram matrix of unit rows, and its condition number, both from float64."""
    gram = units.double() @ units.double().mT
    condition = float(torch.linalg.cond(gram))
    if not condition < 1 / torch.finfo(torch.float64).eps:
        return torch.full_like(gram, torch.nan), float("inf")
    # In rows: sums over a matrix that lies in columns are made in another order.
    return torch.linalg.inv(gram).contiguous(), condition


def _wanted_change(step: AblateStep | CapStep, now: Tensor) -> Tensor:
    if isinstance(step, AblateStep):
        return -now
    clipped = now
    if step.low is not None:
        low = torch.as_tensor(step.low, dtype=now.dtype, device=now.device)
        clipped = torch.maximum(clipped, low)
    if step.high is not None:
        high = torch.as_tensor(step.high, dtype=now.dtype, device=now.device)
        clipped = torch.minimum(clipped, high)
    return clipped - now


def coefficients(
    scores: Float[Tensor, "*rows n_vec"], gram: Float[Tensor, "n_vec n_vec"], steps: Sequence[Step]
) -> Float[Tensor, "*rows n_vec"]:
    """Run the program: the coefficient of every unit row after all steps, in order."""
    total = torch.zeros_like(scores)
    for step in steps:
        if isinstance(step, AddStep):
            change = step.shift
        else:
            now = scores + total @ gram
            index = list(step.index)
            joint = _wanted_change(step, now[..., index]) @ step.gram_inverse
            change = torch.zeros_like(scores)
            change[..., index] = joint
        if step.gates:
            change = change * opened(step.gates, scores + total @ gram)
        total = total + (change if step.mask is None else change * step.mask)
    return total


def opened(gates: Sequence[Gate], now: Float[Tensor, "*rows n_vec"]) -> Float[Tensor, "*rows 1"]:
    """1 on the rows that pass every gate, 0 on the others; constant for autograd."""
    passed = torch.ones_like(now[..., :1], dtype=torch.bool)
    for gate in gates:
        bound = torch.as_tensor(gate.bound, dtype=now.dtype, device=now.device)
        passed = passed & (gate.sign * (now[..., gate.index : gate.index + 1] - bound) > 0)
    return passed.to(now.dtype)


def intervene(
    h: Float[Tensor, "*rows d_model"],
    units: Float[Tensor, "n_vec d_model"],
    gram: Float[Tensor, "n_vec n_vec"],
    steps: Sequence[Step],
    mask: Tensor | None = None,
) -> Float[Tensor, "*rows d_model"]:
    """One read of `h`, the program in projection space, one write.

    `mask` marks the rows any step may touch; all others stay bit-identical.
    """
    with precise(h.device):
        moves = coefficients(project(h, units), gram, steps)
        return add(h, moves @ units, mask)
