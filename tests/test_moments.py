"""Running moments against float64 over all rows at once."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pvcore import Moments


def test_bf16_rows_with_massive_dimensions_do_not_drift():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(50_000, 16, generator=generator) * 0.5
    rows[:, 0] += 3000
    rows[:, 1] += 150
    rows = rows.bfloat16()
    moments = Moments.zeros([16])
    for chunk in rows.split(37):
        moments = moments.add(chunk)
    exact = rows.double()
    assert moments.count == 50_000
    assert (moments.mean - exact.mean(0)).abs().max() / exact.mean(0).abs().max() < 1e-13
    assert torch.allclose(moments.variance, exact.var(0, unbiased=False), rtol=1e-9)
    naive = rows.float().sum(0) / 50_000
    assert (naive.double() - exact.mean(0)).abs().max() > 1e-6


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.integers(0, 1000))
def test_any_split_merges_to_the_same_moments(sizes, seed):
    rows = torch.randn(sum(sizes), 3, generator=torch.Generator().manual_seed(seed)) * 10
    parts = [Moments.zeros([3]).add(part) for part in rows.split(sizes)]
    merged = Moments.zeros([3])
    for part in parts:
        merged = merged.merge(part)
    assert merged.count == len(rows)
    if len(rows):
        assert torch.allclose(merged.mean, rows.double().mean(0), rtol=1e-12, atol=1e-12)
        assert torch.allclose(
            merged.variance, rows.double().var(0, unbiased=False), rtol=1e-12, atol=1e-12
        )


def test_nothing_seen_has_no_variance():
    assert Moments.zeros([2]).variance.isnan().all()
