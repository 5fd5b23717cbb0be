import math

import numpy as np
import pytest

from pvcore.correlation import MonitoredReply, correlations


def replies(rows: list[tuple[float, float, int]]) -> list[MonitoredReply]:
    return [MonitoredReply(projection=x, score=y, level=level) for x, y, level in rows]


def test_levels_can_make_r_high_where_replies_are_foretold_backwards() -> None:
    # Within each level the score falls with the projection; the levels themselves rise together.
    rows = [(10.0 * level + x, 40.0 * level - x, level) for level in range(3) for x in (-1, 0, 1)]
    found = correlations(replies([(float(x), float(y), level) for x, y, level in rows]))
    assert found.within == pytest.approx(-1.0)
    assert found.overall > 0.9


def test_one_level_has_the_same_r_twice_and_agrees_with_numpy() -> None:
    generator = np.random.default_rng(3)
    x = generator.normal(size=50)
    y = 40 + 10 * x + generator.normal(size=50) * 10
    found = correlations(replies([(float(a), float(b), 0) for a, b in zip(x, y, strict=True)]))
    assert found.overall == pytest.approx(np.corrcoef(x, y)[0, 1], abs=1e-12)
    assert found.within == pytest.approx(found.overall, abs=1e-12)
    assert abs(found.overall) < 0.99


def test_without_spread_r_is_undefined_not_zero() -> None:
    flat = correlations(replies([(0.1, 5.0, 0), (0.1, 7.0, 0), (0.1, 9.0, 0)]))
    assert math.isnan(flat.overall)
    alone = correlations(replies([(0.1, 5.3, 0), (0.7, 7.1, 1)]))
    assert math.isnan(alone.within)
    assert alone.overall == pytest.approx(1.0)
    assert math.isnan(correlations([]).overall)


def test_replies_with_nan_are_left_out() -> None:
    rows = [(0.0, 1.0, 0), (1.0, 2.5, 0), (2.0, 2.0, 0)]
    gap = [(math.nan, 90.0, 0), (50.0, math.nan, 1)]
    assert correlations(replies(rows + gap)) == correlations(replies(rows))
