"""Scores of rows on vectors: one read of the rows, no reduction across programs."""

from typing import no_type_check

import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from pvcore_kernels.launch import launch, width_class
from pvcore_kernels.layout import aligned, block_d, block_k, on_device


@triton.jit
@no_type_check
def load_tile(ptr, at, columns, mask, D: tl.constexpr, EVEN: tl.constexpr):
    """`[len(at), len(columns)]` from addresses of rows, masked in `D` only where it must be."""
    if EVEN:
        return tl.load(ptr + at[:, None] + columns[None, :], mask=mask[:, None], other=0.0)
    else:  # noqa: RET505 - a compile-time branch
        inside = mask[:, None] & (columns < D)[None, :]
        return tl.load(ptr + at[:, None] + columns[None, :], mask=inside, other=0.0)


@triton.jit
@no_type_check
def add_scores(scores, h, v, WIDE: tl.constexpr):
    """`scores + h vᵀ`, summed in float32; mixed and float32 operands are multiplied in float32."""
    if WIDE:
        h, v = h.to(tl.float32), v.to(tl.float32)
    return tl.dot(h, tl.trans(v), scores, input_precision="ieee")


@triton.jit
@no_type_check
def project_kernel(
    h_ptr,
    v_ptr,
    rows_ptr,
    out_ptr,
    n_rows,
    n_source,
    n_vec,
    h_stride,
    v_stride,
    out_stride,
    D: tl.constexpr,
    GATHER: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    t_inside, k_inside = t < n_rows, k < n_vec
    if GATHER:
        source = tl.load(rows_ptr + t, mask=t_inside, other=0).to(tl.int64)
    else:
        source = t.to(tl.int64)
    known = t_inside & (source >= 0) & (source < n_source)
    h_at, v_at = source * h_stride, k.to(tl.int64) * v_stride
    scores = tl.zeros((BLOCK_T, BLOCK_K), dtype=tl.float32)
    for start in range(0, D, BLOCK_D):
        columns = start + tl.arange(0, BLOCK_D)
        h = load_tile(h_ptr, h_at, columns, known, D, D % BLOCK_D == 0)  # [BLOCK_T, BLOCK_D]
        v = load_tile(v_ptr, v_at, columns, k_inside, D, D % BLOCK_D == 0)  # [BLOCK_K, BLOCK_D]
        scores = add_scores(scores, h, v, WIDE)
    scores = tl.where(known[:, None], scores, float("nan"))
    out_at = t.to(tl.int64)[:, None] * out_stride + k[None, :]
    tl.store(out_ptr + out_at, scores, mask=t_inside[:, None] & k_inside[None, :])


def project(
    h: Float[Tensor, "t d_model"],
    v: Float[Tensor, "k d_model"],
    rows: Int[Tensor, " n"] | None,
    out: Float[Tensor, "n k"],
) -> None:
    """Write the scores of the listed rows into `out`; a row outside `h` scores NaN."""
    n_rows, n_vec = out.shape
    if n_rows == 0 or n_vec == 0:
        return
    h, v = aligned(h), aligned(v)
    width = width_class(h.dtype, v.dtype)
    tile = launch("project", h.device, width=width, rows=n_rows, n_vec=n_vec)
    columns, vectors = block_d(h.shape[1], tile.block_d), block_k(n_vec, tile.block_k)
    grid = (triton.cdiv(n_rows, tile.block_t), triton.cdiv(n_vec, vectors))
    with on_device(h):
        project_kernel[grid](
            h,
            v,
            rows,
            out,
            n_rows,
            len(h),
            n_vec,
            h.stride(0),
            v.stride(0),
            out.stride(0),
            D=h.shape[1],
            GATHER=rows is not None,
            WIDE=width == "wide",
            BLOCK_T=tile.block_t,
            BLOCK_K=vectors,
            BLOCK_D=columns,
            **tile.options,
        )
