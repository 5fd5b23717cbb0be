"""Estimates: the mean, its interval, and whether the interval keeps its word."""

from __future__ import annotations

import numpy as np
import pytest

from pvcore.flag_estimates import Running, t_quantile


def test_parts_add_up_to_the_whole() -> None:
    rows = np.random.default_rng(0).normal(1e6, 1.0, (500, 3))
    rows[::7, 1] = np.nan
    rows[:, 2] = np.nan
    running = Running(3)
    for part in np.array_split(rows, 13):
        running.add(part)
    running.add(rows[:0])
    whole, some, none = running.estimates()
    assert whole.mean == pytest.approx(rows[:, 0].mean(), rel=1e-14)
    assert whole.deviation == pytest.approx(rows[:, 0].std(ddof=1), rel=1e-9)
    assert (whole.n, whole.of, whole.low, whole.high) == (500, 500, whole.mean, whole.mean)
    known = rows[~np.isnan(rows[:, 1]), 1]
    assert some.mean == pytest.approx(known.mean(), rel=1e-14)
    assert (some.n, some.of) == (len(known), 500)
    assert some.low < some.mean < some.high
    assert none.n == 0
    assert np.isnan([none.mean, none.low, none.deviation]).all()


def test_one_row_of_many_says_nothing_about_the_spread() -> None:
    running = Running(1)
    running.add(np.array([[1.0], [np.nan]]))
    (found,) = running.estimates()
    assert found.mean == 1.0
    assert np.isnan([found.low, found.high, found.deviation]).all()


def test_intervals_hold_the_mean_as_often_as_they_say() -> None:
    draw = np.random.default_rng(1)
    for size, share in ((200, 0.1), (60, 0.5)):
        held = 0
        for _ in range(800):
            data = draw.exponential(1.0, size) if share > 0.2 else draw.normal(0.0, 1.0, size)
            rows = np.where(draw.random(size) < share, data, np.nan)[:, None]
            running = Running(1)
            running.add(rows)
            (found,) = running.estimates()
            held += bool(found.low <= data.mean() <= found.high)
        assert 0.92 <= held / 800 <= 0.98


@pytest.mark.parametrize(
    ("freedom", "wanted"), [(1, 12.7062), (2, 4.3027), (3, 3.1824), (10, 2.2281), (1000, 1.9623)]
)
def test_quantiles_are_those_of_the_tables(freedom: int, wanted: float) -> None:
    assert t_quantile(0.975, freedom) == pytest.approx(wanted, rel=0.01)
