"""Deferred monitoring: the rows of every layer scored in one launch.

They are found through a table of addresses, or lie stacked in one tensor, whose strides tell. A
program sums over the whole width in one order and meets no other: a row's score does not depend
on what is beside it.
"""

from collections.abc import Sequence
from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int64
from torch import Tensor

from pvcore_kernels.launch import launch, width_class
from pvcore_kernels.layout import aligned, block_d, block_k, capturing, on_device
from pvcore_kernels.tiled.project import add_scores, load_tile

TYPES: dict[torch.dtype, Any] = {
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
}


@triton.jit
@no_type_check
def slot_of(step_ptr, n_slots):
    """`step % n_slots`, from 0 on; Triton's is as in C, below 0 for a step below 0."""
    slot = tl.load(step_ptr) % n_slots
    return tl.where(slot < 0, slot + n_slots, slot)


@triton.jit
@no_type_check
def project_layers_kernel(
    source_ptr,
    v_ptr,
    scores_ptr,
    step_ptr,
    n_slots,
    n_rows,
    n_vec,
    h_stride,
    h_layer_stride,
    v_stride,
    v_layer_stride,
    D: tl.constexpr,
    TYPE: tl.constexpr,
    STACKED: tl.constexpr,
    RING: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    layer = tl.program_id(2).to(tl.int64)
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    t_inside, k_inside = t < n_rows, k < n_vec
    if STACKED:
        h_ptr = source_ptr + layer * h_layer_stride
    else:
        h_ptr = tl.multiple_of(tl.load(source_ptr + layer).to(tl.pointer_type(TYPE)), 16)
    h_at, v_at = t.to(tl.int64) * h_stride, layer * v_layer_stride + k * v_stride
    scores = tl.zeros((BLOCK_T, BLOCK_K), dtype=tl.float32)
    for start in range(0, D, BLOCK_D):
        columns = start + tl.arange(0, BLOCK_D)
        h = load_tile(h_ptr, h_at, columns, t_inside, D, D % BLOCK_D == 0)  # [BLOCK_T, BLOCK_D]
        v = load_tile(v_ptr, v_at, columns, k_inside, D, D % BLOCK_D == 0)  # [BLOCK_K, BLOCK_D]
        scores = add_scores(scores, h, v, WIDE)
    if RING:
        layer += slot_of(step_ptr, n_slots) * tl.num_programs(2)
    scores_at = (layer * n_rows + t)[:, None] * n_vec + k[None, :]
    tl.store(scores_ptr + scores_at, scores, mask=t_inside[:, None] & k_inside[None, :])


def address_table(hs: Sequence[Float[Tensor, "t d_model"]]) -> Int64[Tensor, " layer"]:
    """Where the rows of each layer start. The rows must be aligned alike and outlive the table."""
    addresses = [h.data_ptr() for h in hs]
    return torch.tensor(addresses, dtype=torch.int64, device=hs[0].device)


def project_layers(
    hs: Sequence[Float[Tensor, "t d_model"]],
    v: Float[Tensor, "layer k d_model"],
    out: Float[Tensor, "layer t k"],
    table: Int64[Tensor, " layer"] | None = None,
) -> None:
    """Write the scores of each layer's rows on its own vectors into `out`, which is contiguous.

    `table` is `address_table(hs)` made earlier, which a captured graph cannot make.
    RuntimeError without one while a graph is captured.
    """
    _n_layers, n_rows, n_vec = out.shape
    if n_rows == 0 or n_vec == 0:
        return
    if table is None:
        if capturing(hs[0]):
            raise RuntimeError(
                "project_layers is being captured, and a graph cannot copy its table of addresses "
                "from the host; stack the layers and call project_stack_out."
            )
        hs = [aligned(h) for h in hs]
        if len({h.stride(0) for h in hs}) > 1:
            hs = [h.contiguous() for h in hs]
        table = address_table(hs)
    _launch(table, hs[0], 0, v, out, None, 1)


def project_stack(
    hs: Float[Tensor, "layer t d_model"],
    v: Float[Tensor, "layer k d_model"],
    out: Float[Tensor, "*slot layer t k"],
    step: Int64[Tensor, ""] | None = None,
) -> None:
    """The same for rows stacked in one tensor, whose strides may be any multiples of sixteen.

    With a `step`, which is read on the device, `out` is a ring and its slot `step % n_slots` is
    written: neither an address nor a number has to be known when a graph is captured.
    """
    if out.numel() == 0:
        return
    _launch(hs, hs[0], hs.stride(0), v, out, step, out.shape[0])


def _launch(
    source: Tensor,
    h: Float[Tensor, "t d_model"],
    h_layer_stride: int,
    v: Float[Tensor, "layer k d_model"],
    out: Float[Tensor, "*slot layer t k"],
    step: Int64[Tensor, ""] | None,
    n_slots: int,
) -> None:
    n_layers, n_rows, n_vec = out.shape[-3:]
    width = width_class(h.dtype, v.dtype)
    tile = launch("project_layers", out.device, width=width, rows=n_rows, n_vec=n_vec)
    vectors = block_k(n_vec, tile.block_k)
    grid = (triton.cdiv(n_vec, vectors), triton.cdiv(n_rows, tile.block_t), n_layers)
    with on_device(out):
        project_layers_kernel[grid](
            *(source, v, out, step, n_slots, n_rows, n_vec),
            *(h.stride(0), h_layer_stride, v.stride(1), v.stride(0)),
            D=v.shape[2],
            TYPE=TYPES[h.dtype],
            STACKED=source.ndim == 3,
            RING=step is not None,
            WIDE=width == "wide",
            BLOCK_T=tile.block_t,
            BLOCK_K=vectors,
            BLOCK_D=block_d(v.shape[2], tile.block_d),
            **tile.options,
        )
