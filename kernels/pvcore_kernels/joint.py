"""Steps of several layers or vectors together, in plain torch: twins of their kernels."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pvcore_kernels.reference import accumulator, exact
from pvcore_kernels.rows import extremes, project, steer, steer_project_tokens_into


def project_layers(
    hs: Sequence[Float[Tensor, "t d_model"]], v: Float[Tensor, "layer k d_model"]
) -> Float[Tensor, "layer t k"]:
    """Scores of each layer's rows on that layer's own vectors."""
    wide = accumulator(hs[0].dtype)
    with exact(v.device):
        return torch.bmm(torch.stack(list(hs)).to(wide), v.to(wide).mT)


def change_within(
    scores: Float[Tensor, "t k"],
    low: Float[Tensor, "b k"],
    high: Float[Tensor, "b k"],
    row: Int[Tensor, " t"],
) -> Float[Tensor, "t k"]:
    """What takes each score into the interval of its request; 0 for rows without one."""
    if not len(low):
        return torch.zeros_like(scores)
    at = row.clamp(0, len(low) - 1).long()
    within = torch.minimum(torch.maximum(scores, low.to(scores)[at]), high.to(scores)[at])
    active = (row >= 0) & (row < len(low))
    return torch.where(active[:, None], within - scores, torch.zeros_like(scores))


def intervene_into(
    out: Float[Tensor, "t d_model"],
    h: Float[Tensor, "t d_model"],
    v: Float[Tensor, "k d_model"],
    low: Float[Tensor, "b k"],
    high: Float[Tensor, "b k"],
    row: Int[Tensor, " t"],
    gram_inverse: Float[Tensor, "k k"],
) -> Float[Tensor, "t k"]:
    """One joint step: every score sent into its interval, the others of the step held.

    `[0, 0]` ablates and `[-inf, c]` caps at `c`. `out` may be `h`; a row that nothing moves keeps
    every bit. Gives the scores before the step.
    """
    _low, last = extremes(row, len(row))
    if last >= len(low):
        raise IndexError(f"A row asks for request {last} of {len(low)} with bounds.")
    scores = project(h, v)
    with exact(h.device):
        move = change_within(scores, low, high, row) @ gram_inverse.to(scores.dtype)
    moving = (move != 0).any(1).nonzero()[:, 0]
    if out is not h:
        out.copy_(h)
    if len(moving) == len(h):
        steer_project_tokens_into(out, None, h, v, move)
    elif len(moving):
        moved = torch.empty_like(h[moving])
        steer_project_tokens_into(moved, None, h[moving], v, move[moving])
        out[moving] = moved
    return scores


def add_rmsnorm_steer_project(
    x: Float[Tensor, "t d_model"],
    residual: Float[Tensor, "t d_model"],
    weight: Float[Tensor, " d_model"],
    eps: float,
    delta: Float[Tensor, "b d_model"],
    row: Int[Tensor, " t"],
    v: Float[Tensor, "k d_model"],
    offset: bool,
) -> tuple[Float[Tensor, "t d_model"], Float[Tensor, "t d_model"], Float[Tensor, "t k"]]:
    """The normed rows, `h' = x + residual + delta[row]`, and the scores of `x + residual`.

    Rounds as transformers does: the sum in the dtype of the rows, the variance in float32; Llama
    and Qwen cast before they multiply by the weight, Gemma (`offset`) multiplies by `1 + weight`
    in float32 and casts last.
    """
    wide = accumulator(x.dtype)
    total = x + residual
    moved = steer(total, delta, row)
    rows = moved.to(wide)
    scaled = rows * torch.rsqrt(rows.square().mean(-1, keepdim=True) + eps)
    y = (scaled * (1 + weight.to(wide))).to(x.dtype) if offset else weight * scaled.to(x.dtype)
    return y, moved, project(total, v)
