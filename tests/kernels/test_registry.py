"""What torch is told of an op that writes into its arguments.

The cases marked `gpu` are the same ones on a CUDA device, where the ops launch Triton.
"""

import pytest
import torch

from pvcore_kernels import ops
from tests.kernels.cases import requests, residual
from tests.kernels.in_place import ARGUMENTS, run, writing

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
DEVICES = ("cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NO_GPU]))


def test_every_op_that_writes_is_among_the_cases():
    assert callable(ops.steer_)  # registers them all
    schemas = {
        name.removeprefix("pvcore::"): getattr(torch.ops.pvcore, name.partition("::")[2]).default
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("pvcore::")
    }
    assert set(ARGUMENTS) == {name for name, op in schemas.items() if op._schema.is_mutable}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ARGUMENTS)
def test_what_is_written_has_a_new_version_and_nothing_else_has(name, device):
    found = writing(name, device)
    tensors = {key: one for key, one in found.given.items() if isinstance(one, torch.Tensor)}
    before = {key: one._version for key, one in tensors.items()}
    run(name, found)
    newer = {key for key, one in tensors.items() if one._version > before[key]}
    assert newer == set(found.written)


@pytest.mark.parametrize("device", DEVICES)
def test_autograd_refuses_rows_written_after_it_saved_them(device):
    h, weight = residual(3, 64, torch.float32), residual(64, 64, torch.float32, seed=1)
    h, weight = h.to(device), weight.to(device).requires_grad_()
    made = h @ weight
    delta, row = residual(2, 64, torch.float32, seed=3), requests(3, 2)
    ops.steer_(h, delta.to(device), row.to(device))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        made.sum().backward()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ARGUMENTS)
def test_tensors_of_inference_mode_are_written(name, device):
    with torch.inference_mode():
        found = writing(name, device)
        run(name, found)
    (first, *_) = (found.given[key] for key in found.written)
    assert not first.isnan().all()
