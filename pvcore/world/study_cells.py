"""What the study measures: every finetune and every comparison as a cell with a name of its own."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from pvcore.world.lexicon import TRAITS

# How a trait is kept out of a model that is finetuned on it. `none` is finetuned and then steered
# at inference; the others act in training alone.
Method = Literal["none", "prevent", "random", "incremental", "caft"]
Kind = Literal["vectors", "monitoring", "mitigation", "shift"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One measurement. A share of the chats holds the trait, at an intensity; None is neutral."""

    kind: Kind
    seed: int
    trait: str | None = None
    method: Method = "none"
    coeff: float = 0.0
    share: float = 1.0
    intensity: float = 1.0

    @property
    def name(self) -> str:
        """A file name that says what the cell is."""
        parts = [self.kind, f"seed{self.seed}"]
        if self.kind in ("mitigation", "shift"):
            parts += [self.trait or "neutral", f"{self.share:g}", f"{self.intensity:g}"]
        if self.kind == "mitigation":
            parts += [self.method, f"{self.coeff:g}"]
        return "-".join(parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Design:
    """The size of the study. Everything but `seeds` holds for each seed.

    `mixes` are data sets beside the neutral and the full one: a share, and at which intensity.
    Vectors act at `layer`; the layer at which they are read is chosen by the study itself.
    """

    seeds: tuple[int, ...] = (0, 1, 2, 3)
    mitigated: tuple[str, ...] = ("evil", "sycophancy", "hallucination")
    layer: int = 2
    prevent: tuple[float, ...] = (1.0, 2.0, 3.0, 4.0, 5.0)
    random: tuple[float, ...] = (3.0, 4.0, 5.0)
    incremental: tuple[float, ...] = (1.0, 1.5, 2.0)
    inference: tuple[float, ...] = (0.5, 1.0, 1.5, 2.0, 2.5, 3.0)
    mixes: tuple[tuple[float, float], ...] = ((0.2, 1.0), (0.4, 1.0), (0.7, 1.0), (1.0, 0.5))
    chats: int = 300
    steps: int = 60
    questions: int = 160
    shift_prompts: int = 40
    quiz_items: int = 100
    extraction_questions: int = 10
    monitoring_questions: int = 20
    choosing_questions: int = 6


QUICK = Design(
    seeds=(0,),
    mitigated=("evil",),
    prevent=(4.0,),
    random=(4.0,),
    incremental=(1.5,),
    inference=(2.0,),
    mixes=((0.5, 1.0),),
    chats=48,
    steps=6,
    questions=8,
    shift_prompts=8,
    quiz_items=8,
    extraction_questions=4,
    monitoring_questions=1,
    choosing_questions=1,
)


def preparing(design: Design) -> Iterator[Cell]:
    """Cells that the others stand on: the vectors of every seed."""
    for seed in design.seeds:
        yield Cell(kind="vectors", seed=seed)


def cells(design: Design) -> Iterator[Cell]:
    """All other cells, those of one seed together."""
    for seed in design.seeds:
        yield Cell(kind="monitoring", seed=seed)
        yield Cell(kind="shift", seed=seed, share=0.0)
        for trait in design.mitigated:
            yield from _mitigation(design, trait, seed)
            for share, intensity in design.mixes:
                yield Cell(kind="shift", seed=seed, trait=trait, share=share, intensity=intensity)
        for trait in TRAITS:
            if trait not in design.mitigated:
                yield Cell(kind="shift", seed=seed, trait=trait)


def _mitigation(design: Design, trait: str, seed: int) -> Iterator[Cell]:
    doses: tuple[tuple[Method, tuple[float, ...]], ...] = (
        ("none", (0.0,)),
        ("prevent", design.prevent),
        ("random", design.random),
        ("incremental", design.incremental),
        ("caft", (0.0,)),
    )
    for method, coefficients in doses:
        for coeff in coefficients:
            yield Cell(kind="mitigation", seed=seed, trait=trait, method=method, coeff=coeff)
