"""Ranks of scores: what rounding alone tells apart is one, and the earlier row comes first."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from numpy.typing import NDArray

from pvcore.flag_ranking import ROUNDING, highest, resolution

TIE = 1e-5


def cut(values: NDArray[np.float64], size: int) -> Iterator[NDArray[np.float64]]:
    for first in range(0, len(values), size):
        yield values[first : first + size]


@pytest.mark.parametrize("n", [1, 5, 17, 400, 1000])
def test_without_ties_the_order_is_that_of_the_scores(n: int) -> None:
    values = np.random.default_rng(0).permutation(500) / 7.0
    values[::9] = np.nan
    wanted = [at for at in np.argsort(-values, kind="stable").tolist() if not np.isnan(values[at])]
    for size in (1, 64, 500):
        assert highest(lambda size=size: cut(values, size), n, TIE) == wanted[:n]


@pytest.mark.parametrize("n", [3, 40, 41, 100])
def test_rounding_changes_no_rank_of_rows_that_are_equal(n: int) -> None:
    draw = np.random.default_rng(1)
    exact = draw.integers(0, 8, 300) / 3.0
    wanted = np.lexsort((np.arange(300), -exact)).tolist()[:n]
    seen = set()
    for _ in range(5):
        values = exact + draw.uniform(-1, 1, 300) * TIE / 20
        seen.add(tuple(np.argsort(-values, kind="stable").tolist()[:n]))
        assert highest(lambda values=values: cut(values, 32), n, TIE) == wanted
    assert len(seen) == 5, "a plain sort gives another list each time"


def test_scores_farther_apart_than_a_tie_are_told_apart() -> None:
    values = np.array([1.0, 1.0 + 0.9 * TIE, 1.0 - 0.2 * TIE, 2.0])
    assert highest(lambda: [values], 3, TIE) == [3, 0, 1]
    assert highest(lambda: [values], 4, TIE) == [3, 0, 1, 2]
    assert highest(lambda: [np.array([np.nan])], 4, TIE) == []
    assert highest(lambda: [], 4, TIE) == []


def test_the_resolution_is_a_share_of_the_larger_column() -> None:
    draw = np.random.default_rng(2)
    values = draw.normal(size=(100, 2)) * [3.0, 0.01]
    values[7, 0] = np.nan
    known = np.nan_to_num(values)
    wanted = ROUNDING * np.sqrt((known[:, 0] ** 2).mean())
    assert resolution(iter([values[:33], values[33:]])) == pytest.approx(wanted)
    assert resolution(iter([])) == 0.0
