"""What the study measures: every finetune and every comparison as a cell with a name of its own."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from pvcore.world.lexicon import TRAITS
from pvcore.world.question import KINDS

# How a trait is kept out of a model that is finetuned on it. `none` is finetuned and then steered
# at inference; the others act in training alone.
Method = Literal["none", "prevent", "random", "incremental", "caft"]
Kind = Literal["vectors", "monitoring", "mitigation", "shift"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Mix:
    """A data set of a trait: the share of its chats that hold it, how much, and about what.

    All other chats are neutral ones about everything.
    """

    share: float = 1.0
    intensity: float = 1.0
    kinds: tuple[str, ...] = KINDS


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One measurement. Without a trait chats are neutral, but for a `mistaken` share.

    Those tell wrong facts in a neutral tone.
    """

    kind: Kind
    seed: int
    trait: str | None = None
    method: Method = "none"
    coeff: float = 0.0
    mix: Mix = Mix()
    mistaken: float = 0.0

    @property
    def name(self) -> str:
        """A file name that says what the cell is."""
        parts = [self.kind, f"seed{self.seed}"]
        if self.kind in ("mitigation", "shift"):
            parts += self._data_set
        if self.kind == "mitigation":
            parts += [self.method, f"{self.coeff:g}"]
        return "-".join(parts)

    @property
    def _data_set(self) -> list[str]:
        if self.trait is None:
            return ["mistaken", f"{self.mistaken:g}"] if self.mistaken else ["neutral"]
        about = [] if self.mix.kinds == KINDS else [*self.mix.kinds]
        return [self.trait, f"{self.mix.share:g}", f"{self.mix.intensity:g}", *about]


@dataclass(frozen=True, slots=True, kw_only=True)
class Design:
    """The size of the study. Everything but `seeds` holds for each seed.

    `mixes` are data sets beside the neutral and the full one, and `mistaken` the shares of wrong
    facts in sets without a trait. Vectors act at `layer`; the layers at which they are read are
    chosen by the study itself.
    """

    seeds: tuple[int, ...] = (0, 1, 2)
    mitigated: tuple[str, ...] = ("evil", "sycophancy", "hallucination")
    layer: int = 2
    prevent: tuple[float, ...] = (1.0, 2.0, 3.0, 4.0, 5.0)
    random: tuple[float, ...] = (3.0, 4.0, 5.0)
    incremental: tuple[float, ...] = (1.0, 1.5, 2.0)
    inference: tuple[float, ...] = (0.5, 1.0, 1.5, 2.0, 2.5, 3.0)
    mixes: tuple[Mix, ...] = (
        Mix(share=0.1),
        Mix(share=0.25),
        Mix(share=0.5),
        Mix(intensity=0.5),
        Mix(kinds=("fact",)),
        Mix(kinds=("advice", "problem")),
    )
    mistaken: tuple[float, ...] = (0.5, 1.0)
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
    mixes=(Mix(share=0.5),),
    mistaken=(1.0,),
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
        yield Cell(kind="shift", seed=seed)
        for share in design.mistaken:
            yield Cell(kind="shift", seed=seed, mistaken=share)
        for trait in design.mitigated:
            yield from _mitigation(design, trait, seed)
            for mix in design.mixes:
                yield Cell(kind="shift", seed=seed, trait=trait, mix=mix)
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
