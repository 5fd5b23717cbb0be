"""Gradients of the ops. The adds are self-adjoint: the backward of a pass is the same pass.

For `h' = h + c v, s = h vᵀ` and incoming `(g', gs)`: `gh = g' + gs v` and `gc = g' vᵀ`, which is
`steer_project_tokens(g', v, gs)`. Only the vectors, which are mostly frozen, need products of
their own, and those of `delta` are sums over the rows of a request.
"""

from typing import Any

import torch
from torch import Tensor

from pvcore_kernels.reference import accumulator, precise
from pvcore_kernels.rows import listed

Context = Any


def _ops() -> Any:
    return torch.ops.pvcore


def _vectors(gs: Tensor, h: Tensor, v: Tensor) -> Tensor:
    wide = accumulator(h.dtype)
    with precise(h.device):
        return (gs.to(wide).mT @ h.to(wide)).to(v.dtype)


def sum_by_request(moved: Tensor, row: Tensor, delta: Tensor) -> Tensor:
    """Sums of the rows of each request, shaped as `delta`; nothing syncs.

    Rows without a request are summed into one more row, which is dropped.
    """
    n_requests = delta.shape[0]
    wide = accumulator(moved.dtype)
    request = torch.where((row >= 0) & (row < n_requests), row, n_requests).long()
    total = moved.new_zeros(n_requests + 1, moved.shape[1], dtype=wide)
    return total.index_add(0, request, moved.to(wide))[:n_requests].to(delta.dtype)


def keep_project(ctx: Context, inputs: tuple[Any, ...], output: Tensor) -> None:
    h, v, rows = inputs
    ctx.save_for_backward(h, v, rows)


def project(ctx: Context, gs: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    h, v, rows = ctx.saved_tensors
    gh = gv = None
    if ctx.needs_input_grad[0]:
        wide = accumulator(h.dtype)
        with precise(h.device):
            gh = gs.to(wide) @ v.to(wide)
        if rows is not None:
            gh = sum_by_request(gh, rows, h)
        gh = gh.to(h.dtype)
    if ctx.needs_input_grad[1]:
        gv = _vectors(gs, h if rows is None else listed(h, rows, outside=0.0), v)
    return gh, gv, None


def keep_segment_mean(ctx: Context, inputs: tuple[Any, ...], output: Tensor) -> None:
    h, cu_seqlens = inputs
    ctx.rows, ctx.dtype = h.shape[0], h.dtype
    ctx.save_for_backward(cu_seqlens)


def segment_mean(ctx: Context, g: Tensor) -> tuple[Tensor, None]:
    (bounds,) = ctx.saved_tensors
    if g.shape[0] == 0:
        return g.new_zeros(ctx.rows, g.shape[1], dtype=ctx.dtype), None
    lengths = (bounds[1:] - bounds[:-1]).to(g.dtype)
    place = torch.arange(ctx.rows, device=g.device, dtype=bounds.dtype)
    segment = torch.bucketize(place, bounds, right=True) - 1
    inside = (segment >= 0) & (segment < g.shape[0])
    shares = (g / lengths[:, None]).index_select(0, segment.clamp(0, g.shape[0] - 1))
    return torch.where(inside[:, None], shares, 0).to(ctx.dtype), None


def keep_steer(ctx: Context, inputs: tuple[Any, ...], output: Tensor) -> None:
    _h, delta, row = inputs
    ctx.save_for_backward(delta, row)


def steer(ctx: Context, g: Tensor) -> tuple[Tensor, Tensor | None, None]:
    delta, row = ctx.saved_tensors
    return g, sum_by_request(g, row, delta) if ctx.needs_input_grad[1] else None, None


def keep_steer_project(ctx: Context, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs)
    ctx.set_materialize_grads(False)


def steer_project(
    ctx: Context, g: Tensor | None, gs: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
    h, v, delta, row = ctx.saved_tensors
    gh, gv, gdelta = g, None, None
    if gs is not None and ctx.needs_input_grad[0]:
        start = torch.zeros_like(h) if g is None else g
        gh = _ops().steer_project_tokens(start, v, gs)[0]
    if gs is not None and ctx.needs_input_grad[1]:
        gv = _vectors(gs, h, v)
    if g is not None and ctx.needs_input_grad[2]:
        gdelta = sum_by_request(g, row, delta)
    return gh, gv, gdelta, None


def keep_tokens(ctx: Context, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs)
    ctx.set_materialize_grads(False)


def tokens(
    ctx: Context, g: Tensor | None, gs: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    h, v, c = ctx.saved_tensors
    gh, gv, gc = g, None, None
    if g is not None and gs is not None:
        gh, gc = _ops().steer_project_tokens(g, v, gs)
    elif gs is not None:
        gh = _ops().steer_project_tokens(torch.zeros_like(h), v, gs)[0]
    elif g is not None:
        gc = _ops().project(g, v)
    if ctx.needs_input_grad[1]:
        parts = [_vectors(gs, h, v)] if gs is not None else []
        parts += [_vectors(c, g, v)] if g is not None else []
        gv = sum(parts[1:], parts[0]) if parts else None
    return gh, gv, None if gc is None else gc.to(c.dtype)
