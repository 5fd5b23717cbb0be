"""What the study claims: a figure, its bound, and whether it holds."""

import math
from collections.abc import Iterator
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
    return [*_margins(design, summary), *_correlations(summary), *_time(summary)]


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


def _correlations(summary: Summary) -> Iterator[Claim]:
    by_trait = [one["per_prompt"].mean for one in summary.monitoring.values()]
    mean = fmean(by_trait)
    yield Claim(
        claim="projections of prompts foretell the mean score of their replies, mean r of traits",
        measured=f"{mean:.3f} ({min(by_trait):.3f} to {max(by_trait):.3f})",
        bound=f"at least {PER_PROMPT:g}",
        passed=math.isfinite(mean) and mean >= PER_PROMPT,
    )
    r = summary.shift["all"]
    yield Claim(
        claim=(
            "the finetuning shift foretells the trait after training, r over the sets of each "
            "trait and neutral ones"
        ),
        measured=f"{r['own']:.3f} (over every set {r['every']:.3f})",
        bound=f"at least {SHIFT:g}",
        passed=math.isfinite(r["own"]) and r["own"] >= SHIFT,
    )


def told(spread: Spread) -> str:
    """A mean with its standard error."""
    return f"{spread.mean:.1f} ± {spread.error:.1f}"
