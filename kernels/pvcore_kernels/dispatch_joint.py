"""Where the ops of `ops_joint` go: plain torch, Triton, or torch and a Triton add."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int, Int64
from torch import Tensor

from pvcore_kernels import dispatch, joint
from pvcore_kernels.layout import aligned_stack, require_aligned
from pvcore_kernels.paths import path
from pvcore_kernels.reference import exact, precise

# Wider banks spill registers in the fused step, and in the norm their sums would be all it does.
MOST_STEP_VECTORS, MOST_NORM_VECTORS = 32, 8
# Rows are held whole in registers.
WIDEST_NORM = 16384


def project_layers_into(
    out: Float[Tensor, "layer t k"],
    hs: Sequence[Float[Tensor, "t d_model"]],
    v: Float[Tensor, "layer k d_model"],
) -> None:
    if path(v.device, hs[0].dtype, 0) == "reference":
        torch.bmm(torch.stack(list(hs)).to(out.dtype), v.to(out.dtype).mT, out=out)
        return
    from pvcore_kernels.tiled.layers import project_layers

    if not out.is_contiguous():
        raise ValueError(f"scores have strides {out.stride()}; a kernel writes them contiguous.")
    project_layers(hs, aligned_stack(v), out)


def project_stack_into(
    out: Float[Tensor, "*slot layer t k"],
    hs: Float[Tensor, "layer t d_model"],
    v: Float[Tensor, "layer k d_model"],
    step: Int64[Tensor, ""] | None,
) -> None:
    if path(hs.device, hs.dtype, 0) != "reference":
        from pvcore_kernels.tiled.layers import project_stack

        project_stack(aligned_stack(hs), aligned_stack(v), out, step)
    elif step is None:
        torch.bmm(hs.to(out.dtype), v.to(out.dtype).mT, out=out)
    else:
        with exact(hs.device):
            scores = torch.bmm(hs.to(out.dtype), v.to(out.dtype).mT)
        out.index_copy_(0, (step % out.shape[0]).reshape(1), scores[None])


def intervene(
    out: Float[Tensor, "t d_model"],
    scores: Float[Tensor, "t k"],
    h: Float[Tensor, "t d_model"],
    v: Float[Tensor, "k d_model"],
    low: Float[Tensor, "b k"],
    high: Float[Tensor, "b k"],
    row: Int[Tensor, " t"],
    gram_inverse: Float[Tensor, "k k"],
) -> Float[Tensor, "t d_model"]:
    """Like `intervene_into`, into `out` or, where that is not aligned, a tensor of its own."""
    target = out if path(h.device, h.dtype, 0) == "reference" else dispatch.moved_like(h)
    intervene_into(target, scores, h, v, low, high, row, gram_inverse)
    return target.contiguous()


def intervene_into(
    out: Float[Tensor, "t d_model"],
    scores: Float[Tensor, "t k"],
    h: Float[Tensor, "t d_model"],
    v: Float[Tensor, "k d_model"],
    low: Float[Tensor, "b k"],
    high: Float[Tensor, "b k"],
    row: Int[Tensor, " t"],
    gram_inverse: Float[Tensor, "k k"],
) -> None:
    """One launch for a few vectors; for many, their scores, the program on them, and an add."""
    if path(h.device, h.dtype, 0) == "reference":
        scores.copy_(joint.intervene_into(out, h, v, low, high, row, gram_inverse))
    elif len(v) > MOST_STEP_VECTORS:
        dispatch.project_into(scores, h, v, None)
        with precise(h.device):
            move = joint.change_within(scores, low, high, row) @ gram_inverse.to(scores.dtype)
        dispatch.steer_project_tokens_into(out, torch.empty_like(scores), h, v, move)
    else:
        from pvcore_kernels.tiled.intervene import intervene

        require_aligned(out, "h")
        if len(v) == 0:
            out.copy_(h)
        intervene(h, v, low, high, row, gram_inverse, out, scores)


def norm_into(
    y: Float[Tensor, "t d_model"],
    out: Float[Tensor, "t d_model"],
    scores: Float[Tensor, "t k"],
    x: Float[Tensor, "t d_model"],
    residual: Float[Tensor, "t d_model"],
    weight: Float[Tensor, " d_model"],
    eps: float,
    delta: Float[Tensor, "b d_model"],
    row: Int[Tensor, " t"],
    v: Float[Tensor, "k d_model"],
    offset: bool,
) -> None:
    """One launch with a few vectors; many are scored by a product over the sum of their own."""
    if path(x.device, x.dtype, 0) == "reference" or x.shape[1] > WIDEST_NORM:
        made = joint.add_rmsnorm_steer_project(x, residual, weight, eps, delta, row, v, offset)
        for target, value in zip((y, out, scores), made, strict=True):
            target.copy_(value)
        return
    from pvcore_kernels.tiled.norm import add_rmsnorm_steer_project

    require_aligned(out, "residual")
    require_aligned(y, "y")
    if len(v) > MOST_NORM_VECTORS:
        dispatch.project_into(scores, x + residual, v, None)
        v, scores = v[:0], scores[:, :0]
    add_rmsnorm_steer_project(x, residual, weight, eps, delta, row, v, offset, y, out, scores)
