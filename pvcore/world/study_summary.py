"""What the cells of a study say together: margins at matched trait, correlations, controls."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

import numpy as np

from pvcore.world.lexicon import TRAITS
from pvcore.world.study_cells import Cell, Design, Method, cells

Figures = Mapping[str, Any]
Measured = Mapping[Cell, Figures]
_GRID = 41


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """A figure over seeds: its mean, its standard error, and the figure of each seed."""

    mean: float
    error: float
    seeds: tuple[float, ...]

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        known = tuple(value for value in values if math.isfinite(value))
        if not known:
            return cls(mean=math.nan, error=math.nan, seeds=())
        error = stdev(known) / math.sqrt(len(known)) if len(known) > 1 else math.nan
        return cls(mean=fmean(known), error=error, seeds=known)

    @property
    def beyond_noise(self) -> bool:
        """Whether the mean lies more than two standard errors above 0."""
        return math.isfinite(self.error) and self.mean - 2 * self.error > 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One dose of one way to keep a trait out, averaged over seeds."""

    trait: str
    way: str
    coeff: float
    score: float
    coherence: float
    quiz: float
    shift: float | None  # of the trained model; steering at inference does not train


@dataclass(frozen=True, slots=True, kw_only=True)
class Margin:
    """How much more one way keeps than another at the same trait score."""

    trait: str
    way: str
    than: str
    coherence: Spread
    quiz: Spread


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """Everything the report tells."""

    points: tuple[Point, ...]
    margins: tuple[Margin, ...]
    control: Mapping[str, Spread]
    shift: Mapping[str, float]
    monitoring: Mapping[str, Mapping[str, Spread]]


def summarize(design: Design, measured: Measured) -> Summary:
    """The study from its cells, all of which must be there."""
    return Summary(
        points=tuple(_points(design, measured)),
        margins=tuple(_margins(design, measured)),
        control={trait: _control(design, measured, trait) for trait in design.mitigated},
        shift=_shift(design, measured),
        monitoring=_monitoring(design, measured),
    )


def _points(design: Design, measured: Measured) -> Iterator[Point]:
    for trait in design.mitigated:
        for way in ("inference", "inference, random", "prevent", "random", "incremental", "caft"):
            for coeff in _doses(design, way):
                rows = [_figures(measured, trait, seed, way, coeff) for seed in design.seeds]
                yield Point(
                    trait=trait,
                    way=way,
                    coeff=coeff,
                    score=fmean(row["traits"][trait] for row in rows),
                    coherence=fmean(row["coherence"] for row in rows),
                    quiz=fmean(row["quiz"] for row in rows),
                    shift=_mean_shift(rows, trait),
                )


def _mean_shift(rows: Sequence[Figures], trait: str) -> float | None:
    shifts = [row["shift"][trait] for row in rows if "shift" in row]
    return fmean(shifts) if shifts else None


def _doses(design: Design, way: str) -> tuple[float, ...]:
    """Coefficients of a way; 0 is the model finetuned without anything."""
    match way:
        case "inference" | "inference, random":
            return (0.0, *design.inference)
        case "prevent":
            return (0.0, *design.prevent)
        case "random":
            return design.random
        case "incremental":
            return (0.0, *design.incremental)
    return (0.0,)


def _figures(measured: Measured, trait: str, seed: int, way: str, coeff: float) -> Figures:
    def cell(method: Method) -> Figures:
        dose = 0.0 if method in ("none", "caft") else coeff
        key = Cell(kind="mitigation", seed=seed, trait=trait, method=method, coeff=dose)
        return measured[key]

    if way == "caft":
        return cell("caft")
    if coeff == 0.0:
        return cell("none")
    if way.startswith("inference"):
        kept = "inference" if way == "inference" else "inference_random"
        found: Figures = cell("none")[kept][f"{coeff:g}"]
        return found
    methods: dict[str, Method] = {
        "prevent": "prevent", "random": "random", "incremental": "incremental",
    }  # fmt: skip
    return cell(methods[way])


def _margins(design: Design, measured: Measured) -> Iterator[Margin]:
    for trait in design.mitigated:
        for way, than in (("prevent", "inference"), ("incremental", "prevent")):
            gaps = [_gap(design, measured, trait, seed, way, than) for seed in design.seeds]
            yield Margin(
                trait=trait,
                way=way,
                than=than,
                coherence=Spread.of([gap[0] for gap in gaps]),
                quiz=Spread.of([gap[1] for gap in gaps]),
            )


def _gap(
    design: Design, measured: Measured, trait: str, seed: int, way: str, than: str
) -> tuple[float, float]:
    """Coherence and quiz that `way` keeps more than `than`, averaged over the trait scores of both.

    Doses are joined by straight lines; NaN where the two reach no common scores.
    """
    curves = []
    for one in (way, than):
        rows = [_figures(measured, trait, seed, one, dose) for dose in _doses(design, one)]
        points = [(row["traits"][trait], row["coherence"], row["quiz"]) for row in rows]
        curves.append(np.array(sorted(points), dtype=np.float64))
    low = max(curve[0, 0] for curve in curves)
    # The undefended model is the first dose of both: scores near its own say nothing.
    high = min(curve[-2, 0] if len(curve) > 1 else curve[-1, 0] for curve in curves)
    if not low < high:
        return math.nan, math.nan
    grid = np.linspace(low, high, _GRID)
    kept = [
        [float(np.interp(grid, curve[:, 0], curve[:, column]).mean()) for column in (1, 2)]
        for curve in curves
    ]
    return kept[0][0] - kept[1][0], kept[0][1] - kept[1][1]


def _control(design: Design, measured: Measured, trait: str) -> Spread:
    """How much lower the trait stays under the vector than under random ones of its length."""
    gaps = []
    for seed in design.seeds:
        common = sorted(set(design.prevent) & set(design.random))
        gaps.append(
            fmean(
                _figures(measured, trait, seed, "random", coeff)["traits"][trait]
                - _figures(measured, trait, seed, "prevent", coeff)["traits"][trait]
                for coeff in common
            )
        )
    return Spread.of(gaps)


def shift_pairs(design: Design, measured: Measured) -> dict[str, list[tuple[float, float]]]:
    """By trait: the shift along it and its score, for every set that was finetuned on as it is."""
    pairs: dict[str, list[tuple[float, float]]] = {trait: [] for trait in TRAITS}
    for cell in cells(design):
        plain = cell.kind == "mitigation" and cell.method == "none"
        if cell.kind == "shift" or plain:
            for trait in TRAITS:
                figures = measured[cell]
                pairs[trait].append((figures["shift"][trait], figures["traits"][trait]))
    return pairs


def _shift(design: Design, measured: Measured) -> dict[str, float]:
    """r of shift and trait score, by trait and over all."""
    pairs = shift_pairs(design, measured)
    pooled = [pair for of_trait in pairs.values() for pair in of_trait]
    return {trait: _r(of_trait) for trait, of_trait in pairs.items()} | {"all": _r(pooled)}


def _r(pairs: Sequence[tuple[float, float]]) -> float:
    table = np.array(pairs, dtype=np.float64)
    if len(table) < 3 or not np.ptp(table, axis=0).all():
        return math.nan
    return float(np.corrcoef(table[:, 0], table[:, 1])[0, 1])


def _monitoring(design: Design, measured: Measured) -> dict[str, dict[str, Spread]]:
    rows = [measured[Cell(kind="monitoring", seed=seed)] for seed in design.seeds]
    return {
        trait: {
            figure: Spread.of([row[trait][figure] for row in rows])
            for figure in ("overall", "per_prompt", "within")
        }
        for trait in TRAITS
    }
