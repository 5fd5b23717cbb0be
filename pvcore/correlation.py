"""Do projections foretell scores? Pearson's r over all replies and within a prompt level."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pvcore.errors import StatisticsError
from pvcore.intervals import UNKNOWN, Interval, fisher, quantile_of_normal
from pvcore.numerals import Number

# With two points r is 1 or -1 whatever they say.
FEWEST = 3

Numbers = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class MonitoredReply:
    """A projection at the last prompt token, the score of the reply, and its prompt's level."""

    projection: Number
    score: Number
    level: int | str


@dataclass(frozen=True, slots=True, kw_only=True)
class Correlations:
    """Pearson's r over all replies, and with each level's means subtracted, with intervals.

    `by_level` is r inside each level alone and `count` the replies that had both numbers. NaN:
    undefined, because of fewer than three replies (beyond one for each level, for `within`) or
    because all projections or all scores are equal.
    """

    overall: float
    within: float
    overall_interval: Interval = UNKNOWN
    within_interval: Interval = UNKNOWN
    by_level: Mapping[int | str, float] = field(default_factory=dict)
    count: int = 0

    @property
    def mean_within(self) -> float:
        """The mean of the levels' own r, over the levels that have one."""
        known = [r for r in self.by_level.values() if not np.isnan(r)]
        return float(np.mean(known)) if known else float("nan")


def correlations(
    replies: Sequence[MonitoredReply],
    *,
    confidence: float = 0.95,
    interval: Literal["fisher", "bootstrap"] = "fisher",
    resamples: int = 2000,
    seed: int = 0,
    least_spread: float = 0.0,
) -> Correlations:
    """How well projections foretell scores; replies with a NaN are left out.

    The difference between levels makes `overall` high even where single replies are not foretold:
    `within` pools the replies after subtracting the means of their level. Intervals are Fisher's,
    or percentiles of `resamples` bootstraps that draw each level's replies anew. Levels whose
    scores have a standard deviation below `least_spread` count as saying nothing, in all figures
    (the paper, appendix C.2, leaves out those below 1).
    """
    if interval not in ("fisher", "bootstrap"):
        raise StatisticsError(f"got interval {interval!r}; wanted 'fisher' or 'bootstrap'")
    levels = _levels(replies, least_spread)
    parts = list(levels.values())
    overall, within, count = _overall(parts), _within(parts), sum(len(x) for x, _ in parts)
    if interval == "fisher":
        ends = (
            fisher(overall, count, confidence),
            fisher(within, count - len(parts) + 1, confidence),
        )
    else:
        ends = _bootstrap(parts, confidence, resamples, seed)
    return Correlations(
        overall=overall,
        within=within,
        overall_interval=ends[0],
        within_interval=ends[1],
        by_level={level: _pearson(x, y) for level, (x, y) in levels.items()},
        count=count,
    )


def _levels(
    replies: Sequence[MonitoredReply], least_spread: float
) -> dict[int | str, tuple[Numbers, Numbers]]:
    """Projections and scores of each level, in order of appearance."""
    known = [reply for reply in replies if np.isfinite([reply.projection, reply.score]).all()]
    grouped: dict[Hashable, list[MonitoredReply]] = {}
    for reply in known:
        grouped.setdefault(reply.level, []).append(reply)
    found = {}
    for rows in grouped.values():
        x = np.array([reply.projection for reply in rows], dtype=np.float64)
        y = np.array([reply.score for reply in rows], dtype=np.float64)
        if not (least_spread > 0 and (len(y) < 2 or y.std(ddof=1) < least_spread)):
            found[rows[0].level] = (x, y)
    return found


def _overall(parts: Sequence[tuple[Numbers, Numbers]]) -> float:
    if not parts:
        return float("nan")
    return _pearson(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def _within(parts: Sequence[tuple[Numbers, Numbers]]) -> float:
    centred = [(_centred(x), _centred(y)) for x, y in parts]
    free = sum(len(x) - 1 for x, _ in parts)
    return _overall(centred) if free >= FEWEST - 1 else float("nan")


def _centred(x: Numbers) -> Numbers:
    """Values without their mean. Equal ones leave dust of rounding, which is no spread: zeros."""
    centred: Numbers = x - x.mean()
    dust = 1e-12 * float(np.abs(x).max() + 1)
    return np.zeros_like(x) if float(np.abs(centred).max()) <= dust else centred


def _pearson(x: Numbers, y: Numbers) -> float:
    if len(x) < FEWEST:
        return float("nan")
    dx, dy = _centred(x), _centred(y)
    if not (dx.any() and dy.any()):
        return float("nan")
    return float(np.clip(dx @ dy / np.sqrt((dx @ dx) * (dy @ dy)), -1.0, 1.0))


def _bootstrap(
    parts: Sequence[tuple[Numbers, Numbers]], confidence: float, resamples: int, seed: int
) -> tuple[Interval, Interval]:
    """Percentiles of both r over resamples; draws in which r is undefined are left out."""
    quantile_of_normal(confidence)
    if resamples < 1:
        raise StatisticsError(f"got {resamples} resamples; wanted at least 1")
    generator = np.random.default_rng(seed)
    drawn = []
    for _ in range(resamples):
        rows = [generator.integers(len(x), size=len(x)) for x, _ in parts]
        again = [(x[row], y[row]) for (x, y), row in zip(parts, rows, strict=True)]
        drawn.append((_overall(again), _within(again)))
    return _percentiles([a for a, _ in drawn], confidence), _percentiles(
        [b for _, b in drawn], confidence
    )


def _percentiles(values: Sequence[float], confidence: float) -> Interval:
    known = np.array([value for value in values if not np.isnan(value)])
    if not len(known):
        return UNKNOWN
    tail = 50 * (1 - confidence)
    low, high = np.percentile(known, [tail, 100 - tail])
    return Interval(float(low), float(high))
