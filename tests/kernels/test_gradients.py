"""Gradients of the ops on packed rows where there is nothing, or nobody to take them."""

import torch

from pvcore_kernels import ops
from tests.kernels.cases import residual


def test_no_segment_gives_no_gradient():
    h = residual(5, 8, torch.float64).requires_grad_()
    for bounds in ([0], [2]):
        means = ops.segment_mean(h, torch.tensor(bounds, dtype=torch.int32))
        (grad,) = torch.autograd.grad(means.sum(), h)
        assert means.shape == (0, 8)
        assert torch.equal(grad, torch.zeros_like(h))
    (grad,) = torch.autograd.grad(ops.segment_mean(h, torch.tensor([1, 3]).int()).sum(), h)
    assert grad.tolist() == [[0.0] * 8, [0.5] * 8, [0.5] * 8, [0.0] * 8, [0.0] * 8]
