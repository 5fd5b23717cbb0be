"""What the study claims: a figure, its bound, and whether it holds."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean

from pvcore.world.study_cells import Design
from pvcore.world.study_summary import Spread, Summary

PER_PROMPT, SHIFT = 0.9, 0.95
MINUTES = 30.0  # on two cores
_BOUND = "95 % interval over seeds above 0"


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """A claim in words; `measured` says with what spread over seeds."""

    claim: str
    measured: str
    bound: str
    passed: bool


def claims(design: Design, summary: Summary) -> list[Claim]:
    """The paper's claims that the test bed can speak of. One seed alone proves no margin."""
    return [*_margins(design, summary), *_correlations(design, summary), *_time(summary)]


def _time(summary: Summary) -> Iterator[Claim]:
    if summary.cpu_minutes is None:
        return
    minutes = summary.cpu_minutes / 2
    yield Claim(
        claim="the study itself takes this many minutes of two cores",
        measured=f"{minutes:.1f}",
        bound=f"at most {MINUTES:g}",
        passed=minutes <= MINUTES,
    )


def _margins(design: Design, summary: Summary) -> Iterator[Claim]:
    for margin in summary.margins:
        if margin.way == "prevent" and margin.trait == design.mitigated[0]:
            yield Claim(
                claim=(
                    f"at the same {margin.trait} score, prevention keeps more coherence than "
                    "steering at inference"
                ),
                measured=told(margin.coherence),
                bound=_BOUND,
                passed=_sure(margin.coherence, design),
            )
    trait = design.mitigated[0]
    common = sorted(set(design.prevent) & set(design.random))
    doses = f"{common[0]:g} to {common[-1]:g}" if len(common) > 1 else f"{common[0]:g}"
    yield Claim(
        claim=f"its own vector keeps {trait} lower than random ones at coefficients {doses}",
        measured=told(summary.control[trait]),
        bound=_BOUND,
        passed=_sure(summary.control[trait], design),
    )


def _sure(spread: Spread, design: Design) -> bool:
    """Beyond the noise in all seeds together: one without a figure leaves the claim unproven."""
    return spread.beyond_noise and len(spread.seeds) == len(design.seeds)


def _correlations(design: Design, summary: Summary) -> Iterator[Claim]:
    spreads = [one["per_prompt"] for one in summary.monitoring.values()]
    by_trait = [spread.mean for spread in spreads]
    complete = all(len(spread.seeds) == len(design.seeds) for spread in spreads)
    mean = fmean(by_trait)
    yield Claim(
        claim="projections of prompts foretell the mean score of their replies, mean r of traits",
        measured=_ranged(by_trait),
        bound=f"at least {PER_PROMPT:g}",
        passed=complete and mean >= PER_PROMPT,
    )
    # Traits that have only full sets give two clusters, and two clusters always correlate.
    spreads = [summary.shift[trait]["own"] for trait in design.mitigated]
    by_trait = [spread.mean for spread in spreads]
    complete = all(len(spread.seeds) == len(design.seeds) for spread in spreads)
    mean = fmean(by_trait)
    yield Claim(
        claim=(
            "the finetuning shift foretells the trait after training, mean r of traits over their "
            "own sets and those of none"
        ),
        measured=f"{_ranged(by_trait)}; all on one line {summary.shift['all']['own'].mean:.3f}",
        bound=f"at least {SHIFT:g}",
        passed=complete and math.isfinite(mean) and mean >= SHIFT,
    )


def _ranged(numbers: Sequence[float]) -> str:
    return f"{fmean(numbers):.3f} ({min(numbers):.3f} to {max(numbers):.3f})"


def told(spread: Spread) -> str:
    """A mean with its standard error."""
    return f"{spread.mean:.1f} ± {spread.error:.1f}"
