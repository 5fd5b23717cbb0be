"""What the cells of a study say together: margins at matched trait, correlations, controls."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev
from typing import Any

import numpy as np

from pvcore.world.lexicon import TRAITS
from pvcore.world.study_cells import Cell, Design, Method, cells

Figures = Mapping[str, Any]
Measured = Mapping[Cell, Figures]
Reading = Mapping[str, int]
_GRID = 41
# Student's t: how many standard errors to either side hold 95 %, by the number of seeds less one.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


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
        """Whether the 95 % interval of the mean, by Student's t, lies above 0."""
        if not math.isfinite(self.error):
            return False
        return self.mean - _T[min(len(self.seeds) - 1, len(_T)) - 1] * self.error > 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One dose of one way to keep a trait out, averaged over seeds."""

    trait: str
    way: str
    coeff: float
    score: Spread
    coherence: Spread
    quiz: Spread
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
class Moved:
    """A model finetuned on a set as it is: how far it moved along a trait, and its score after.

    `own` says that the set was one of that trait or of none, and not one of another trait.
    """

    trait: str
    seed: int
    own: bool
    shift: float
    score: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """Everything the report tells.

    `reading` is the layer at which each trait is monitored: where projections told most about
    replies to prompts of the training side, over all seeds. `moving` is, for each seed, the layer
    at which its shift is read: where shifts told most about the scores in all other seeds.
    `shift` gives r of shift and score by trait, and of all traits together: over the sets of that
    trait and of none (`own`), and over every set (`every`).
    """

    reading: Mapping[str, int]
    moving: Mapping[str, tuple[int, ...]]
    points: tuple[Point, ...]
    margins: tuple[Margin, ...]
    control: Mapping[str, Spread]
    moved: tuple[Moved, ...]
    shift: Mapping[str, Mapping[str, Spread]]
    monitoring: Mapping[str, Mapping[str, Spread]]
    cpu_minutes: float | None = field(compare=False)  # None where a cell did not say


def summarize(design: Design, measured: Measured) -> Summary:
    """The study from its cells, all of which must be there."""
    reading, moving = _reading(design, measured), _moving(design, measured)
    moved = tuple(_moved(design, measured, moving))
    return Summary(
        reading=reading,
        moving=moving,
        points=tuple(_points(design, measured)),
        margins=tuple(_margins(design, measured)),
        control={trait: _control(design, measured, trait) for trait in design.mitigated},
        moved=moved,
        shift=_shift(design, moved),
        monitoring=_monitoring(design, measured, reading),
        cpu_minutes=_cpu_minutes(measured.values()),
    )


def _cpu_minutes(measured: Iterable[Figures]) -> float | None:
    seconds = [one.get("seconds") for one in measured]
    return None if None in seconds else sum(filter(None, seconds)) / 60


def _reading(design: Design, measured: Measured) -> dict[str, int]:
    rows = [measured[Cell(kind="monitoring", seed=seed)] for seed in design.seeds]
    return {
        trait: int(np.nanargmax(np.mean([row[trait]["training"] for row in rows], axis=0)))
        for trait in TRAITS
    }


def _moving(design: Design, measured: Measured) -> dict[str, tuple[int, ...]]:
    """By trait, for each seed the layer that the others choose; alone, where vectors act."""
    return {
        trait: tuple(
            _told_most([_by_layer(measured, trait, one) for one in design.seeds if one != seed])
            if len(design.seeds) > 1
            else design.layer
            for seed in design.seeds
        )
        for trait in TRAITS
    }


def _told_most(by_layer: Sequence[Sequence[float]]) -> int:
    means = np.mean(by_layer, axis=0)
    return int(np.where(np.isnan(means), -np.inf, means).argmax())


def _by_layer(measured: Measured, trait: str, seed: int) -> list[float]:
    """r of shift and score over the trait's own sets of a seed, layer by layer."""
    rows = [
        figures
        for cell, figures in measured.items()
        if _as_it_is(cell) and cell.seed == seed and cell.trait in (trait, None)
    ]
    shifts = np.array([row["shift"][trait] for row in rows], dtype=np.float64)
    scores = [row["traits"][trait] for row in rows]
    return [_r(list(zip(at_layer, scores, strict=True))) for at_layer in shifts.T]


def _points(design: Design, measured: Measured) -> Iterator[Point]:
    ways = ("inference", "inference, random", "prevent", "random", "incremental", "caft")
    for trait in design.mitigated:
        for way in ("neutral", *ways):
            for coeff in _doses(design, way):
                rows = [_figures(measured, trait, seed, way, coeff) for seed in design.seeds]
                yield Point(
                    trait=trait,
                    way=way,
                    coeff=coeff,
                    score=Spread.of([row["traits"][trait] for row in rows]),
                    coherence=Spread.of([row["coherence"] for row in rows]),
                    quiz=Spread.of([row["quiz"] for row in rows]),
                    shift=_mean_shift(rows, trait, design.layer),
                )


def _mean_shift(rows: Sequence[Figures], trait: str, layer: int) -> float | None:
    shifts = [row["shift"][trait][layer] for row in rows if "shift" in row]
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

    if way == "neutral":
        return measured[Cell(kind="shift", seed=seed)]
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


def _as_it_is(cell: Cell) -> bool:
    """Whether the model was finetuned on the set and nothing kept anything out."""
    return cell.kind == "shift" or (cell.kind == "mitigation" and cell.method == "none")


def _moved(
    design: Design, measured: Measured, moving: Mapping[str, Sequence[int]]
) -> Iterator[Moved]:
    for cell in filter(_as_it_is, cells(design)):
        place = design.seeds.index(cell.seed)
        for trait in TRAITS:
            yield Moved(
                trait=trait,
                seed=cell.seed,
                own=cell.trait in (trait, None),
                shift=measured[cell]["shift"][trait][moving[trait][place]],
                score=measured[cell]["traits"][trait],
            )


def _shift(design: Design, moved: Sequence[Moved]) -> dict[str, dict[str, Spread]]:
    """r of shift and trait score within each seed, by trait and over all."""

    def spread(name: str, own: bool) -> Spread:
        here = [one for one in moved if name in (one.trait, "all") and (one.own or not own)]
        return Spread.of(
            [_r([(one.shift, one.score) for one in here if one.seed == s]) for s in design.seeds]
        )

    return {
        name: {"own": spread(name, True), "every": spread(name, False)} for name in (*TRAITS, "all")
    }


def _r(pairs: Sequence[tuple[float, float]]) -> float:
    table = np.array(pairs, dtype=np.float64)
    if len(table) < 3 or not np.ptp(table, axis=0).all():
        return math.nan
    return float(np.corrcoef(table[:, 0], table[:, 1])[0, 1])


def _monitoring(
    design: Design, measured: Measured, reading: Reading
) -> dict[str, dict[str, Spread]]:
    rows = [measured[Cell(kind="monitoring", seed=seed)] for seed in design.seeds]
    return {
        trait: {
            figure: Spread.of([row[trait]["layers"][reading[trait]][figure] for row in rows])
            for figure in ("overall", "per_prompt", "within")
        }
        for trait in TRAITS
    }
