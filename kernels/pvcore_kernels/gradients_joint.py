"""Gradients of the ops of `ops_joint`, each written out.

A joint step `h' = h + (clip(s) - s) Ĝ⁻¹ v` with `s = h vᵀ` is linear wherever no score crosses its
bound: the only thing its backward needs of the forward is which scores were outside.
"""

from typing import Any

import torch
from torch import Tensor

from pvcore_kernels.reference import accumulator

Context = Any


def keep_layers(ctx: Context, inputs: tuple[Any, ...], output: Tensor) -> None:
    hs, v = inputs
    ctx.save_for_backward(v, *hs)


def layers(ctx: Context, gs: Tensor) -> tuple[list[Tensor], Tensor | None]:
    v, *hs = ctx.saved_tensors
    wide = torch.bmm(gs, v.to(gs.dtype))
    gv = None
    if ctx.needs_input_grad[1]:
        gv = torch.bmm(gs.mT, torch.stack(hs).to(gs.dtype)).to(v.dtype)
    return [one.to(h.dtype) for one, h in zip(wide.unbind(0), hs, strict=True)], gv


def keep_intervene(ctx: Context, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs)


def intervene(ctx: Context, g: Tensor, gs: Tensor) -> tuple[Tensor | None, ...]:
    h, v, low, high, row, inverse = ctx.saved_tensors
    ops, wide = torch.ops.pvcore, accumulator(h.dtype)
    scores, g_move = ops.project(h, v), ops.project(g, v)
    at = row.clamp(0, max(low.shape[0] - 1, 0)).long()
    active = ((row >= 0) & (row < low.shape[0]))[:, None]
    below = active & (scores < low.to(wide)[at])
    above = active & (scores > high.to(wide)[at])
    g_change = g_move @ inverse.to(wide).mT
    g_scores = gs - g_change * (below | above)
    gh = ops.steer_project_tokens(g, v, g_scores)[0]
    _, wants_v, wants_low, wants_high, _, wants_inverse = ctx.needs_input_grad
    change = torch.where(below, low.to(wide)[at] - scores, 0.0)
    change = torch.where(above, high.to(wide)[at] - scores, change)
    gv = g_inverse = None
    if wants_v:
        move = change @ inverse.to(wide)
        gv = (move.mT @ g.to(wide) + g_scores.mT @ h.to(wide)).to(v.dtype)
    if wants_inverse:
        g_inverse = (change.mT @ g_move).to(inverse.dtype)
    g_low = _by_request(g_change * below, at, low) if wants_low else None
    g_high = _by_request(g_change * above, at, high) if wants_high else None
    return gh, gv, g_low, g_high, None, g_inverse


def _by_request(gradient: Tensor, at: Tensor, bounds: Tensor) -> Tensor:
    total = torch.zeros(bounds.shape, dtype=gradient.dtype, device=gradient.device)
    return total.index_add(0, at, gradient).to(bounds.dtype)


def keep_norm(ctx: Context, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, residual, weight, ctx.eps, delta, row, v, ctx.offset = inputs
    ctx.save_for_backward(x, residual, weight, delta, row, v, output[1])


def norm(ctx: Context, gy: Tensor, g: Tensor, gs: Tensor) -> tuple[Any, ...]:
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
    g_delta = None
    if wants[4]:
        active = (row >= 0) & (row < delta.shape[0])
        at = row.clamp(0, max(delta.shape[0] - 1, 0)).long()
        g_delta = _by_request(g_moved * active[:, None], at, delta)
    gv = (gs.to(wide).mT @ (x + residual).to(wide)).to(v.dtype) if wants[6] else None
    return g_total, g_total, g_weight, None, g_delta, None, gv, None
