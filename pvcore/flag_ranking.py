"""Ranks: the order of rows by a score, where rows in other batches differ by rounding alone."""

from collections.abc import Callable, Iterable

import numpy as np
from numpy.typing import NDArray

Scores = NDArray[np.float64]
# What float32 leaves open between one batch and another, as a share of a usual score.
ROUNDING = 1e-5


def resolution(parts: Iterable[Scores]) -> float:
    """What two scores `[row, column]` may differ by and still be one: a share of their usual size.

    Equal rows have equal scores only up to the batches that they were in.
    """
    squares, rows = 0.0, 0
    for values in parts:
        squares = squares + np.square(np.nan_to_num(values)).sum(axis=0)
        rows += len(values)
    return ROUNDING * float(np.sqrt(np.max(squares) / rows)) if rows else 0.0


def highest(parts: Callable[[], Iterable[Scores]], n: int, tie: float) -> list[int]:
    """The places of the `n` highest scores `[row]`, best first; of a tie the earlier row.

    Scores within `tie` of the highest of them are one. NaN is no score.
    """
    best: Scores = np.empty(0)
    for values in parts():
        best = np.concatenate([best, values[~np.isnan(values)]])
        if len(best) > n:
            best = np.partition(best, len(best) - n)[len(best) - n :]
    best = np.sort(best)[::-1]
    heads: list[float] = []
    for score in best.tolist():
        if not heads or score < heads[-1] - tie:
            heads.append(score)
    if not heads:
        return []
    # More rows than are wanted may share the last place: the first of them are taken.
    spare, last, seen = int((best <= heads[-1]).sum()), len(heads) - 1, 0
    found: list[tuple[int, int]] = []
    for values in parts():
        places = np.flatnonzero(values >= heads[-1] - tie)
        ranks = np.searchsorted(-np.array(heads), -values[places], side="right") - 1
        for place, rank in zip(places.tolist(), ranks.tolist(), strict=True):
            if rank < last or spare:
                spare -= rank == last
                found.append((rank, seen + place))
        seen += len(values)
    return [place for _, place in sorted(found)]
