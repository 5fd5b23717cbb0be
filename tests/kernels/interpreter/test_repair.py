"""The interpreter itself: its bfloat16 is right after the repair, and fresh outputs are NaN."""

from typing import no_type_check

import pytest
import torch
import triton
import triton.language as tl

from tests.kernels.cases import DTYPES, assert_close, residual


@triton.jit
@no_type_check
def dot_kernel(a_ptr, b_ptr, c_ptr, low_ptr):
    tile = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
    c = tl.dot(tl.load(a_ptr + tile), tl.load(b_ptr + tile), input_precision="ieee")
    tl.store(c_ptr + tile, c)
    tl.store(low_ptr + tile, c.to(low_ptr.dtype.element_ty))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_dot_is_right_and_rounded_to_nearest_even(dtype):
    a, b = residual(16, 16, dtype), residual(16, 16, dtype, seed=1)
    c, low = torch.empty(16, 16), torch.empty(16, 16, dtype=dtype)
    dot_kernel[(1,)](a, b, c, low)
    assert_close(c, a.double() @ b.double(), torch.float32)
    assert torch.equal(low, c.to(dtype))


def test_nan_stays_nan_when_narrowed():
    a = torch.full((16, 16), torch.nan, dtype=torch.bfloat16)
    c, low = torch.zeros(16, 16), torch.zeros(16, 16, dtype=torch.bfloat16)
    dot_kernel[(1,)](a, a, c, low)
    assert low.isnan().all()


def test_fresh_outputs_are_poisoned():
    for dtype in DTYPES:
        h = torch.zeros(2, 3, dtype=dtype)
        fresh = torch.empty(4, 4, dtype=dtype), torch.empty_like(h), h.new_empty(5)
        assert all(one.isnan().all() for one in fresh)
