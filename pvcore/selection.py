"""Selection: at which layer and how strongly a vector is to be added, found by steering.

Every layer and coefficient is tried on questions that the vector was not made of, beside a random
vector of the same norm; what talks nonsense is no candidate (arXiv 2507.21509, B.4, and its
appendix J.3 for all layers at once).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from math import isclose, isfinite
from typing import Any

import torch

from pvcore.controls import random_of_same_norm
from pvcore.errors import SelectionError
from pvcore.grading import knowing
from pvcore.interventions import Add
from pvcore.judge import Judge, Judgements, judge_all
from pvcore.model import HookedModel
from pvcore.plan import Plan
from pvcore.replies import ModelWriter, batches, shown
from pvcore.request_checks import check_real, check_request
from pvcore.rollouts import asked
from pvcore.sites import Site, as_sites
from pvcore.spans import Span
from pvcore.traits import Trait
from pvcore.vectors import PersonaVector

COEFFICIENTS = (0.5, 1.0, 1.5, 2.0, 2.5, 3.0)
FLOOR = 60.0
INCREMENTAL = "layer-incremental"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """Mean scores of replies steered in one way: at `site`, or at all layers where that is None.

    `control_score` and `control_coherence` are those of a random vector of the same norm.
    """

    site: Site | None
    coefficient: float
    score: float
    coherence: float
    control_score: float
    control_coherence: float
    judged: int
    failed: int

    @property
    def effect(self) -> float:
        """How many points the vector moves the trait beyond what a random one does."""
        return self.score - self.control_score

    @property
    def place(self) -> str:
        return INCREMENTAL if self.site is None else str(self.site)


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """A steering sweep, and the cell with the largest effect among those at or above the floor.

    `score` and `coherence` are those of the unsteered model.
    """

    vector: PersonaVector
    cells: tuple[Cell, ...]
    best: Cell
    score: float
    coherence: float
    floor: float
    questions: int
    span: Span | None = None

    @property
    def layer(self) -> int | None:
        """The layer chosen; None for the layer-incremental vector at all of them."""
        return None if self.best.site is None else self.best.site.layer

    @property
    def coefficient(self) -> float:
        return self.best.coefficient

    def add(self) -> Add:
        """The intervention chosen."""
        return _added(self.vector, self.best.site, self.best.coefficient, self.span)

    def recorded(self) -> PersonaVector:
        """The vector with the choice in its `calibration`, under `selection`, for its file."""
        chosen = {
            "place": self.best.place,
            "coefficient": self.best.coefficient,
            "norm": _norm(self.vector, self.best.site),
            "span": self.span,
            "score": self.best.score,
            "coherence": self.best.coherence,
            "control score": self.best.control_score,
            "unsteered score": self.score,
            "coherence floor": self.floor,
            "questions": self.questions,
        }
        return replace(self.vector, calibration={**self.vector.calibration, "selection": chosen})


def select(
    model: HookedModel,
    vector: PersonaVector,
    trait: Trait,
    *,
    judge: Judge,
    layers: Iterable[int | Site] | None = None,
    incremental: bool = True,
    coefficients: Sequence[float | int] = COEFFICIENTS,
    questions: Sequence[str] | None = None,
    floor: float | int = FLOOR,
    span: Span | None = None,
    max_new_tokens: int = 64,
    temperature: float | int = 1.0,
    batch_size: int = 64,
    seed: int = 0,
    progress: bool = False,
) -> Selection:
    """Steer at each of `layers` (default: all) by each coefficient, and choose.

    `incremental` tries the layer-incremental vector at all layers besides. Questions are by default
    the trait's for evaluation, without a system prompt. Vector and control draw the same random
    numbers. Raises `SelectionError` where no cell reaches the `floor` of coherence.
    """
    check_request(trait, judge, questions, SelectionError)
    sites = vector.sites if layers is None else as_sites(layers)
    doses = checked_doses(coefficients, floor)
    evaluated = trait.evaluation_questions if questions is None else questions
    writer = ModelWriter(model, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
    sweep = _Sweep(model, trait.name, knowing(judge, trait), writer, evaluated, batch_size, span)
    arms: list[Site | None] = [*sites, *([None] if incremental and _is_deep(vector) else [])]
    for site in arms:
        model.check(Plan(_added(vector, site, doses[0], span)))
    places = shown(range(len(arms)), f"steering {trait.name}") if progress else range(len(arms))
    plain = sweep.judged(None, (0.0,))[0.0]
    cells = [cell for at in places for cell in sweep.cells(vector, arms[at], doses, seed)]
    return _selection(vector, cells, plain, float(floor), span)


def validate(
    selection: Selection,
    model: HookedModel,
    trait: Trait,
    *,
    judge: Judge,
    questions: Sequence[str],
    span: Span | None = None,
    max_new_tokens: int = 64,
    temperature: float | int = 1.0,
    batch_size: int = 64,
    seed: int = 1,
) -> Cell:
    """The cell that was chosen, measured anew on other questions and random numbers.

    The best of many cells was also the luckiest: what it scores here is what it is worth. `span`
    is by default that of the selection.
    """
    check_request(trait, judge, questions, SelectionError)
    acted = selection.span if span is None else span
    writer = ModelWriter(model, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
    sweep = _Sweep(model, trait.name, knowing(judge, trait), writer, questions, batch_size, acted)
    best = selection.best
    (cell,) = sweep.cells(selection.vector, best.site, (best.coefficient,), seed)
    return cell


def _selection(
    vector: PersonaVector,
    cells: Sequence[Cell],
    plain: Judgements,
    floor: float,
    span: Span | None,
) -> Selection:
    return Selection(
        vector=vector,
        cells=tuple(cells),
        best=_best(cells, floor, vector.trait),
        score=plain.mean_trait_score,
        coherence=plain.mean_coherence_score,
        floor=floor,
        questions=len(plain.rows),
        span=span,
    )


def recorded_choice(vector: PersonaVector) -> Add:
    """The intervention that `Selection.recorded` put into a vector.

    `SelectionError` for a vector without one, and for one that was scaled since: its coefficient
    was of the length it had.
    """
    chosen = vector.calibration.get("selection")
    known = chosen if isinstance(chosen, Mapping) else {}
    place: Any = known.get("place")
    coefficient: Any = known.get("coefficient")
    norm: Any = known.get("norm")
    numbers = isinstance(coefficient, int | float) and isinstance(norm, int | float)
    if not isinstance(place, str) or not numbers:
        raise SelectionError(
            f"got {vector.trait!r} without a coefficient recorded; wanted a vector that was "
            "selected. Extract it with --select, or name a coefficient"
        )
    site = None if place == INCREMENTAL else Site.parse(place)
    now = _norm(vector, site)
    if not isclose(now, norm, rel_tol=1e-4):
        raise SelectionError(
            f"got {vector.trait!r} of norm {now:.4g} at {place}; its coefficient was recorded for "
            f"{norm:.4g}. Select again, or name a coefficient"
        )
    return _added(vector, site, coefficient, known.get("span"))


def _norm(vector: PersonaVector, site: Site | None) -> float:
    """The length of what one unit of a coefficient adds at a place, over all its layers."""
    direction = vector.layer_incremental() if site is None else vector.at([site])
    return float(direction.directions.double().norm())


def random_like(vector: PersonaVector, seed: int = 0) -> PersonaVector:
    """Random directions with the norms of a vector; each trait draws its own."""
    digest = sha256(f"control/{vector.trait}/{seed}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return random_of_same_norm(vector, generator)


@dataclass(frozen=True, slots=True)
class _Sweep:
    """Steers the same questions in many ways and has the replies judged."""

    model: HookedModel
    trait: str
    judge: Judge
    writer: ModelWriter
    questions: Sequence[str]
    batch_size: int
    span: Span | None

    def cells(
        self, vector: PersonaVector, site: Site | None, doses: Sequence[float], seed: int
    ) -> list[Cell]:
        """All coefficients at one place, of the vector and of its control."""
        direction = vector.layer_incremental() if site is None else vector.at([site])
        real = self.judged(direction, doses)
        control = self.judged(random_like(direction, seed), doses)
        return [
            Cell(
                site=site,
                coefficient=dose,
                score=real[dose].mean_trait_score,
                coherence=real[dose].mean_coherence_score,
                control_score=control[dose].mean_trait_score,
                control_coherence=control[dose].mean_coherence_score,
                judged=real[dose].n_judged + control[dose].n_judged,
                failed=real[dose].n_failed + control[dose].n_failed,
            )
            for dose in doses
        ]

    def judged(
        self, direction: PersonaVector | None, doses: Sequence[float]
    ) -> Mapping[float, Judgements]:
        """What the judge makes of each dose; every row is steered by its own."""
        rows = [(question, dose) for dose in doses for question in self.questions]
        replies: list[str] = []
        for batch, chosen in enumerate(batches(rows, self.batch_size)):
            chats = [asked("", question) for question, _ in chosen]
            if direction is None:
                replies += self.writer.sampled(chats, batch=batch)
                continue
            coeff = [dose for _, dose in chosen]
            with self.model.steer(Add(direction, coeff=coeff, span=self.span)):
                replies += self.writer.sampled(chats, batch=batch)
        pairs = [(question, reply) for (question, _), reply in zip(rows, replies, strict=True)]
        found = judge_all(self.judge, self.trait, pairs)
        n = len(self.questions)
        return {
            dose: Judgements(trait=self.trait, rows=found.rows[at * n : (at + 1) * n])
            for at, dose in enumerate(doses)
        }


def _added(vector: PersonaVector, site: Site | None, coefficient: float, span: Span | None) -> Add:
    if site is None:
        return Add(vector.layer_incremental(), coeff=coefficient, span=span)
    return Add(vector, coeff=coefficient, layers=[site], span=span)


def _is_deep(vector: PersonaVector) -> bool:
    """Whether there are increments: block outputs of neighbouring layers, two or more."""
    layers = sorted(site.layer for site in vector.sites)
    posts = all(site.kind == "resid_post" for site in vector.sites)
    return posts and len(layers) > 1 and layers == list(range(layers[0], layers[-1] + 1))


def _best(cells: Sequence[Cell], floor: float, trait: str) -> Cell:
    """The largest effect at or above the floor; of equal ones the smallest coefficient."""
    sound = [cell for cell in cells if cell.coherence >= floor]
    if not sound:
        best = max(cells, key=lambda cell: cell.coherence)
        raise SelectionError(
            f"got no coefficient for {trait!r} whose replies reach a coherence of {floor:g}: the "
            f"most coherent, {best.coefficient:g} at {best.place}, has {best.coherence:.1f}. Try "
            "smaller coefficients, or a lower floor"
        )
    return max(sound, key=lambda cell: (cell.effect, -abs(cell.coefficient)))


def checked_doses(coefficients: Sequence[float | int], floor: float | int) -> tuple[float, ...]:
    """The coefficients of a sweep; `SelectionError` for those, and a floor, that cannot be."""
    if not isinstance(coefficients, Sequence) or isinstance(coefficients, str):
        raise SelectionError(f"got coefficients {coefficients!r}; wanted a list of numbers")
    fits = all(isinstance(one, int | float) and isfinite(one) and one for one in coefficients)
    if not coefficients or not fits or len(set(coefficients)) < len(coefficients):
        raise SelectionError(
            f"got coefficients {', '.join(map(str, coefficients)) or 'none'}; wanted finite "
            "numbers other than 0, each once"
        )
    check_real(SelectionError, floor=floor)
    if not 0 <= floor <= 100:
        raise SelectionError(f"got floor={floor}; wanted a coherence from 0 to 100")
    return tuple(map(float, coefficients))
