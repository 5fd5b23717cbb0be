"""What the engine calls: the reference, or the kernels where `paths.takes_kernels` says so.

Only monitors and readings come this way, whose rows want no gradients. Ops are registered by the
first call that needs one.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from pvcore_kernels import paths, reference


def ops() -> Any:
    """`torch.ops.pvcore`, registered."""
    from pvcore_kernels import ops as _registering  # noqa: F401

    return torch.ops.pvcore


def project(
    h: Float[Tensor, "*rows d_model"], units: Float[Tensor, "n_vec d_model"]
) -> Float[Tensor, "*rows n_vec"]:
    """Scores `<h, u_k>` in the units of the residual."""
    if h.requires_grad or not paths.takes_kernels(h.device, h.dtype):
        return reference.project(h, units)
    scores: Tensor = ops().project.default(h.reshape(-1, h.shape[-1]), units)
    return scores.view(*h.shape[:-1], len(units)) if h.ndim != 2 else scores


def project_layers(
    rows: Float[Tensor, "site rows d_model"], units: Float[Tensor, "site n_vec d_model"]
) -> Float[Tensor, "site rows n_vec"]:
    """Scores of one set of rows per site against that site's own unit vectors, in one launch."""
    if rows.requires_grad or not paths.takes_kernels(rows.device, rows.dtype):
        return reference.project_layers(rows, units)
    scores = units.new_empty(rows.shape[0], rows.shape[1], units.shape[1])
    ops().project_stack_out.default(rows, units, scores)
    return scores


def segment_mean(
    h: Float[Tensor, "batch pos d_model"], starts: Sequence[int], ends: Sequence[int]
) -> Float[Tensor, "batch d_model"]:
    """Mean of `h[b, starts[b]:ends[b]]` for every row `b`: kernels add tiles of rows in float32."""
    if h.requires_grad or not paths.takes_kernels(h.device, h.dtype):
        return reference.segment_mean(h, starts, ends)
    width, bounds = h.shape[1], list[int]()
    for row, (start, end) in enumerate(zip(starts, ends, strict=True)):
        bounds += [row * width + start, row * width + end]
    cuts = torch.tensor(bounds, dtype=torch.int32, pin_memory=h.is_cuda)
    cuts = cuts.to(h.device, non_blocking=True)
    means: Tensor = ops().segment_mean.default(h.reshape(-1, h.shape[-1]), cuts)
    return means[::2]
