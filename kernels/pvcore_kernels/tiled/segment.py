"""Means of segments of rows: one program per segment and block of columns."""

from typing import no_type_check

import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from pvcore_kernels.launch import launch, width_class
from pvcore_kernels.layout import aligned, block_d, on_device
from pvcore_kernels.tiled.project import load_tile


@triton.jit
@no_type_check
def segment_mean_kernel(
    h_ptr,
    bounds_ptr,
    out_ptr,
    n_rows,
    h_stride,
    out_stride,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    segment = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    first = tl.load(bounds_ptr + segment).to(tl.int64)
    last = tl.load(bounds_ptr + segment + 1).to(tl.int64)
    total = tl.zeros((BLOCK_D,), dtype=tl.float64)
    known = (first >= 0) & (first < last) & (last <= n_rows)
    n = tl.where(known, last - first, 0)
    for start in range(first, first + n, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        h = load_tile(h_ptr, t * h_stride, columns, t < last, D, D % BLOCK_D == 0)
        total += tl.sum(h.to(tl.float32), axis=0).to(tl.float64)
    mean = (total / n.to(tl.float64)).to(tl.float32)
    out_at = segment.to(tl.int64) * out_stride + columns
    tl.store(out_ptr + out_at, mean, mask=columns < D)


def segment_mean(
    h: Float[Tensor, "t d_model"],
    cu_seqlens: Int[Tensor, " bounds"],
    out: Float[Tensor, "segments d_model"],
) -> None:
    """Write the float32 means of `h[cu_seqlens[b]:cu_seqlens[b + 1]]` into `out`.

    Each tile of rows is summed in float32 and the tiles in float64; an empty segment is NaN, and
    so is one with a bound outside `h`.
    """
    n_segments, d_model = out.shape
    if n_segments == 0 or d_model == 0:
        return
    h = aligned(h)
    width = width_class(h.dtype)
    tile = launch("segment_mean", h.device, width=width, rows=len(h), n_vec=0)
    columns = block_d(d_model, tile.block_d)
    with on_device(h):
        segment_mean_kernel[(n_segments, triton.cdiv(d_model, columns))](
            h,
            cu_seqlens,
            out,
            len(h),
            h.stride(0),
            out.stride(0),
            D=d_model,
            BLOCK_T=tile.block_t,
            BLOCK_D=columns,
            **tile.options,
        )
