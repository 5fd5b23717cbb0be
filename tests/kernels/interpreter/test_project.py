"""`project` in the interpreter against float64 of the same rounded inputs."""

import pytest
import torch

from pvcore_kernels.tiled.project import project
from tests.kernels.cases import DTYPES, assert_scores, residual, same_bits, unit_rows

ROWS, VECTORS, WIDTHS = (1, 15, 16, 17, 33), (1, 7, 16, 17, 33, 128), (64, 96, 100, 896, 1000)


def scores_of(h, v, rows=None):
    n_rows = len(h) if rows is None else len(rows)
    out = torch.full((n_rows, len(v)), torch.nan)
    project(h, v, rows, out)
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("n_vec", VECTORS)
@pytest.mark.parametrize("n_rows", ROWS)
def test_scores_match_float64(n_rows, n_vec, width, dtype):
    h, v = residual(n_rows, width, dtype), unit_rows(n_vec, width, dtype)
    assert_scores(scores_of(h, v), h, v)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_rows", [1, 300])
def test_a_float32_bank_is_not_rounded_to_the_rows(dtype, n_rows):
    h, v = residual(n_rows, 896, dtype), unit_rows(33, 896, torch.float32)
    assert_scores(scores_of(h, v), h, v)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gathered_rows_are_those_rows(dtype):
    h, v = residual(40, 96, dtype), unit_rows(7, 96, dtype)
    rows = torch.tensor([39, 0, 5, 5, 17], dtype=torch.int32)
    assert same_bits(scores_of(h, v, rows), scores_of(h[rows], v))
    assert_scores(scores_of(h, v, rows), h[rows], v)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_lie_askew_are_copied(dtype):
    h, v = residual(5, 200, dtype), unit_rows(7, 200, dtype)
    for askew, vectors in ((h[:, ::2], v[:, ::2]), (h[:, 1:101], v[:, 1:101])):
        assert_scores(scores_of(askew, vectors), askew, vectors)


@pytest.mark.parametrize("n_rows", [1, 16, 17, 300])
def test_permuting_rows_or_vectors_permutes_scores_to_the_bit(n_rows):
    h, v = residual(n_rows, 96, torch.bfloat16), unit_rows(17, 96, torch.bfloat16)
    scores, rows, vectors = scores_of(h, v), torch.randperm(n_rows), torch.randperm(17)
    assert same_bits(scores_of(h[rows], v[vectors]), scores[rows][:, vectors])


def test_nothing_to_do_launches_nothing():
    h, v = residual(4, 64, torch.float32), unit_rows(3, 64, torch.float32)
    assert scores_of(h[:0], v).shape == (0, 3)
    assert scores_of(h, v[:0]).shape == (4, 0)
    assert scores_of(h, v, torch.empty(0, dtype=torch.int32)).shape == (0, 3)


def test_a_listed_row_outside_h_scores_nan():
    h, v = residual(4, 64, torch.float32), unit_rows(3, 64, torch.float32)
    scores = scores_of(h, v, torch.tensor([3, 4, -1, 0], dtype=torch.int32))
    assert scores[[1, 2]].isnan().all()
    assert_scores(scores[[0, 3]], h[[3, 0]], v)
