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
    """A projection at the last prompt token, the score of the reply, and its prompt's level.

    `prompt` is anything that tells the prompts of a level apart. Replies without one are taken to
    share a prompt where their projections are equal but for rounding, as those to one prompt are.
    """

    projection: Number
    score: Number
    level: int | str
    prompt: Hashable = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Correlations:
    """Pearson's r over all replies, and with each level's means subtracted, with intervals.

    `by_level` is r inside each level alone, `count` the replies that had both numbers and `prompts`
    the prompts they answered. NaN: undefined, because of fewer than three replies (beyond one for
    each level, for `within`) or because all projections or all scores are equal.
    """

    overall: float
    within: float
    overall_interval: Interval = UNKNOWN
    within_interval: Interval = UNKNOWN
    by_level: Mapping[int | str, float] = field(default_factory=dict)
    count: int = 0
    prompts: int = 0

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
    rounding: float = 1e-4,
) -> Correlations:
    """How well projections foretell scores; replies with a NaN are left out.

    The difference between levels makes `overall` high even where single replies are not foretold:
    `within` pools the replies after subtracting the means of their level. Replies to one prompt are
    not independent, so intervals are about other prompts at these levels: Fisher's counts prompts
    for replies, fewer where some have more replies and so more say in r, which errs towards wide
    ones; the bootstrap draws each level's prompts anew, `resamples` times, with all their replies
    (no interval where a level has one prompt only).
    Levels whose scores have a standard deviation below `least_spread` say nothing, in all figures
    (the paper, appendix C.2: below 1). Replies without a `prompt` share one where projections
    differ by at most `rounding` times the largest (half precision: 1e-2).
    """
    _check(interval, rounding)
    levels = _levels(replies, least_spread)
    clusters = [_by_prompt(rows, rounding) for rows in levels.values()]
    parts = [_numbers(rows) for rows in levels.values()]
    overall, within = _overall(parts), _within(parts)
    if interval == "fisher":
        ends = _fisher((overall, within), clusters, confidence)
    else:
        ends = _bootstrap(clusters, confidence, resamples, seed)
    return Correlations(
        overall=overall,
        within=within,
        overall_interval=ends[0],
        within_interval=ends[1],
        by_level={level: _pearson(*part) for level, part in zip(levels, parts, strict=True)},
        count=sum(map(len, levels.values())),
        prompts=sum(map(len, clusters)),
    )


def _check(interval: str, rounding: float) -> None:
    if interval not in ("fisher", "bootstrap"):
        raise StatisticsError(f"got interval {interval!r}; wanted 'fisher' or 'bootstrap'")
    if not 0 <= rounding < 1:
        raise StatisticsError(f"got a rounding of {rounding}; wanted a share such as 1e-4")


def _levels(
    replies: Sequence[MonitoredReply], least_spread: float
) -> dict[int | str, list[MonitoredReply]]:
    """The replies of each level that have both numbers, in order of appearance."""
    known = [reply for reply in replies if np.isfinite([reply.projection, reply.score]).all()]
    grouped: dict[Hashable, list[MonitoredReply]] = {}
    for reply in known:
        grouped.setdefault(reply.level, []).append(reply)
    found = {}
    for rows in grouped.values():
        _, y = _numbers(rows)
        if not (least_spread > 0 and (len(y) < 2 or y.std(ddof=1) < least_spread)):
            found[rows[0].level] = rows
    return found


def _numbers(rows: Sequence[MonitoredReply]) -> tuple[Numbers, Numbers]:
    """Projections and scores."""
    return (
        np.array([reply.projection for reply in rows], dtype=np.float64),
        np.array([reply.score for reply in rows], dtype=np.float64),
    )


def _by_prompt(rows: Sequence[MonitoredReply], rounding: float) -> list[tuple[Numbers, Numbers]]:
    """Projections and scores of the replies to each prompt of a level."""
    alike = _alike([float(reply.projection) for reply in rows if reply.prompt is None], rounding)
    shared: dict[Hashable, list[MonitoredReply]] = {}
    for reply in rows:
        told = reply.prompt is not None
        prompt = reply.prompt if told else alike[float(reply.projection)]
        shared.setdefault((told, prompt), []).append(reply)
    return [_numbers(replies) for replies in shared.values()]


def _alike(values: Sequence[float], rounding: float) -> dict[float, float]:
    """Each value with the lowest of those it is taken for equal to.

    All are measured against the lowest: neighbours of neighbours would join many into one.
    """
    reach = rounding * max(map(abs, values), default=0.0)
    lowest, alike = -np.inf, {}
    for value in sorted(values):
        lowest = value if value - lowest > reach else lowest
        alike[value] = lowest
    return alike


def _fisher(
    both: tuple[float, float],
    levels: Sequence[Sequence[tuple[Numbers, Numbers]]],
    confidence: float,
) -> tuple[Interval, Interval]:
    """Intervals of r over all replies and within levels, whose means cost a point each."""
    points, apart = _effective(levels), len(levels) - 1
    return fisher(both[0], points, confidence), fisher(both[1], points - apart, confidence)


def _effective(levels: Sequence[Sequence[tuple[Numbers, Numbers]]]) -> float:
    """How many prompts of equally many replies would leave r as uncertain as these (Kish)."""
    replies = [len(x) for prompts in levels for x, _ in prompts]
    squares = sum(count * count for count in replies)
    return sum(replies) ** 2 / squares if squares else 0.0


def _overall(parts: Sequence[tuple[Numbers, Numbers]]) -> float:
    return _pearson(*_joined(parts)) if parts else float("nan")


def _joined(parts: Sequence[tuple[Numbers, Numbers]]) -> tuple[Numbers, Numbers]:
    return np.concatenate([x for x, _ in parts]), np.concatenate([y for _, y in parts])


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
    levels: Sequence[Sequence[tuple[Numbers, Numbers]]],
    confidence: float,
    resamples: int,
    seed: int,
) -> tuple[Interval, Interval]:
    """Percentiles of both r over resamples; draws in which r is undefined are left out."""
    quantile_of_normal(confidence)
    if resamples < 1:
        raise StatisticsError(f"got {resamples} resamples; wanted at least 1")
    if min(map(len, levels), default=0) < 2:
        return UNKNOWN, UNKNOWN  # one prompt drawn again and again would look like certainty
    generator = np.random.default_rng(seed)
    drawn = []
    for _ in range(resamples):
        picks = [generator.integers(len(prompts), size=len(prompts)) for prompts in levels]
        again = [
            _joined([prompts[pick] for pick in picked])
            for prompts, picked in zip(levels, picks, strict=True)
        ]
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
