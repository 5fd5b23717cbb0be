"""Where rows lie in memory: kernels load 16 bytes at a time, or not at all."""

from contextlib import AbstractContextManager

import torch
from jaxtyping import Shaped
from torch import Tensor

# Triton proves 16-byte loads from addresses and strides that divide by 16, strides in elements.
ALIGNMENT = 16


def round_up(n: int, step: int = ALIGNMENT) -> int:
    return -(-n // step) * step


def is_aligned(rows: Shaped[Tensor, "n d_model"]) -> bool:
    """Whether every row starts on 16 bytes and its elements are neighbours."""
    inner = rows.stride(1) == 1 or rows.shape[1] == 1
    return inner and rows.stride(0) % ALIGNMENT == 0 and rows.data_ptr() % ALIGNMENT == 0


def empty_rows(
    n: int, d_model: int, *, dtype: torch.dtype, device: torch.device
) -> Shaped[Tensor, "n d_model"]:
    """New aligned rows: a view of storage whose row is padded to a multiple of 16 elements."""
    storage = torch.empty(n, round_up(d_model), dtype=dtype, device=device)
    return storage[:, :d_model]


def aligned(rows: Shaped[Tensor, "n d_model"]) -> Shaped[Tensor, "n d_model"]:
    """The rows themselves where they are aligned, else an aligned copy."""
    if is_aligned(rows):
        return rows
    copy = empty_rows(*rows.shape, dtype=rows.dtype, device=rows.device)
    return copy.copy_(rows)


def aligned_stack(rows: Shaped[Tensor, "layer n d_model"]) -> Shaped[Tensor, "layer n d_model"]:
    """Stacked rows as they are where every one is aligned, else an aligned copy."""
    first = rows[0] if len(rows) else rows.flatten(0, 1)
    if is_aligned(first) and rows.stride(0) % ALIGNMENT == 0:
        return rows
    return aligned(rows.flatten(0, 1)).view(rows.shape)


def require_aligned(rows: Shaped[Tensor, "n d_model"], name: str) -> None:
    """For what a kernel writes in place, where a copy would be written instead."""
    overlap = rows.shape[0] > 1 and rows.stride(0) < rows.shape[1]
    if overlap or not is_aligned(rows):
        raise ValueError(
            f"{name} has strides {tuple(rows.stride())} at address {rows.data_ptr()}; a kernel "
            f"writing in place wants neighbouring elements and rows apart, on multiples of "
            f"{ALIGNMENT}. "
            f"Pass an aligned tensor, or call the functional op."
        )


def block_d(d_model: int, most: int) -> int:
    """Columns loaded at a time: the largest power of two dividing `d_model`, else a masked one."""
    dividing = min(d_model & -d_model, most)
    if dividing >= min(32, most):
        return dividing
    return max(16, min(most, 1 << (d_model - 1).bit_length()))


def block_k(n_vec: int, most: int | None = None) -> int:
    """Vectors in a tile: all of them, or a power of two; at least 16, the least `tl.dot` takes."""
    every = max(16, 1 << (n_vec - 1).bit_length())
    return every if most is None else min(most, every)


def capturing(tensor: Tensor) -> bool:
    """Whether what is launched now on the tensor's GPU goes into a graph."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def on_device(tensor: Tensor) -> AbstractContextManager[None]:
    """Launch on the GPU the tensor is on; nothing for the rows of the interpreter."""
    guard: AbstractContextManager[None] = torch.cuda.device_of(tensor)  # type: ignore[no-untyped-call]
    return guard
