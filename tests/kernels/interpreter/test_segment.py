"""`segment_mean` in the interpreter against float64 of the same rounded inputs."""

from itertools import pairwise

import pytest
import torch

from pvcore_kernels.tiled.segment import segment_mean
from tests.kernels.cases import DTYPES, assert_close, residual


def means_of(h, bounds):
    out = torch.full((len(bounds) - 1, h.shape[1]), torch.nan)
    segment_mean(h, torch.tensor(bounds, dtype=torch.int32), out)
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [64, 96, 100, 896, 1000])
@pytest.mark.parametrize("bounds", [[0, 1], [0, 33], [2, 18, 19, 90], [0, 15, 32, 64, 97]], ids=str)
def test_means_match_float64(bounds, width, dtype):
    h = residual(97, width, dtype) + 1
    wanted = torch.stack([h[s:e].double().mean(0) for s, e in pairwise(bounds)])
    got = means_of(h, bounds)
    assert got.dtype == torch.float32
    assert_close(got, wanted, torch.float32)
    assert (wanted - h.double().mean(0)).norm() > 0.1


@pytest.mark.filterwarnings("ignore:invalid value encountered in divide")  # numpy, of 0/0
def test_an_empty_segment_is_nan_and_its_neighbours_are_not():
    means = means_of(residual(6, 64, torch.float32), [0, 3, 3, 6])
    assert means[1].isnan().all()
    assert means[[0, 2]].isfinite().all()


def test_no_segments_launch_nothing():
    assert means_of(residual(6, 64, torch.float32), [0]).shape == (0, 64)


@pytest.mark.filterwarnings("ignore:invalid value encountered in divide")
def test_a_segment_with_a_bound_outside_h_is_nan():
    means = means_of(residual(6, 64, torch.float32), [-1, 2, 1, 4, 7])
    assert means[[0, 1, 3]].isnan().all()
    assert means[2].isfinite().all()
