"""Gradients of the ops on packed rows where there is nothing, or nobody to take them."""

import pytest
import torch

from pvcore_kernels import gradients, ops, rows
from tests.kernels.cases import residual, unit_rows
from tests.kernels.products import Products


def test_no_segment_gives_no_gradient():
    h = residual(5, 8, torch.float64).requires_grad_()
    for bounds in ([0], [2]):
        means = ops.segment_mean(h, torch.tensor(bounds, dtype=torch.int32))
        (grad,) = torch.autograd.grad(means.sum(), h)
        assert means.shape == (0, 8)
        assert torch.equal(grad, torch.zeros_like(h))
    (grad,) = torch.autograd.grad(ops.segment_mean(h, torch.tensor([1, 3]).int()).sum(), h)
    assert grad.tolist() == [[0.0] * 8, [0.5] * 8, [0.5] * 8, [0.0] * 8, [0.0] * 8]


def test_rows_are_gathered_again_for_vectors_that_want_gradients_alone(monkeypatch):
    h, v = residual(5, 8, torch.float32).requires_grad_(), unit_rows(2, 8, torch.float32)
    listed, seen = torch.tensor([4, 0, 4], dtype=torch.int32), []
    found = rows.listed

    def watched(*args, **kwargs):
        seen.append(args)
        return found(*args, **kwargs)

    monkeypatch.setattr("pvcore_kernels.gradients.listed", watched)
    ops.project(h, v, listed).sum().backward()
    assert seen == []
    assert torch.allclose(h.grad[4], 2 * v.sum(0))
    assert torch.allclose(h.grad[0], v.sum(0))
    ops.project(h, v.requires_grad_(), listed).sum().backward()
    assert len(seen) == 1
    assert torch.allclose(v.grad[0], (2 * h[4] + h[0]).detach(), atol=1e-6)


@pytest.mark.parametrize("name", ["project", "listed", "steer_project", "steer_project_tokens"])
def test_no_product_of_a_backward_may_be_rounded(name, monkeypatch):
    h, v = residual(5, 8, torch.float32).requires_grad_(), unit_rows(2, 8, torch.float32)
    delta, row = residual(3, 8, torch.float32, seed=3), torch.tensor([2, 0, -1, 1, 0]).int()
    calls = {
        "project": lambda: ops.project(h, v.requires_grad_()),
        "listed": lambda: ops.project(h, v.requires_grad_(), torch.tensor([4, 0]).int()),
        "steer_project": lambda: ops.steer_project(h, v.requires_grad_(), delta, row)[1],
        "steer_project_tokens": lambda: ops.steer_project_tokens(
            h, v.requires_grad_(), residual(5, 2, torch.float32, seed=4)
        )[1],
    }
    made = calls[name]()
    with Products(monkeypatch, gradients) as products:
        torch.autograd.grad(made.square().sum(), (h, v))
    assert len(products.seen) >= 1
    assert all(within for _, within in products.seen), products.seen


def test_rows_by_numbers_that_are_none():
    h = residual(3, 4, torch.bfloat16)
    picked = rows.listed(h, torch.tensor([2, 3, -1], dtype=torch.int32), outside=torch.nan)
    assert torch.equal(picked[0], h[2])
    assert picked[1:].isnan().all()
    none = rows.listed(h[:0], torch.tensor([0, -1], dtype=torch.int32), outside=0.0)
    assert torch.equal(none, torch.zeros(2, 4, dtype=torch.bfloat16))
