"""Fused sites: what the op is given, and when what it made may be used."""

import pytest
import torch
from torch import Tensor

import pvcore_kernels as kernels
from pvcore.fused_sites import FusedNorms, FusedSite, Late, Made, Under, adding
from pvcore.programs import Shift
from pvcore.rms_norms import as_rms_norm
from pvcore_kernels import ops
from tests.families import D_MODEL
from tests.test_fusion import counted, new

SHAPE = (2, 5, D_MODEL)


def site() -> FusedSite:
    taps = new("llama").model._taps
    block, following = taps.decoder.blocks[:2]
    return FusedSite(taps, 0, block.mlp, as_rms_norm(following.input_layernorm, "norm"))


def rows(seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)).to(dtype)


def late(under: Under, seed: int = 1) -> Late:
    x = rows(seed).as_subclass(Late)
    x.under = under
    return x


@torch.no_grad()
def test_a_sum_of_either_order_is_the_ops_and_brings_the_next_norm() -> None:
    fused = site()
    for total in (lambda x, h: x + h, lambda x, h: h + x):
        under = Under(fused, None, None, FusedNorms())
        with counted() as calls:
            got = total(late(under), rows(2))
        assert len(calls) == 1
        assert type(got) is Tensor
        assert torch.equal(got, rows(1) + rows(2))
        made = under.made
        assert made is not None
        assert made.moved is got
        assert torch.equal(made.normed, fused.norm.module(got))
        assert not under.steered


@torch.no_grad()
def test_anything_but_the_first_sum_of_an_open_block_is_plain_arithmetic() -> None:
    under = Under(site(), None, None, FusedNorms())
    x, h, wanted = late(under), rows(2), rows(1)
    with counted() as calls:
        plain = [
            (x * 2, wanted * 2),
            (x + 1.0, wanted + 1.0),
            (1.0 + x, 1.0 + wanted),
            (x - h, wanted - h),
            (torch.add(h, x), h + wanted),
            (h.clone().add_(x), h + wanted),
            (x + h[:1], wanted + h[:1]),
            (x + h.double(), wanted + h.double()),
            (x.view(-1), wanted.view(-1)),
            (torch.nn.functional.dropout(x, training=False), wanted),
        ]
    assert not calls
    assert all(torch.equal(got, other) for got, other in plain)
    assert all(type(got) in (Tensor, Late) for got, _ in plain)
    assert under.made is None
    first, second = x + h, x + h
    assert under.made is not None
    assert under.made.moved is first
    assert torch.equal(second, first)
    closed = Under(under.site, None, None, FusedNorms())
    closed.closed = True
    with counted() as calls:
        assert torch.equal(late(closed) + h, first)
    assert not calls


def test_what_was_written_over_holds_no_more() -> None:
    place = site()

    def made(h: Tensor) -> Made:
        return Made(place, h, h, None if h.is_inference() else h._version)

    h = rows(1)
    one = made(h)
    assert one.holds(h)
    assert not one.holds(h.clone())
    assert not one.holds(h.view(SHAPE))
    assert not one.holds(None)
    h[0].zero_()
    assert not one.holds(h)
    assert made(h).holds(h)
    with torch.inference_mode():
        quick = rows(1)
        assert made(quick).holds(quick)
        assert not made(quick).holds(quick.clone())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("pos", [1, 5])
@pytest.mark.parametrize("batch", [1, 2])
@torch.no_grad()
def test_shifts_of_all_shapes_are_what_the_reference_adds(
    batch: int, pos: int, dtype: torch.dtype
) -> None:
    total, h = 10 * rows(3)[:batch, :pos], rows(2, dtype)
    some = torch.rand(SHAPE[:2], generator=torch.Generator().manual_seed(4))[..., None] > 0.5
    weight = torch.ones(D_MODEL, dtype=dtype)
    for touched in (None, some, some[:1], some[:, :1]):
        move = adding(Shift(total=total, touched=touched), h)
        flat = h.view(-1, D_MODEL)
        moved = ops.add_rmsnorm_steer_project(
            torch.zeros_like(flat), flat, weight, 1e-6, move.delta, move.row, flat[:0], False
        )[1]
        assert torch.equal(moved.view(SHAPE), kernels.add(h, total, touched))
        assert move.steers
        assert len(move.delta) == batch * pos
