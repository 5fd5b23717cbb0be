"""Gradients of the ops of `ops_joint`, each written out.

A joint step `h' = h + (clip(s) - s) Ĝ⁻¹ v` with `s = h vᵀ` is linear wherever no score crosses its
bound: the only thing its backward needs of the forward is which scores were outside.
"""

from typing import Any

import torch
from torch import Tensor

from pvcore_kernels import routes
from pvcore_kernels.gradients import sum_by_request
from pvcore_kernels.reference import accumulator, precise

Context = Any


def keep_layers(ctx: Context, inputs: tuple[Any, ...], output: Tensor) -> None:
    hs, v = inputs
    ctx.save_for_backward(v, *hs)


def layers(ctx: Context, gs: Tensor) -> tuple[list[Tensor], Tensor | None]:
    v, *hs = ctx.saved_tensors
    gv = None
    with precise(v.device):
        wide = torch.bmm(gs, v.to(gs.dtype))
        if ctx.needs_input_grad[1]:
            gv = torch.bmm(gs.mT, torch.stack(hs).to(gs.dtype)).to(v.dtype)
    return [one.to(h.dtype) for one, h in zip(wide.unbind(0), hs, strict=True)], gv


def keep_intervene(ctx: Context, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs)


def intervene(ctx: Context, g: Tensor, gs: Tensor) -> tuple[Tensor | None, ...]:
    with precise(g.device):
        return _intervene(ctx, g, gs)


def _intervene(ctx: Context, g: Tensor, gs: Tensor) -> tuple[Tensor | None, ...]:
    h, v, low, high, row, inverse = ctx.saved_tensors
    ops, wide = routes.ops(), accumulator(h.dtype)  # those of `ops` may not be registered yet
    active = ((row >= 0) & (row < low.shape[0]))[:, None]
    floor, ceiling = (_of_rows(bounds, row, wide) for bounds in (low, high))
    scores = ops.project(h, v)
    # Chosen and not multiplied: 0 times the NaN of a row that rests would reach every request.
    g_move = torch.where(active, ops.project(g, v), 0.0)
    g_change = g_move @ inverse.to(wide).mT
    below, above = scores < floor, scores > ceiling
    # A score already where both bounds send it is held there too.
    held = below | above | (floor == ceiling)
    g_scores = torch.where(held, gs - g_change, gs)
    gh = ops.steer_project_tokens(g, v, g_scores)[0]
    _, wants_v, wants_low, wants_high, _, wants_inverse = ctx.needs_input_grad
    change = torch.where(below, floor - scores, torch.where(above, ceiling - scores, 0.0))
    gv = g_inverse = None
    if wants_v:
        move = change @ inverse.to(wide)
        given = torch.where(active, g.to(wide), 0.0)
        gv = (move.mT @ given + g_scores.mT @ h.to(wide)).to(v.dtype)
    if wants_inverse:
        g_inverse = (change.mT @ g_move).to(inverse.dtype)
    g_low = sum_by_request(torch.where(below, g_change, 0.0), row, low) if wants_low else None
    g_high = sum_by_request(torch.where(above, g_change, 0.0), row, high) if wants_high else None
    return gh, gv, g_low, g_high, None, g_inverse


def _of_rows(bounds: Tensor, row: Tensor, wide: torch.dtype) -> Tensor:
    """The bounds of each row's request; NaN, which no score passes, for a row without one."""
    n_requests, n_vec = bounds.shape
    none = bounds.new_full((1, n_vec), torch.nan)
    request = torch.where((row >= 0) & (row < n_requests), row, n_requests).long()
    return torch.cat([bounds, none]).to(wide).index_select(0, request)


def keep_norm(ctx: Context, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, residual, weight, ctx.eps, delta, row, v, ctx.offset = inputs
    ctx.save_for_backward(x, residual, weight, delta, row, v, output[1])


def norm(ctx: Context, gy: Tensor, g: Tensor, gs: Tensor) -> tuple[Any, ...]:
    with precise(g.device):
        return _norm(ctx, gy, g, gs)


def _norm(ctx: Context, gy: Tensor, g: Tensor, gs: Tensor) -> tuple[Any, ...]:
    x, residual, weight, delta, row, v, moved = ctx.saved_tensors
    wide = accumulator(x.dtype)
    rows, given = moved.to(wide), gy.to(wide)
    scale = torch.rsqrt(rows.square().mean(-1, keepdim=True) + ctx.eps)
    scaled = rows * scale
    through = given * (1 + weight.to(wide) if ctx.offset else weight.to(wide))
    g_moved = g.to(wide) + scale * (through - scaled * (through * scaled).mean(-1, keepdim=True))
    g_total = (g_moved + gs.to(wide) @ v.to(wide)).to(x.dtype)
    wants = ctx.needs_input_grad
    g_weight = (given * scaled).sum(0).to(weight.dtype) if wants[2] else None
    g_delta = sum_by_request(g_moved, row, delta) if wants[4] else None
    gv = (gs.to(wide).mT @ (x + residual).to(wide)).to(v.dtype) if wants[6] else None
    return g_total, g_total, g_weight, None, g_delta, None, gv, None
