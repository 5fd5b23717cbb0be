"""The steering add, alone and in one pass with the scores of the rows it reads."""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from pvcore_kernels.launch import launch, width_class
from pvcore_kernels.layout import aligned, block_d, block_k, on_device
from pvcore_kernels.tiled.project import add_scores, load_tile

# float32 by tensor cores: NVIDIA's multiply three parts in tf32, AMD's six in bfloat16.
IN_PARTS = tl.constexpr("bf16x6" if torch.version.hip else "tf32x3")


@triton.jit
@no_type_check
def store_tile(ptr, at, columns, mask, values, D: tl.constexpr, EVEN: tl.constexpr):
    """The counterpart of `load_tile`."""
    if EVEN:
        tl.store(ptr + at[:, None] + columns[None, :], values, mask=mask[:, None])
    else:
        inside = mask[:, None] & (columns < D)[None, :]
        tl.store(ptr + at[:, None] + columns[None, :], values, mask=inside)


@triton.jit
@no_type_check
def moved_by_request(h, delta_ptr, delta_at, columns, active, D: tl.constexpr, EVEN: tl.constexpr):
    """`h + delta`, rounded once. Chosen after rounding: an inactive row keeps its NaN payloads."""
    delta = load_tile(delta_ptr, delta_at, columns, active, D, EVEN).to(tl.float32)
    return tl.where(active[:, None], (h.to(tl.float32) + delta).to(h.dtype), h)


@triton.jit
@no_type_check
def moved_along(h, move, v, WIDE: tl.constexpr):
    """`h + move v`, rounded once; an element that nothing moves keeps every bit.

    Beside a bank of 16 bits a product in parts is as exact, and registers hold it.
    """
    if WIDE:
        delta = tl.dot(move, v.to(tl.float32), input_precision="ieee")
    else:
        delta = tl.dot(move, v.to(tl.float32), input_precision=IN_PARTS)
    return tl.where(delta == 0.0, h, (h.to(tl.float32) + delta).to(h.dtype))


@triton.jit
@no_type_check
def steer_kernel(
    h_ptr,
    delta_ptr,
    row_ptr,
    out_ptr,
    n_rows,
    n_requests,
    h_stride,
    delta_stride,
    out_stride,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = t < n_rows
    request = tl.load(row_ptr + t, mask=inside, other=-1)
    active = (request >= 0) & (request < n_requests)
    h = load_tile(h_ptr, t.to(tl.int64) * h_stride, columns, inside, D, D % BLOCK_D == 0)
    delta_at = request.to(tl.int64) * delta_stride
    moved = moved_by_request(h, delta_ptr, delta_at, columns, active, D, D % BLOCK_D == 0)
    store_tile(out_ptr, t.to(tl.int64) * out_stride, columns, inside, moved, D, D % BLOCK_D == 0)


@triton.jit
@no_type_check
def steer_project_kernel(
    h_ptr,
    v_ptr,
    delta_ptr,
    row_ptr,
    out_ptr,
    scores_ptr,
    n_rows,
    n_vec,
    n_requests,
    h_stride,
    v_stride,
    delta_stride,
    out_stride,
    scores_stride,
    D: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    k = tl.arange(0, BLOCK_K)
    t_inside, k_inside = t < n_rows, k < n_vec
    request = tl.load(row_ptr + t, mask=t_inside, other=-1)
    active = (request >= 0) & (request < n_requests)
    h_at, out_at = t.to(tl.int64) * h_stride, t.to(tl.int64) * out_stride
    v_at, delta_at = k.to(tl.int64) * v_stride, request.to(tl.int64) * delta_stride
    scores = tl.zeros((BLOCK_T, BLOCK_K), dtype=tl.float32)
    for start in range(0, D, BLOCK_D):
        columns = start + tl.arange(0, BLOCK_D)
        h = load_tile(h_ptr, h_at, columns, t_inside, D, D % BLOCK_D == 0)  # [BLOCK_T, BLOCK_D]
        v = load_tile(v_ptr, v_at, columns, k_inside, D, D % BLOCK_D == 0)  # [BLOCK_K, BLOCK_D]
        scores = add_scores(scores, h, v, WIDE)
        moved = moved_by_request(h, delta_ptr, delta_at, columns, active, D, D % BLOCK_D == 0)
        store_tile(out_ptr, out_at, columns, t_inside, moved, D, D % BLOCK_D == 0)
    scores_at = t.to(tl.int64)[:, None] * scores_stride + k[None, :]
    tl.store(scores_ptr + scores_at, scores, mask=t_inside[:, None] & k_inside[None, :])


@triton.jit
@no_type_check
def steer_project_tokens_kernel(
    h_ptr,
    v_ptr,
    c_ptr,
    out_ptr,
    scores_ptr,
    n_rows,
    n_vec,
    h_stride,
    v_stride,
    c_stride,
    out_stride,
    scores_stride,
    D: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    k = tl.arange(0, BLOCK_K)
    t_inside, k_inside = t < n_rows, k < n_vec
    h_at, out_at = t.to(tl.int64) * h_stride, t.to(tl.int64) * out_stride
    v_at = k.to(tl.int64) * v_stride
    c_at = t.to(tl.int64)[:, None] * c_stride + k[None, :]
    both = t_inside[:, None] & k_inside[None, :]
    c = tl.load(c_ptr + c_at, mask=both, other=0.0).to(tl.float32)  # [BLOCK_T, BLOCK_K]
    scores = tl.zeros((BLOCK_T, BLOCK_K), dtype=tl.float32)
    for start in range(0, D, BLOCK_D):
        columns = start + tl.arange(0, BLOCK_D)
        h = load_tile(h_ptr, h_at, columns, t_inside, D, D % BLOCK_D == 0)  # [BLOCK_T, BLOCK_D]
        v = load_tile(v_ptr, v_at, columns, k_inside, D, D % BLOCK_D == 0)  # [BLOCK_K, BLOCK_D]
        scores = add_scores(scores, h, v, WIDE)
        moved = moved_along(h, c, v, WIDE)
        store_tile(out_ptr, out_at, columns, t_inside, moved, D, D % BLOCK_D == 0)
    scores_at = t.to(tl.int64)[:, None] * scores_stride + k[None, :]
    tl.store(scores_ptr + scores_at, scores, mask=both)


def steer(
    h: Float[Tensor, "t d_model"],
    delta: Float[Tensor, "b d_model"],
    row: Int[Tensor, " t"],
    out: Float[Tensor, "t d_model"],
) -> None:
    """`out = h + delta[row]`; `out` is aligned and may be `h`."""
    n_rows, d_model = h.shape
    if n_rows == 0 or d_model == 0:
        return
    h, delta = aligned(h), aligned(delta)
    tile = launch("steer", h.device, width=width_class(h.dtype), rows=n_rows, n_vec=0)
    columns = block_d(d_model, tile.block_d)
    with on_device(h):
        steer_kernel[(triton.cdiv(n_rows, tile.block_t), triton.cdiv(d_model, columns))](
            h,
            delta,
            row,
            out,
            n_rows,
            len(delta),
            h.stride(0),
            delta.stride(0),
            out.stride(0),
            D=d_model,
            BLOCK_T=tile.block_t,
            BLOCK_D=columns,
            **tile.options,
        )


def steer_project(
    h: Float[Tensor, "t d_model"],
    v: Float[Tensor, "k d_model"],
    delta: Float[Tensor, "b d_model"],
    row: Int[Tensor, " t"],
    out: Float[Tensor, "t d_model"],
    scores: Float[Tensor, "t k"],
) -> None:
    """`out = h + delta[row]` and `scores = h vᵀ`; `out` is aligned and may be `h`.

    A program holds all vectors of its rows: no other program reads what it has written.
    """
    n_rows, n_vec = scores.shape
    if n_rows == 0:
        return
    h, v, delta = aligned(h), aligned(v), aligned(delta)
    width = width_class(h.dtype, v.dtype)
    tile = launch("steer_project", h.device, width=width, rows=n_rows, n_vec=n_vec)
    with on_device(h):
        steer_project_kernel[(triton.cdiv(n_rows, tile.block_t),)](
            h,
            v,
            delta,
            row,
            out,
            scores,
            n_rows,
            n_vec,
            len(delta),
            *(rows.stride(0) for rows in (h, v, delta, out, scores)),
            D=h.shape[1],
            WIDE=width == "wide",
            BLOCK_T=tile.block_t,
            BLOCK_K=block_k(n_vec),
            BLOCK_D=block_d(h.shape[1], tile.block_d),
            **tile.options,
        )


def steer_project_tokens(
    h: Float[Tensor, "t d_model"],
    v: Float[Tensor, "k d_model"],
    c: Float[Tensor, "t k"],
    out: Float[Tensor, "t d_model"],
    scores: Float[Tensor, "t k"],
) -> None:
    """`out = h + c v` and `scores = h vᵀ`; `out` is aligned and may be `h`."""
    n_rows, n_vec = scores.shape
    if n_rows == 0:
        return
    h, v, c = aligned(h), aligned(v), c.contiguous()
    width = width_class(h.dtype, v.dtype)
    tile = launch("steer_project_tokens", h.device, width=width, rows=n_rows, n_vec=n_vec)
    with on_device(h):
        steer_project_tokens_kernel[(triton.cdiv(n_rows, tile.block_t),)](
            h,
            v,
            c,
            out,
            scores,
            n_rows,
            n_vec,
            h.stride(0),
            v.stride(0),
            c.stride(0),
            out.stride(0),
            scores.stride(0),
            D=h.shape[1],
            WIDE=width == "wide",
            BLOCK_T=tile.block_t,
            BLOCK_K=block_k(n_vec),
            BLOCK_D=block_d(h.shape[1], tile.block_d),
            **tile.options,
        )
