"""Products that a process's TF32 does not round: as an op, and in the reference.

The cases marked `gpu` are the same ones on a CUDA device.
"""

from contextlib import contextmanager

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pvcore_kernels import AddStep, ops, reference
from tests.kernels.cases import residual, unit_rows

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
DEVICES = ("cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NO_GPU]))
PRODUCTS = ("mm", "bmm", "addmm", "baddbmm", "mv", "dot")


def given(device, dtype=torch.bfloat16):
    h, m = residual(6, 256, dtype).view(3, 2, 256), unit_rows(5, 256, torch.float32).mT
    return h.to(device), m.to(device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_op_is_the_product(device, dtype):
    h, m = given(device, dtype)
    got = ops.product(h, m)
    wanted = h.double() @ m.double()
    assert (got.dtype, got.shape) == (torch.float32, (3, 2, 5))
    assert (got - wanted).abs().max() < 1e-6 * h.double().norm(dim=-1).max()
    torch.library.opcheck(torch.ops.pvcore.product.default, (h, m))


@pytest.mark.parametrize("device", DEVICES)
def test_the_op_is_whole_to_a_compiler(device):
    h, m = given(device)
    step = torch.compile(lambda h, m: ops.product(h, m) + 1, backend="aot_eager", fullgraph=True)
    assert torch.equal(step(h, m), ops.product(h, m) + 1)


class Noting(TorchDispatchMode):
    """Notes of every product whether it is made where nothing is rounded."""

    def __init__(self, within):
        super().__init__()
        self.within, self.found = within, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in PRODUCTS:
            self.found.append(bool(self.within))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("way", ["project", "project_layers", "intervene"])
def test_the_reference_makes_every_product_where_nothing_is_rounded(way, monkeypatch):
    within = []

    @contextmanager
    def precise(_device):
        within.append(way)
        try:
            yield
        finally:
            within.pop()

    monkeypatch.setattr(reference, "precise", precise)
    h, m = given("cpu", torch.float32)
    units = m.mT
    with Noting(within) as noted:
        if way == "project":
            reference.project(h, units)
        elif way == "project_layers":
            reference.project_layers(h, units[None].expand(3, -1, -1))
        else:
            step = AddStep(shift=torch.ones(5))
            clip = reference.CapStep(index=(0, 1), gram_inverse=torch.eye(2), high=0.1)
            reference.intervene(h, units, units @ units.mT, [step, clip])
    # The Gram matrix of `intervene` is made by the test itself, outside.
    assert noted.found.count(False) == (way == "intervene")
    assert noted.found.count(True) >= (4 if way == "intervene" else 1)


@pytest.mark.gpu
@NO_GPU
def test_neither_op_nor_reference_is_rounded_where_a_process_allows_tf32():
    h, m = given("cuda", torch.float32)
    ways = (ops.product, lambda h, m: reference.project(h, m.mT))
    exact = [way(h, m) for way in ways]
    torch.set_float32_matmul_precision("high")
    try:
        assert not torch.equal(h @ m, exact[0])
        for way, wanted in zip(ways, exact, strict=True):
            assert torch.equal(way(h, m), wanted)
    finally:
        torch.set_float32_matmul_precision("highest")
