"""What torch is told of tensors that a kernel has written, behind its back."""

import pytest
import torch

from tests.kernels.cases import requests, residual
from tests.kernels.in_place import ARGUMENTS, run, writing

pytestmark = pytest.mark.usefixtures("as_on_a_gpu")


@pytest.mark.parametrize("name", ARGUMENTS)
def test_what_a_kernel_writes_has_a_new_version_and_nothing_else_has(name):
    found = writing(name)
    tensors = {key: one for key, one in found.given.items() if isinstance(one, torch.Tensor)}
    before = {key: one._version for key, one in tensors.items()}
    run(name, found)
    newer = {key for key, one in tensors.items() if one._version > before[key]}
    assert newer == set(found.written)


def test_autograd_refuses_rows_that_a_kernel_wrote_after_it_saved_them():
    h, weight = residual(3, 64, torch.float32), residual(64, 64, torch.float32, seed=1)
    made = h @ weight.requires_grad_()
    torch.ops.pvcore.steer_.default(h, residual(2, 64, torch.float32, seed=3), requests(3, 2))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        made.sum().backward()


@pytest.mark.parametrize("name", ARGUMENTS)
def test_kernels_write_tensors_of_inference_mode_wherever_they_are_called(name):
    with torch.inference_mode():
        found = writing(name)
    run(name, found)
    (first, *_) = (found.given[key] for key in found.written)
    assert not first.isnan().all()
