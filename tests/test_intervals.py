"""Intervals: against exact binomial coverage, and against Fisher's published formula."""

import math

import pytest

from pvcore.errors import StatisticsError
from pvcore.intervals import fisher, wilson


def test_fisher_is_atanh_plus_or_minus_its_standard_error() -> None:
    low, high = fisher(0.6, 28)
    error = 1.959963984540054 / math.sqrt(25)
    assert math.atanh(low) == pytest.approx(math.atanh(0.6) - error)
    assert math.atanh(high) == pytest.approx(math.atanh(0.6) + error)
    assert fisher(-0.6, 28) == pytest.approx((-high, -low))
    wide, narrow = (fisher(0.6, count) for count in (10, 1000))
    assert narrow.high - narrow.low < wide.high - wide.low
    assert fisher(1.0, 9) == (1.0, 1.0)


@pytest.mark.parametrize(("r", "count"), [(0.5, 3), (math.nan, 50)])
def test_where_there_is_no_interval_it_is_nan(r: float, count: int) -> None:
    assert all(map(math.isnan, fisher(r, count)))


def test_wilson_agrees_with_published_values() -> None:
    """Newcombe (1998), table I: 81/263, 15/148, 0/20 and 1/29 at 95%, without correction."""
    published = {
        (81, 263): (0.2553, 0.3662),
        (15, 148): (0.0624, 0.1605),
        (0, 20): (0.0, 0.1611),
        (1, 29): (0.0061, 0.1718),
    }
    for (hits, count), ends in published.items():
        assert wilson(hits, count) == pytest.approx(ends, abs=5e-5)


def test_wilson_covers_a_share_about_as_often_as_it_says() -> None:
    """Coverage summed over the exact binomial distribution, near 0 where others fail."""
    count = 200
    for share in (0.01, 0.05, 0.2):
        covered = sum(
            math.comb(count, hits) * share**hits * (1 - share) ** (count - hits)
            for hits in range(count + 1)
            if wilson(hits, count).low <= share <= wilson(hits, count).high
        )
        assert 0.92 < covered < 0.985


@pytest.mark.parametrize(("hits", "count"), [(3, 2), (-1, 5), (0, 0)])
def test_impossible_shares_are_refused(hits: int, count: int) -> None:
    with pytest.raises(StatisticsError, match=f"got {hits} hits among {count}"):
        wilson(hits, count)
