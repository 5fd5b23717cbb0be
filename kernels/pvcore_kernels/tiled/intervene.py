"""One joint ablation or cap: read the rows, decide in projection space, write them.

The second sweep finds its tile of rows in the cache: 16 rows of 4096 in bf16 are 128 KB.
"""

from typing import no_type_check

import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from pvcore_kernels.launch import launch, width_class
from pvcore_kernels.layout import aligned, block_d, block_k, on_device
from pvcore_kernels.tiled.project import add_scores, load_tile
from pvcore_kernels.tiled.steer import moved_along, store_tile


@triton.jit
@no_type_check
def joint_move(scores, low_ptr, high_ptr, inverse_ptr, request, n_requests, k, n_vec):
    """Coefficients that take each score into its interval; 0 for a row or a vector that is none."""
    active = (request >= 0) & (request < n_requests)
    acts = active[:, None] & (k < n_vec)[None, :]
    at = request.to(tl.int64)[:, None] * n_vec + k[None, :]
    low = tl.load(low_ptr + at, mask=acts, other=0.0).to(tl.float32)
    high = tl.load(high_ptr + at, mask=acts, other=0.0).to(tl.float32)
    change = tl.where(acts, tl.minimum(tl.maximum(scores, low), high) - scores, 0.0)
    square = (k < n_vec)[:, None] & (k < n_vec)[None, :]
    inverse = tl.load(inverse_ptr + k[:, None] * n_vec + k[None, :], mask=square, other=0.0)
    return tl.dot(change, inverse.to(tl.float32), input_precision="ieee")


@triton.jit
@no_type_check
def swept_scores(
    h_ptr,
    v_ptr,
    h_at,
    v_at,
    t_inside,
    k_inside,
    D: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The first sweep over a tile of rows: `h vᵀ`."""
    scores = tl.zeros((BLOCK_T, BLOCK_K), dtype=tl.float32)
    for start in range(0, D, BLOCK_D):
        columns = start + tl.arange(0, BLOCK_D)
        h = load_tile(h_ptr, h_at, columns, t_inside, D, D % BLOCK_D == 0)  # [BLOCK_T, BLOCK_D]
        v = load_tile(v_ptr, v_at, columns, k_inside, D, D % BLOCK_D == 0)  # [BLOCK_K, BLOCK_D]
        scores = add_scores(scores, h, v, WIDE)
    return scores


@triton.jit
@no_type_check
def intervene_kernel(
    h_ptr,
    v_ptr,
    low_ptr,
    high_ptr,
    inverse_ptr,
    row_ptr,
    out_ptr,
    scores_ptr,
    n_rows,
    n_vec,
    n_requests,
    h_stride,
    v_stride,
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
    scores = swept_scores(
        h_ptr, v_ptr, h_at, v_at, t_inside, k_inside, D, WIDE, BLOCK_T, BLOCK_K, BLOCK_D
    )
    scores_at = t.to(tl.int64)[:, None] * scores_stride + k[None, :]
    tl.store(scores_ptr + scores_at, scores, mask=t_inside[:, None] & k_inside[None, :])
    request = tl.load(row_ptr + t, mask=t_inside, other=-1)
    move = joint_move(scores, low_ptr, high_ptr, inverse_ptr, request, n_requests, k, n_vec)
    for start in range(0, D, BLOCK_D):
        columns = start + tl.arange(0, BLOCK_D)
        h = load_tile(h_ptr, h_at, columns, t_inside, D, D % BLOCK_D == 0)
        v = load_tile(v_ptr, v_at, columns, k_inside, D, D % BLOCK_D == 0)
        moved = moved_along(h, move, v, WIDE)
        store_tile(out_ptr, out_at, columns, t_inside, moved, D, D % BLOCK_D == 0)


def intervene(
    h: Float[Tensor, "t d_model"],
    v: Float[Tensor, "k d_model"],
    low: Float[Tensor, "b k"],
    high: Float[Tensor, "b k"],
    row: Int[Tensor, " t"],
    gram_inverse: Float[Tensor, "k k"],
    out: Float[Tensor, "t d_model"],
    scores: Float[Tensor, "t k"],
) -> None:
    """Write the rows after one joint step, and the scores they had before it.

    `out` is aligned and may be `h`; a row whose request is none of the `b` keeps every bit.
    """
    n_rows, n_vec = scores.shape
    if n_rows == 0 or n_vec == 0:
        return
    h, v = aligned(h), aligned(v)
    width = width_class(h.dtype, v.dtype)
    tile = launch("intervene", h.device, width=width, rows=n_rows, n_vec=n_vec)
    bounds = low.contiguous(), high.contiguous(), gram_inverse.contiguous()
    with on_device(h):
        intervene_kernel[(triton.cdiv(n_rows, tile.block_t),)](
            *(h, v, *bounds, row, out, scores),
            *(n_rows, n_vec, len(low)),
            *(h.stride(0), v.stride(0), out.stride(0), scores.stride(0)),
            D=h.shape[1],
            WIDE=width == "wide",
            BLOCK_T=tile.block_t,
            BLOCK_K=block_k(n_vec),
            BLOCK_D=block_d(h.shape[1], tile.block_d),
            **tile.options,
        )
