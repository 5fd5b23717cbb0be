"""The steering kernels in the interpreter against float64 of the same rounded inputs."""

import pytest
import torch

from pvcore_kernels.tiled import steer as tiled
from tests.kernels.cases import (
    DTYPES,
    assert_close,
    assert_scores,
    requests,
    residual,
    same_bits,
    unit_rows,
)

SHAPES = [
    (n_rows, n_vec, width)
    for n_rows in (1, 15, 16, 17, 33)
    for n_vec in (1, 7, 16, 17, 33, 128)
    for width in (64, 96, 100, 896, 1000)
]


def aligned_like(h):
    storage = torch.full((len(h), -(-h.shape[1] // 16) * 16), torch.nan, dtype=h.dtype)
    return storage[:, : h.shape[1]]


def steered(h, v, delta, row):
    out, scores = aligned_like(h), torch.full((len(h), len(v)), torch.nan)
    tiled.steer_project(h, v, delta, row, out, scores)
    return out, scores


def by_request(h, delta, row):
    """float64, written from the description."""
    moves = delta.double()[row.clamp(min=0).long()]
    return h.double() + moves * (row >= 0)[:, None]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES[::3], ids=str)
def test_steer_project_matches_float64(shape, dtype):
    n_rows, n_vec, width = shape
    h, v = residual(n_rows, width, dtype), unit_rows(n_vec, width, dtype)
    delta, row = 3 * residual(5, width, torch.float32, seed=3), requests(n_rows, 5)
    row[0] = 4
    out, scores = steered(h, v, delta, row)
    wanted = by_request(h, delta, row)
    assert_close(out, wanted, dtype)
    assert_scores(scores, h, v)
    assert same_bits(out[row < 0], h[row < 0])
    assert (wanted - h.double()).norm() > h.double().norm()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES[1::7], ids=str)
def test_steer_project_tokens_matches_float64(shape, dtype):
    n_rows, n_vec, width = shape
    h, v = residual(n_rows, width, dtype), unit_rows(n_vec, width, dtype)
    c = 4 * residual(n_rows, n_vec, torch.float32, seed=3)
    out, scores = aligned_like(h), torch.full((n_rows, n_vec), torch.nan)
    tiled.steer_project_tokens(h, v, c, out, scores)
    assert_close(out, h.double() + c.double() @ v.double(), dtype)
    assert_scores(scores, h, v)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [64, 100, 896, 1000])
@pytest.mark.parametrize("n_rows", [1, 15, 17, 33, 70])
def test_steer_matches_float64(n_rows, width, dtype):
    h, row = residual(n_rows, width, dtype), requests(n_rows, 5)
    delta = 3 * residual(5, width, torch.float32, seed=3)
    row[0] = 0
    out = aligned_like(h)
    tiled.steer(h, delta, row, out)
    assert_close(out, by_request(h, delta, row), dtype)
    assert same_bits(out[row < 0], h[row < 0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_in_place_is_the_same_to_the_bit(dtype):
    h, v = residual(33, 96, dtype), unit_rows(7, 96, dtype)
    delta, row, scores = residual(5, 96, dtype, seed=3), requests(33, 5), torch.empty(33, 7)
    out, wanted = steered(h, v, delta, row)
    moved, alone = h.clone(), h.clone()
    tiled.steer_project(moved, v, delta, row, moved, scores)
    tiled.steer(alone, delta, row, alone)
    assert same_bits(moved, out)
    assert same_bits(alone, out)
    assert same_bits(scores, wanted)
    c = residual(33, 7, torch.float32, seed=4)
    tokens, expected = h.clone(), torch.empty_like(h)
    tiled.steer_project_tokens(h, v, c, expected, scores)
    tiled.steer_project_tokens(tokens, v, c, tokens, scores)
    assert same_bits(tokens, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_without_a_request_keeps_nan_payloads_and_the_sign_of_zero(dtype):
    h, v = residual(4, 64, dtype), unit_rows(3, 64, dtype)
    h[1] = -0.0
    h.view(torch.int32 if dtype == torch.float32 else torch.int16)[2, 5] = -3  # a NaN of its own
    row = torch.tensor([0, -1, -1, 9], dtype=torch.int32)  # 9: no such request, left alone
    delta = residual(2, 64, torch.float32)
    for out in (steered(h, v, delta, row)[0], aligned_like(h)):
        tiled.steer(h, delta, row, out)
        assert same_bits(out[1:], h[1:])
        assert not torch.equal(out[0], h[0])


@pytest.mark.parametrize("n_rows", [16, 33])
def test_a_row_alone_and_in_a_batch_are_the_same_to_the_bit(n_rows):
    h, v = residual(n_rows, 896, torch.bfloat16), unit_rows(7, 896, torch.bfloat16)
    delta, row = residual(5, 896, torch.float32, seed=3), requests(n_rows, 5)
    out, scores = steered(h, v, delta, row)
    order = torch.randperm(n_rows)
    shuffled, shuffled_scores = steered(h[order], v, delta, row[order])
    assert same_bits(shuffled, out[order])
    assert same_bits(shuffled_scores, scores[order])
    alone, alone_scores = steered(h[3:4], v, delta, row[3:4])
    assert same_bits(alone, out[3:4])
    assert same_bits(alone_scores, scores[3:4])


def test_no_rows_launch_nothing():
    h, v = residual(0, 64, torch.float32), unit_rows(3, 64, torch.float32)
    delta, row = residual(2, 64, torch.float32), torch.empty(0, dtype=torch.int32)
    out, scores = steered(h, v, delta, row)
    assert out.shape == (0, 64)
    assert scores.shape == (0, 3)
