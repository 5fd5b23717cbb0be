"""The largest rows, banks and batches that are promised: every op, as a GPU would run it."""

import pytest
import torch

from tests.kernels.cases import (
    assert_close,
    assert_scores,
    bounds,
    clipped,
    requests,
    residual,
    same_bits,
    unit_rows,
)

OPS = torch.ops.pvcore
pytestmark = pytest.mark.usefixtures("as_on_a_gpu")
# Rows, vectors, width: the widest, the most vectors, the most rows, and a width that is no power.
SIZES = [(2, 3, 16384), (3, 1024, 64), (2, 5, 14336)]
MOST_ROWS = 131072


def of(n_rows, n_vec, width):
    h, v = residual(n_rows, width, torch.bfloat16), unit_rows(n_vec, width, torch.float32)
    delta, row = 3 * residual(3, width, torch.float32, seed=3), requests(n_rows, 3)
    row[0], row[-1] = 2, -1
    return h, v, delta, row


def moved_by(h, delta, row):
    return h.double() + delta.double()[row.clamp(min=0).long()] * (row >= 0)[:, None]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_scores_and_steering(size):
    h, v, delta, row = of(*size)
    assert_scores(OPS.project.default(h, v), h, v)
    out, scores = OPS.steer_project.default(h, v, delta, row)
    assert_scores(scores, h, v)
    assert_close(out, moved_by(h, delta, row), torch.bfloat16)
    assert same_bits(out[-1], h[-1])
    assert (out[0] != h[0]).any()
    assert same_bits(OPS.steer.default(h, delta, row), out)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_coefficients_of_every_row(size):
    h, v, _, _ = of(*size)
    c = residual(len(h), len(v), torch.float32, seed=4)
    out, scores = OPS.steer_project_tokens.default(h, v, c)
    assert_scores(scores, h, v)
    assert_close(out, h.double() + c.double() @ v.double(), torch.bfloat16)


@pytest.mark.parametrize("size", [(2, 3, 16384), (2, 48, 4096)], ids=str)
def test_a_joint_step(size):
    h, v, _, row = of(*size)
    h = 3 * h
    h[0] = (h[0].float() + 5 * v[0]).to(h.dtype)
    low, high = bounds(3, len(v), size=0.02)
    inverse = torch.linalg.inv(v.double() @ v.double().T)
    out, scores = OPS.intervene.default(h, v, low, high, row, inverse.float())
    wanted = clipped(h, v, low, high, row, inverse)
    assert_close(out, wanted, torch.bfloat16)
    assert_scores(scores, h, v)
    assert (wanted - h.double()).norm() > 2 * (out.double() - wanted).norm()


def test_means_and_layers_of_the_widest_rows():
    h = residual(5, 16384, torch.bfloat16) + 1
    means = OPS.segment_mean.default(h, torch.tensor([0, 2, 5], dtype=torch.int32))
    wanted = torch.stack([h[:2].double().mean(0), h[2:].double().mean(0)])
    assert_close(means, wanted, torch.float32)
    v = torch.stack([unit_rows(3, 16384, torch.float32, seed=s) for s in range(2)])
    scores = OPS.project_layers.default([h, -h], v)
    for layer, rows in enumerate((h, -h)):
        assert_scores(scores[layer], rows, v[layer])


def test_the_most_rows():
    h, v, delta, row = of(MOST_ROWS, 1, 64)
    out, scores = OPS.steer_project.default(h, v, delta, row)
    assert_scores(scores, h, v)
    assert_close(out, moved_by(h, delta, row), torch.bfloat16)
    assert same_bits(out[row < 0], h[row < 0])
    assert (out[row >= 0] != h[row >= 0]).any(1).all()
