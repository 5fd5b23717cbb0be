"""Estimates: the mean, its interval, and whether the interval keeps its word."""

from __future__ import annotations

import numpy as np
import pytest

from pvcore.flag_estimates import Running, of_subset, t_quantile


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


def test_the_interval_of_a_subset_keeps_its_word_where_a_trait_is_rare() -> None:
    """Responses of a few rows bear the trait, own replies do not; one row in twenty is drawn."""
    draw = np.random.default_rng(2)
    held = plain = 0
    reaches, plain_reaches = [], []
    for _ in range(1000):
        prompt = draw.normal(0.0, 0.3, 400)
        own = prompt + draw.normal(0.0, 0.5, 400)
        response = prompt + draw.normal(0.0, 0.5, 400) + 10.0 * (np.arange(400) < 20)
        drawn = draw.random(400) < 0.05
        rows = np.stack([response, own, response - own], axis=1)
        rows[~drawn, 1:] = np.nan
        running = Running(3)
        running.add(rows)
        columns = running.estimates()
        found = of_subset(*columns)
        assert found.mean == pytest.approx(response.mean() - own[drawn].mean(), abs=1e-9)
        assert (found.n, found.of) == (int(drawn.sum()), 400)
        truth = (response - own).mean()
        held += bool(found.low <= truth <= found.high)
        plain += bool(columns[2].low <= truth <= columns[2].high)
        reaches.append(found.high - found.low)
        plain_reaches.append(columns[2].high - columns[2].low)
    assert 0.935 <= held / 1000 <= 0.97
    assert plain / 1000 < 0.8  # by the differences of the rows drawn alone
    assert np.median(reaches) < np.median(plain_reaches)


def test_own_replies_of_all_rows_or_of_one_leave_no_doubt_or_nothing_but() -> None:
    rows = np.random.default_rng(3).normal(0.0, 1.0, (30, 3))
    rows[:, 2] = rows[:, 0] - rows[:, 1]
    for n in (30, 1, 0):
        cut = rows.copy()
        cut[n:, 1:] = np.nan
        running = Running(3)
        running.add(cut)
        found = of_subset(*running.estimates())
        assert (found.n, found.of) == (n, 30)
        if n == 30:
            assert found.mean == pytest.approx(rows[:, 2].mean(), abs=1e-12)
            assert found.low == found.mean == found.high
        else:
            assert np.isnan([found.low, found.high]).all()
            assert np.isnan(found.mean) == (n == 0)


@pytest.mark.parametrize(
    ("freedom", "wanted"), [(1, 12.7062), (2, 4.3027), (3, 3.1824), (10, 2.2281), (1000, 1.9623)]
)
def test_quantiles_are_those_of_the_tables(freedom: int, wanted: float) -> None:
    assert t_quantile(0.975, freedom) == pytest.approx(wanted, rel=0.01)
