"""Every kernel run by the Triton interpreter: bf16 repaired, fresh outputs full of NaN."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def widened(bits: np.ndarray) -> np.ndarray:
    """The float32 values of bfloat16 kept as uint16."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrowed(values: np.ndarray) -> np.ndarray:
    """float32 to the bits of the nearest bfloat16, ties to even, as the hardware rounds."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


def repair(builder: Any) -> None:
    """The interpreter multiplies the bit patterns of bfloat16, and truncates where it rounds."""
    dot, cast = builder.create_dot, builder.cast_impl

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        if a.dtype.scalar == tl.bfloat16 and b.dtype.scalar == tl.bfloat16:
            product = np.matmul(widened(a.data), widened(b.data))
            return TensorHandle(product + d.data, d.dtype.scalar)
        return dot(self, a, b, d, input_precision, max_num_imprecise_acc)

    def cast_impl(self, src, dst_type):
        if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
            return TensorHandle(narrowed(src.data), tl.bfloat16)
        return cast(self, src, dst_type)

    builder.create_dot, builder.cast_impl = create_dot, cast_impl
    builder.create_fp_trunc = lambda self, src, dst_type: self.cast_impl(src, dst_type)


def repair_bounds(runtime: Any) -> None:
    """Triton 3.6 makes a loop's bound of an array with one element, which NumPy now refuses."""
    patch = runtime._patch_lang_tensor

    def patched(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    runtime._patch_lang_tensor = patched


repair(InterpreterBuilder)
repair_bounds(interpreter)


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Registered ops take the way they take on a GPU; above 128 vectors a product is torch's."""
    from pvcore_kernels import dispatch, dispatch_joint, ops

    def path(device: torch.device, dtype: torch.dtype, n_vec: int) -> str:
        if dtype == torch.float64:
            return "reference"
        return "triton" if n_vec <= 128 else "cublas"

    assert callable(ops.project)  # importing it registers the ops
    for module in (dispatch, dispatch_joint):
        monkeypatch.setattr(module, "path", path)


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    """torch fills what `torch.empty` and its kin return with NaN: an unwritten element shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
