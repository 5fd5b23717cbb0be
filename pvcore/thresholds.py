"""Thresholds from neutral data: a percentile of it, and how often neutral data would still ring."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
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

    `false_positive_rate` is the share of `held_out` neutral values, none of which set the level,
    that lie above it, with its Wilson interval.
    """

    trait: str
    site: Site
    threshold: Threshold
    percentile: float
    false_positive_rate: float
    interval: Interval
    held_out: int


@dataclass(frozen=True, slots=True, kw_only=True)
class AlarmLevels:
    """Alarm levels of all traits and sites. `alarms` goes into a monitor or a stream."""

    levels: tuple[AlarmLevel, ...]

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
        return AlarmLevels(levels=kept)


def alarm_levels(
    neutral: Mapping[str, Float[Tensor, "layer value"]],
    sites: Sequence[Site],
    *,
    percentile: Number = 99.0,
    low_percentile: Number | None = None,
    confidence: float = 0.95,
) -> AlarmLevels:
    """Alarm levels from neutral projections, one value a conversation, for every trait and site.

    Every other value sets the level, at its `percentile`; the rest, which are as neutral, tell how
    often it still rings. `low_percentile` sets the level below which an alarm may ring again.
    Values that are NaN are left out; `StatisticsError` where fewer than 20 are left.
    """
    for value in (percentile, percentile if low_percentile is None else low_percentile):
        if not 0 < value < 100:
            raise StatisticsError(f"got percentile {value}; wanted one between 0 and 100")
    levels = []
    for trait, values in neutral.items():
        if len(values) != len(sites):
            raise StatisticsError(f"got {len(values)} rows of {trait} for {len(sites)} sites")
        for site, row in zip(sites, values.double(), strict=True):
            known = row[~row.isnan()]
            if len(known) < FEWEST or not bool(known.isfinite().all()):
                raise StatisticsError(
                    f"got {len(known)} neutral values of {trait} at {site}; wanted {FEWEST} or "
                    "more, all finite"
                )
            levels.append(_level(trait, site, known, percentile, low_percentile, confidence))
    return AlarmLevels(levels=tuple(levels))


def _level(
    trait: str,
    site: Site,
    values: Tensor,
    percentile: Number,
    low_percentile: Number | None,
    confidence: float,
) -> AlarmLevel:
    setting, held_out = values[::2], values[1::2]
    high = float(torch.quantile(setting, percentile / 100))
    low = None
    if low_percentile is not None:
        low = min(float(torch.quantile(setting, low_percentile / 100)), high)
    hits = int((held_out > high).sum())
    return AlarmLevel(
        trait=trait,
        site=site,
        threshold=Threshold(high, low),
        percentile=float(percentile),
        false_positive_rate=hits / len(held_out),
        interval=wilson(hits, len(held_out), confidence),
        held_out=len(held_out),
    )
