"""Thresholds from neutral data: a percentile of it, and how often neutral data would still ring."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pvcore.alarms import Threshold
from pvcore.errors import StatisticsError
from pvcore.intervals import Interval, wilson
from pvcore.numerals import Number
from pvcore.sites import Site

# Neutral values that may set a level: of fewer, a percentile is the highest or a guess.
FEWEST = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class AlarmLevel:
    """One trait's alarm level at one site.

    `false_positive_rate` is the share of `held_out` neutral conversations, none of which set the
    level, that rise above it, with its Wilson interval. `rung` are their places in the data.
    """

    trait: str
    site: Site
    threshold: Threshold
    percentile: float
    false_positive_rate: float
    interval: Interval
    held_out: int
    rung: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class AlarmLevels:
    """Alarm levels of all traits and sites. `alarms` goes into a monitor or a stream.

    Each level states its own rate. Armed together they ring more often: `any_rate` is the share of
    held-out neutral conversations that set off at least one, with `any_interval`.
    """

    levels: tuple[AlarmLevel, ...]
    confidence: float = 0.95

    @property
    def any_rate(self) -> float:
        return len(self._rung) / self.levels[0].held_out

    @property
    def any_interval(self) -> Interval:
        return wilson(len(self._rung), self.levels[0].held_out, self.confidence)

    @property
    def _rung(self) -> set[int]:
        return {place for level in self.levels for place in level.rung}

    @property
    def alarms(self) -> dict[str, dict[int | Site, Threshold | int | float]]:
        found: dict[str, dict[int | Site, Threshold | int | float]] = {}
        for level in self.levels:
            found.setdefault(level.trait, {})[level.site] = level.threshold
        return found

    def at(self, *layers: int | Site) -> "AlarmLevels":
        """The levels of some sites only; a bare number is a block's output."""
        wanted = {str(one) if isinstance(one, Site) else f"resid_post.{one}" for one in layers}
        kept = tuple(level for level in self.levels if str(level.site) in wanted)
        if {str(level.site) for level in kept} != wanted:
            raise StatisticsError(
                f"got {', '.join(sorted(wanted))}; these levels are for "
                f"{', '.join(dict.fromkeys(str(level.site) for level in self.levels))}"
            )
        return AlarmLevels(levels=kept, confidence=self.confidence)


def alarm_levels(
    neutral: Mapping[str, Float[Tensor, "layer value"]],
    sites: Sequence[Site],
    *,
    percentile: Number = 99.0,
    low_percentile: Number | None = None,
    confidence: float = 0.95,
    seed: int = 0,
) -> AlarmLevels:
    """Alarm levels from neutral projections, one value a conversation, for every trait and site.

    Half of the conversations, drawn by `seed` and the same for all levels, set each level at its
    `percentile`; the rest, which are as neutral, tell how often it still rings. `low_percentile`
    sets the level below which an alarm may ring again. Conversations with a NaN are left out;
    `StatisticsError` where fewer than 20 are left.
    """
    for value in (percentile, percentile if low_percentile is None else low_percentile):
        if not 0 < value < 100:
            raise StatisticsError(f"got percentile {value}; wanted one between 0 and 100")
    drawn = _drawn(neutral, sites, seed)
    levels = [
        _level(trait, site, row, drawn, percentile, low_percentile, confidence)
        for trait, values in neutral.items()
        for site, row in zip(sites, values.double(), strict=True)
    ]
    return AlarmLevels(levels=tuple(levels), confidence=confidence)


def _drawn(
    neutral: Mapping[str, Float[Tensor, "layer value"]], sites: Sequence[Site], seed: int
) -> Int[Tensor, " known"]:
    """The conversations known at every trait and site, in random order."""
    counts = {values.shape[1] for values in neutral.values()}
    if len(counts) != 1:
        raise StatisticsError(
            f"got {' and '.join(map(str, sorted(counts))) or 'no'} neutral values by trait; wanted "
            "one of each conversation for every trait"
        )
    for trait, values in neutral.items():
        if len(values) != len(sites):
            raise StatisticsError(f"got {len(values)} rows of {trait} for {len(sites)} sites")
    every = torch.cat(list(neutral.values()))
    known = (~every.isnan()).all(0).nonzero()[:, 0]
    if len(known) < FEWEST or not bool(every[:, known].isfinite().all()):
        raise StatisticsError(
            f"got {len(known)} neutral values of {', '.join(neutral)}; wanted {FEWEST} or more, "
            "all finite"
        )
    # In order the halves would differ where the data alternates, as pairs and two prompts do.
    generator = torch.Generator().manual_seed(seed)
    return known[torch.randperm(len(known), generator=generator)]


def _level(
    trait: str,
    site: Site,
    values: Tensor,
    drawn: Int[Tensor, " known"],
    percentile: Number,
    low_percentile: Number | None,
    confidence: float,
) -> AlarmLevel:
    held_out = drawn[1::2]
    setting = values[drawn[::2]]
    high = float(torch.quantile(setting, percentile / 100))
    low = None
    if low_percentile is not None:
        low = min(float(torch.quantile(setting, low_percentile / 100)), high)
    rung = sorted(held_out[values[held_out] > high].tolist())
    return AlarmLevel(
        trait=trait,
        site=site,
        threshold=Threshold(high, low),
        percentile=float(percentile),
        false_positive_rate=len(rung) / len(held_out),
        interval=wilson(len(rung), len(held_out), confidence),
        held_out=len(held_out),
        rung=tuple(rung),
    )
