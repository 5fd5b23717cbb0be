"""Gradients of a joint step at its kinks, beside rows that rest, and without any request."""

import pytest
import torch

from pvcore_kernels import gradients_joint, ops
from tests.kernels.cases import residual, unit_rows
from tests.kernels.products import Products

WIDE = torch.float64
NOBODY = torch.full((3,), -1, dtype=torch.int32)


def operands(*, n_requests=2):
    v = unit_rows(2, 8, WIDE)
    # Every score is below the bounds of the first request and above those of the second.
    low = torch.tensor([[5.0], [-5.0]], dtype=WIDE).expand(2, 2)[:n_requests].clone()
    row = torch.tensor([0, 1, -1], dtype=torch.int32)
    return residual(3, 8, WIDE), v, low, low + 0.2, row, torch.linalg.inv(v @ v.mT)


@pytest.mark.parametrize("at", [0.0, 2.0])
def test_a_score_already_where_it_is_sent_is_held_there(at):
    _h, _v, _low, _high, _row, inverse = operands()
    v, inverse = torch.eye(2, 8, dtype=WIDE), torch.eye(2, dtype=WIDE)
    h = residual(3, 8, WIDE)
    h[0] = at
    h[1, :2] = at
    h.requires_grad_()
    fixed, row = torch.full((1, 2), at, dtype=WIDE), torch.zeros(3, dtype=torch.int32)

    def moved(rows):
        return ops.intervene(rows, v, fixed, fixed, row, inverse)[0]

    assert torch.autograd.gradcheck(moved, (h,))
    (grad,) = torch.autograd.grad(moved(h).sum(), h)
    assert torch.equal(grad[:, :2], torch.zeros(3, 2, dtype=WIDE))
    assert torch.equal(grad[:, 2:], torch.ones(3, 6, dtype=WIDE))


def test_a_row_that_rests_reaches_no_request_however_wild_its_gradient():
    h, *others, row, inverse = operands()
    given = [one.requires_grad_() for one in (h, *others, inverse)]
    h, v, low, high, inverse = given
    moved, _scores = ops.intervene(h, v, low, high, row, inverse)
    wild = torch.ones_like(moved)
    wild[2] = torch.nan
    tame = wild.nan_to_num()
    got = torch.autograd.grad(moved, given, wild, retain_graph=True)
    wanted = torch.autograd.grad(moved, given, tame)
    assert got[0][2].isnan().all()
    assert torch.equal(got[0][:2], wanted[0][:2])
    for one, other in zip(got[1:], wanted[1:], strict=True):
        assert torch.equal(one, other)
        assert other.abs().sum() > 0


def test_a_row_of_nan_that_rests_reaches_no_delta():
    x, v, row = residual(3, 8, WIDE), unit_rows(2, 8, WIDE), operands()[4]
    delta = residual(2, 8, WIDE, seed=3).requires_grad_()
    x[2] = torch.nan
    given = residual(3, 8, WIDE, seed=4), torch.ones(8, dtype=WIDE), 1e-6, delta, row, v
    y, _, _ = ops.add_rmsnorm_steer_project(x, *given)
    (grad,) = torch.autograd.grad(y[:2].square().sum() + 0 * y.nan_to_num().sum(), delta)
    assert grad.isfinite().all()
    assert (grad.abs().sum(1) > 0).all()


def test_no_product_of_a_backward_may_be_rounded(monkeypatch):
    h, v, low, high, row, inverse = (
        one.float() if one.is_floating_point() else one for one in operands()
    )
    given = [one.requires_grad_() for one in (h, v, low, high, inverse)]
    delta, weight = residual(2, 8, torch.float32, seed=3), torch.ones(8)
    made = {
        "intervene": ops.intervene(h, v, low, high, row, inverse),
        "layers": (ops.project_layers([h, h], torch.stack([v, v])),),
        "norm": ops.add_rmsnorm_steer_project(h, h, weight, 1e-6, delta, row, v),
    }
    for name, outputs in made.items():
        total = sum(one.square().sum() for one in outputs)
        with Products(monkeypatch, gradients_joint) as products:
            torch.autograd.grad(total, given, allow_unused=True)
        inner = [within for product, within in products.seen]
        assert len(inner) >= 2, name
        assert all(inner), (name, products.seen)


def test_without_a_request_gradients_pass():
    h, v, low, high, _row, inverse = operands(n_requests=0)
    given = [one.requires_grad_() for one in (h, v, low, high, inverse)]
    moved, _scores = ops.intervene(h, v, low, high, NOBODY, inverse)
    moved.sum().backward()
    assert torch.equal(h.grad, torch.ones_like(h))
    assert [one.grad.abs().sum() for one in given[1:]] == [0, 0, 0, 0]
    assert low.grad.shape == (0, 2)
    delta = torch.empty(0, 8, dtype=WIDE).requires_grad_()
    weight = torch.ones(8, dtype=WIDE)
    y, _, _ = ops.add_rmsnorm_steer_project(h.detach(), h, weight, 1e-6, delta, NOBODY, v)
    y.sum().backward()
    assert delta.grad.shape == (0, 8)
