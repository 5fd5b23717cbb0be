"""A program that is one joint step of all its vectors, prepared for the op that does it at once."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pvcore_kernels import paths
from pvcore_kernels.dispatch_joint import MOST_STEP_VECTORS
from pvcore_kernels.reference import AblateStep, Bound, CapStep, Step
from pvcore_kernels.routes import ops


def lands(steps: Sequence[Step], n_vec: int, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether kernels do a program in one launch: a single ungated ablation or cap of few vectors.

    `dtype` is that of the rows, `n_vec` counts the program's vectors, all of which it must move.
    """
    if len(steps) != 1 or not paths.takes_kernels(device, dtype):
        return False
    step = steps[0]
    if not isinstance(step, AblateStep | CapStep) or step.gates:
        return False
    return len(step.index) == n_vec <= MOST_STEP_VECTORS


def interval(step: Step) -> tuple[Bound, Bound]:
    """Where a joint step sends projections; ablation is `[0, 0]`."""
    if isinstance(step, AblateStep):
        return 0.0, 0.0
    assert isinstance(step, CapStep)
    low = -torch.inf if step.low is None else step.low
    return low, torch.inf if step.high is None else step.high


@dataclass(frozen=True, slots=True, kw_only=True)
class Landing:
    """The operands of `intervene` for rows of one shape, made once."""

    units: Float[Tensor, "n_vec d_model"]
    low: Float[Tensor, "batch n_vec"]
    high: Float[Tensor, "batch n_vec"]
    row: Int[Tensor, " rows"]
    gram_inverse: Float[Tensor, "n_vec n_vec"]

    def __call__(self, h: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        moved: Tensor
        moved, _scores = ops().intervene.default(
            h.reshape(-1, h.shape[-1]), self.units, self.low, self.high, self.row, self.gram_inverse
        )
        return moved.view(h.shape)


def landing(
    units: Float[Tensor, "n_vec d_model"],
    step: Step,
    batch: int,
    width: int,
    touched: Bool[Tensor, "#batch #pos 1"] | None,
) -> Landing:
    """One joint step on `batch` rows of `width` tokens, of which `touched` marks those it moves."""
    assert isinstance(step, AblateStep | CapStep)
    n_vec = len(units)
    low, high = (
        torch.as_tensor(bound, dtype=units.dtype, device=units.device)
        .reshape(-1, 1)
        .expand(batch, n_vec)
        .contiguous()
        for bound in interval(step)
    )
    row = torch.arange(batch, dtype=torch.int32, device=units.device)[:, None].expand(-1, width)
    if touched is not None:
        row = torch.where(touched[..., 0], row, -1)
    return Landing(
        units=units[list(step.index)],
        low=low,
        high=high,
        row=row.to(torch.int32).reshape(-1).contiguous(),
        gram_inverse=step.gram_inverse,
    )
