"""What every op refuses, said before anything is written: got, wanted, do."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pvcore_kernels.reference import accumulator


def _refuse(name: str, got: object, wanted: str) -> None:
    raise ValueError(f"{name} is {got}; it must be {wanted}.")


def _floats(name: str, tensor: Tensor, shape: str) -> None:
    if tensor.ndim != 2 or not tensor.is_floating_point():
        got = f"{tensor.dtype} of shape {tuple(tensor.shape)}"
        _refuse(name, got, f"floating point of shape {shape}; flatten leading axes first")


def _indices(name: str, tensor: Tensor, h: Tensor | None = None) -> None:
    if tensor.ndim != 1 or tensor.dtype != torch.int32:
        got = f"{tensor.dtype} of shape {tuple(tensor.shape)}"
        _refuse(name, got, "int32 with one axis; call .to(torch.int32)")
    if not tensor.is_contiguous():
        _refuse(name, "not contiguous", "contiguous; call .contiguous()")
    if h is not None and tensor.shape[0] != h.shape[0]:
        wanted = f"one entry for each of the {h.shape[0]} rows of h"
        _refuse(name, f"of {tensor.shape[0]} entries", wanted)


def _widths(h: Tensor, name: str, other: Tensor) -> None:
    if h.shape[1] != other.shape[1]:
        _refuse(name, f"{other.shape[1]} wide", f"as wide as the rows of h, {h.shape[1]}")


def project(h: Tensor, v: Tensor, rows: Tensor | None) -> None:
    _floats("h", h, "[t, d_model]")
    _floats("v", v, "[k, d_model]")
    _widths(h, "v", v)
    if rows is not None:
        _indices("rows", rows)


def scores(scores: Tensor, h: Tensor, v: Tensor, rows: Tensor | None) -> None:
    wanted = (h.shape[0] if rows is None else rows.shape[0], v.shape[0])
    if tuple(scores.shape) != wanted or scores.dtype != accumulator(h.dtype):
        got = f"{scores.dtype} of shape {tuple(scores.shape)}"
        _refuse("scores", got, f"{accumulator(h.dtype)} of shape {wanted}")
    if scores.shape[1] > 1 and scores.stride(1) != 1:
        _refuse("scores", f"of strides {scores.stride()}", "contiguous in its last axis")


def segments(h: Tensor, cu_seqlens: Tensor) -> None:
    _floats("h", h, "[t, d_model]")
    _indices("cu_seqlens", cu_seqlens)
    if cu_seqlens.shape[0] == 0:
        _refuse("cu_seqlens", "empty", "the bounds of the segments, starting with 0")


def steer(h: Tensor, delta: Tensor, row: Tensor) -> None:
    _floats("h", h, "[t, d_model]")
    _floats("delta", delta, "[b, d_model]")
    _widths(h, "delta", delta)
    _indices("row", row, h)


def tokens(h: Tensor, v: Tensor, c: Tensor) -> None:
    project(h, v, None)
    _floats("c", c, "[t, k]")
    if c.shape != (h.shape[0], v.shape[0]):
        _refuse("c", f"of shape {tuple(c.shape)}", "[t, k], one coefficient per row and vector")


def apart(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Not for fake tensors, which lie nowhere."""
    if tensor.numel() and tensor.data_ptr() == other.data_ptr():
        wanted = f"a tensor of its own, for {other_name} are written before it is read"
        _refuse(name, f"the memory of {other_name}", f"{wanted}; call .clone()")


def like(name: str, tensor: Tensor, wanted: Tensor) -> None:
    alike = tensor.shape == wanted.shape and tensor.dtype == wanted.dtype
    if not alike or tensor.device != wanted.device:
        got, needed = (
            f"{one.dtype} of shape {tuple(one.shape)} on {one.device}" for one in (tensor, wanted)
        )
        _refuse(name, got, needed)


def layers(hs: Sequence[Tensor], v: Tensor) -> None:
    if not hs or v.ndim != 3 or v.shape[0] != len(hs):
        got = f"of shape {tuple(v.shape)} for {len(hs)} layers of rows"
        _refuse("v", got, "[layer, k, d_model] for at least one layer")
    if v.device != hs[0].device:
        _refuse("v", f"on {v.device}", f"where the rows are, on {hs[0].device}")
    for h in hs:
        project(h, v[0], None)
        like("every layer's rows", h, hs[0])


def stack(hs: Tensor, v: Tensor, scores: Tensor, step: Tensor | None) -> None:
    if hs.ndim != 3 or v.ndim != 3 or hs.shape[::2] != v.shape[::2]:
        got = f"of shape {tuple(hs.shape)} for vectors {tuple(v.shape)}"
        _refuse("hs", got, "[layer, t, d_model], for v [layer, k, d_model]")
    wanted: tuple[int, ...] = (hs.shape[0], hs.shape[1], v.shape[1])
    if step is not None:
        wanted = (scores.shape[0], *wanted)
        if step.ndim != 0 or step.dtype != torch.int64:
            _refuse("step", f"{step.dtype} of shape {tuple(step.shape)}", "one int64")
    if tuple(scores.shape) != wanted or scores.dtype != accumulator(hs.dtype):
        got = f"{scores.dtype} of shape {tuple(scores.shape)}"
        _refuse("scores", got, f"{accumulator(hs.dtype)} of shape {wanted}")
    if not scores.is_contiguous():
        _refuse("scores", f"of strides {scores.stride()}", "contiguous")


def step(
    h: Tensor, v: Tensor, low: Tensor, high: Tensor, row: Tensor, gram_inverse: Tensor
) -> None:
    project(h, v, None)
    _indices("row", row, h)
    n_vec = v.shape[0]
    for name, bounds in (("low", low), ("high", high)):
        if bounds.ndim != 2 or bounds.shape[1] != n_vec or bounds.shape[0] != low.shape[0]:
            wanted = "[b, k], for both bounds alike"
            _refuse(name, f"of shape {tuple(bounds.shape)} for {n_vec} vectors", wanted)
    if tuple(gram_inverse.shape) != (n_vec, n_vec):
        _refuse("gram_inverse", f"of shape {tuple(gram_inverse.shape)}", f"[{n_vec}, {n_vec}]")


def norm(
    x: Tensor, residual: Tensor, weight: Tensor, delta: Tensor, row: Tensor, v: Tensor
) -> None:
    project(x, v, None)
    steer(x, delta, row)
    like("residual", residual, x)
    if tuple(weight.shape) != (x.shape[1],):
        _refuse("weight", f"of shape {tuple(weight.shape)}", f"[{x.shape[1]}]")
