"""The residual add, the steering, the next block's RMSNorm and a few scores, in one kernel.

A program holds one row in registers, whatever its width: nothing is read twice.
"""

from typing import no_type_check

import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from pvcore_kernels.layout import aligned, on_device


@triton.jit
@no_type_check
def normed(h, weight_ptr, columns, inside, eps, D: tl.constexpr, OFFSET: tl.constexpr):
    """RMSNorm as transformers rounds it: Llama and Qwen cast before the weight, Gemma after."""
    wide = h.to(tl.float32)
    scaled = wide * tl.rsqrt(tl.sum(wide * wide, axis=0) / D + eps)
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    if OFFSET:
        return (scaled * (1.0 + weight)).to(h.dtype)
    else:  # noqa: RET505 - a compile-time branch
        return (scaled.to(h.dtype).to(tl.float32) * weight).to(h.dtype)


@triton.jit
@no_type_check
def steered(h, delta_ptr, delta_stride, request, n_requests, columns, D: tl.constexpr):
    """`h + delta[request]`, rounded once; the row itself where there is no such request."""
    width = tl.where((request >= 0) & (request < n_requests), D, 0)
    delta_at = request * delta_stride + columns
    delta = tl.load(delta_ptr + delta_at, mask=columns < width, other=0.0).to(tl.float32)
    return tl.where(columns < width, (h.to(tl.float32) + delta).to(h.dtype), h)


@triton.jit
@no_type_check
def add_rmsnorm_steer_project_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    delta_ptr,
    row_ptr,
    v_ptr,
    y_ptr,
    out_ptr,
    scores_ptr,
    n_vec,
    n_requests,
    eps,
    x_stride,
    residual_stride,
    delta_stride,
    v_stride,
    y_stride,
    out_stride,
    scores_stride,
    D: tl.constexpr,
    OFFSET: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_D)
    inside = columns < D
    x = tl.load(x_ptr + t * x_stride + columns, mask=inside, other=0.0)
    residual = tl.load(residual_ptr + t * residual_stride + columns, mask=inside, other=0.0)
    # The model adds in the dtype of its rows, so that is where its rounding is.
    h = (x.to(tl.float32) + residual.to(tl.float32)).to(x.dtype)
    for k in range(n_vec):
        v = tl.load(v_ptr + k * v_stride + columns, mask=inside, other=0.0).to(tl.float32)
        tl.store(scores_ptr + t * scores_stride + k, tl.sum(h.to(tl.float32) * v, axis=0))
    request = tl.load(row_ptr + t).to(tl.int64)
    moved = steered(h, delta_ptr, delta_stride, request, n_requests, columns, D)
    tl.store(out_ptr + t * out_stride + columns, moved, mask=inside)
    y = normed(moved, weight_ptr, columns, inside, eps, D, OFFSET)
    tl.store(y_ptr + t * y_stride + columns, y, mask=inside)


def add_rmsnorm_steer_project(
    x: Float[Tensor, "t d_model"],
    residual: Float[Tensor, "t d_model"],
    weight: Float[Tensor, " d_model"],
    eps: float,
    delta: Float[Tensor, "b d_model"],
    row: Int[Tensor, " t"],
    v: Float[Tensor, "k d_model"],
    offset: bool,
    y: Float[Tensor, "t d_model"],
    out: Float[Tensor, "t d_model"],
    scores: Float[Tensor, "t k"],
) -> None:
    """Write the normed rows, the steered residual, and the scores of the sum before it is steered.

    `y` and `out` are aligned; `out` may be `residual` and `y` may be `x`.
    """
    n_rows, d_model = x.shape
    if n_rows == 0:
        return
    x, residual, delta, v = aligned(x), aligned(residual), aligned(delta), aligned(v)
    width = triton.next_power_of_2(d_model)
    rows = (x, residual, delta, v, y, out, scores)
    with on_device(x):
        add_rmsnorm_steer_project_kernel[(n_rows,)](
            *(x, residual, weight.contiguous(), delta, row, v, y, out, scores),
            *(len(v), len(delta), eps),
            *(one.stride(0) for one in rows),
            D=d_model,
            OFFSET=offset,
            BLOCK_D=width,
            # Eight elements a thread: 32 for rows of 16384, which is what registers hold.
            num_warps=min(max(width // 512, 1), 16),
            enable_fp_fusion=True,
        )
