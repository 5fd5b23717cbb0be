"""Flags in the persona world: do projections of data foretell what training on it does?"""

import copy
import random
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from rich.progress import Progress

import pvcore as pv
from benches import record, rounds
from benches.record import Check, Plain, Record
from pvcore import world
from pvcore.world.demo_subject import world_model, world_trait
from pvcore.world.finetune import finetune

NAME = "flags"
TRAITS = ("evil", "hallucination", "humor", "optimism")
SITE = pv.resid_post(2)
R_BOUND = 0.95
AUROC_BOUND = 0.97
CEILING_GAPS = {0.5: 0.05, 0.25: 0.08}
INTENSITIES = (1.0, *CEILING_GAPS)
KINDS = ("approximate", "exact", "subset")
OWN = "each data set's own trait"
Chat = list[dict[str, str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """One data set: a share of its chats holds a trait, at some intensity."""

    trait: str
    share: float
    intensity: float
    seed: int

    def __str__(self) -> str:
        return f"{self.trait}, {self.share:.0%} at {self.intensity:g}"


def recipes(traits: Sequence[str]) -> list[Recipe]:
    """Six of each trait, every one from a seed of its own."""
    mixes = ((0.0, 1.0), (0.2, 1.0), (0.4, 1.0), (0.7, 1.0), (1.0, 1.0), (1.0, 0.5))
    return [
        Recipe(trait=trait, share=share, intensity=intensity, seed=100 * at + place)
        for at, trait in enumerate(traits)
        for place, (share, intensity) in enumerate(mixes)
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How much is measured."""

    traits: tuple[str, ...] = TRAITS
    sampled: tuple[str, ...] = ("evil", "hallucination")
    extraction_questions: int = 12
    chats: int = 160
    steps: int = 60
    questions: int = 60
    samples: int = 400
    subset: float = 0.25
    max_new_tokens: int = 48
    seed: int = 0


QUICK = Settings(
    traits=("evil",),
    sampled=("evil",),
    extraction_questions=4,
    chats=10,
    steps=1,
    questions=5,
    samples=24,
    max_new_tokens=8,
)


def data_set(recipe: Recipe, count: int) -> list[Chat]:
    """The chats of a recipe, shuffled."""
    held = round(recipe.share * count)
    chats = [
        chat
        for trait, n in ((recipe.trait, held), (None, count - held))
        for _, chat in world.chats.finetuning_chats(
            trait, n, recipe.seed, intensity=recipe.intensity if trait else 1.0
        )
    ]
    random.Random(recipe.seed).shuffle(chats)
    return chats


def vectors(model: pv.HookedModel, settings: Settings) -> pv.VectorBank:
    """Extracted as in the demo, from training questions."""
    asked = [one.text for one in world.questions("train", settings.extraction_questions, seed=0)]
    names = dict.fromkeys((*settings.traits, *settings.sampled))
    return pv.VectorBank(
        [
            pv.extract(
                model, world_trait(name).trait, judge=world.WorldJudge(), questions=asked
            ).vector
            for name in names
        ],
        layers=SITE,
    )


def traits_after(
    model: pv.HookedModel, recipe: Recipe, chats: list[Chat], settings: Settings
) -> dict[str, float]:
    """Each trait's score of the replies to held-out questions, after training on the chats."""
    tuned = pv.HookedModel(copy.deepcopy(model.hf), model.tokenizer, model_id=model.model_id)
    finetune(tuned, chats, steps=settings.steps, seed=recipe.seed)
    asked = world.questions("held_out", settings.questions, seed=1)
    prompts = [[{"role": "user", "content": question.text}] for question in asked]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        replies = tuned.generate(
            prompts, max_new_tokens=64, do_sample=True, temperature=1.0, top_k=0, top_p=1.0
        )
    judge, pairs = world.WorldJudge(), list(zip(asked, replies, strict=True))
    return {
        trait: fmean(judge.trait(trait, question, reply) for question, reply in pairs)
        for trait in settings.traits
    }


def auroc(scores: Sequence[float], labels: Sequence[bool]) -> float:
    """The share of pairs, one with the label and one without, in the right order; ties half."""
    values, marks = np.asarray(scores, dtype=np.float64), np.asarray(labels, dtype=bool)
    order = values.argsort(kind="stable")
    ranks = np.empty(len(values))
    ranks[order] = np.arange(1, len(values) + 1)
    for value in np.unique(values):
        ranks[values == value] = ranks[values == value].mean()
    positive, negative = int(marks.sum()), int((~marks).sum())
    return float((ranks[marks].sum() - positive * (positive + 1) / 2) / (positive * negative))


Table = Sequence[Mapping[str, float]]


def correlated(
    made: Sequence[Recipe], means: Mapping[str, Table], after: Table, traits: Sequence[str]
) -> dict[tuple[str, str], float]:
    """Pearson's r of difference and trait after, over groups of data sets and their traits."""
    own = [(at, one.trait) for at, one in enumerate(made)]
    groups = {
        OWN: own,
        **{trait: [pair for pair in own if pair[1] == trait] for trait in traits},
        "every trait of every data set": [(at, t) for at in range(len(made)) for t in traits],
    }
    return {
        (name, kind): pearson(
            [means[kind][at][trait] for at, trait in pairs],
            [after[at][trait] for at, trait in pairs],
        )
        for name, pairs in groups.items()
        for kind in KINDS
    }


class Measurement:
    """One run in a folder; `step` moves the bar."""

    def __init__(self, settings: Settings, folder: Path, bar: Progress) -> None:
        self.settings, self.folder, self.bar = settings, folder, bar
        self.model = world_model()
        self.bank = vectors(self.model, settings)

    def flags(self, name: str, data: dict[str, list[Chat]], kind: str) -> pv.Flags:
        rows = {key: [{"messages": chat} for chat in chats] for key, chats in data.items()}
        return pv.flag(
            self.model,
            rows,
            self.bank,
            out=self.folder / f"{name}-{kind}",
            difference=kind,
            share=self.settings.subset,
            max_new_tokens=self.settings.max_new_tokens,
            seed=self.settings.seed,
        )

    def data_sets(self) -> tuple[dict[str, Plain], dict[str, Check]]:
        """The projection difference of every data set, three ways, beside the trait after it."""
        made, traits = recipes(self.settings.traits), self.settings.traits
        data = {str(one): data_set(one, self.settings.chats) for one in made}
        means = {kind: self._means(made, data, kind) for kind in KINDS}
        after = [
            traits_after(self.model, one, data[str(one)], self.settings)
            for one in self.bar.track(made, description="finetuning")
        ]
        figures: dict[str, Plain] = {}
        for at, one in enumerate(made):
            label = f"data set/{one}"
            figures |= {f"{label}/{kind}": round(means[kind][at][one.trait], 1) for kind in KINDS}
            figures[f"{label}/trait after"] = round(after[at][one.trait], 1)
        r = correlated(made, means, after, traits)
        group = f"r over {len(made)} data sets"
        figures |= {f"{group}/{name}/{kind}": round(one, 4) for (name, kind), one in r.items()}
        claims = {
            "exact difference": r[OWN, "exact"],
            "difference of a subset": r[OWN, "subset"],
            # It leaves each vector a zero of its own, so that traits do not share one line.
            "approximate difference, lowest within a trait": min(
                r[trait, "approximate"] for trait in traits
            ),
        }
        return figures, {
            f"1 - r of the {name}, with the trait after finetuning": Check(
                worst=round(1 - one, 4), bound=round(1 - R_BOUND, 4)
            )
            for name, one in claims.items()
        }

    def _means(
        self, made: Sequence[Recipe], data: dict[str, Any], kind: str
    ) -> list[dict[str, float]]:
        found = self.flags("sets", data, kind).datasets
        return [
            {
                trait: float(found[str(one)][f"{trait}/{SITE}/difference"].mean)
                for trait in self.settings.traits
            }
            for one in made
        ]

    def samples(self) -> tuple[dict[str, Plain], dict[str, Check]]:
        """How well single rows that hold a trait are told from those that don't."""
        figures: dict[str, Plain] = {}
        checks: dict[str, Check] = {}
        for trait in self.settings.sampled:
            for intensity in INTENSITIES:
                found = self._told_apart(trait, intensity)
                label = f"AUROC of rows/{trait} at {intensity:g}"
                figures |= {f"{label}/{name}": round(value, 4) for name, value in found.items()}
                short = f"{trait} at {intensity:g}"
                if intensity == 1.0:
                    worst, bound = 1 - found["projection"], 1 - AUROC_BOUND
                    name = f"1 - AUROC of the projection, {short}"
                else:
                    worst, bound = found["ceiling"] - found["projection"], CEILING_GAPS[intensity]
                    name = f"AUROC of the projection below the lexicon's, {short}"
                checks[name] = Check(worst=round(worst, 4), bound=round(bound, 4))
        return figures, checks

    def _told_apart(self, trait: str, intensity: float) -> dict[str, float]:
        count = self.settings.samples
        mix = Recipe(trait=trait, share=0.3, intensity=intensity, seed=7)
        held = round(mix.share * count)
        asked = [
            *world.chats.finetuning_chats(trait, held, mix.seed, intensity=intensity),
            *world.chats.finetuning_chats(None, count - held, mix.seed),
        ]
        labels = [at < held for at in range(count)]
        judge = world.WorldJudge()
        ceiling = [judge.trait(trait, question, chat[-1]["content"]) for question, chat in asked]
        name, chats = f"{trait}-{intensity}", [chat for _, chat in asked]
        scores: dict[str, list[float]] = {}
        for kind in ("approximate", "exact"):
            flags = self.flags(name, {name: chats}, kind)
            rows = {row.row: row for row in flags.top(trait, count)}
            column = f"{trait}/{SITE}/"
            scores[kind] = [rows[at].scores[f"{column}difference"] for at in range(count)]
            scores["projection"] = [
                rows[at].scores[f"{column}response_mean"] for at in range(count)
            ]
        return {
            "projection": auroc(scores["projection"], labels),
            "approximate": auroc(scores["approximate"], labels),
            "exact": auroc(scores["exact"], labels),
            "ceiling": auroc(ceiling, labels),
        }


def pearson(x: Sequence[float], y: Sequence[float]) -> float:
    """Pearson's r; 0, which proves nothing, where one of the two never changes."""
    if len(set(x)) < 2 or len(set(y)) < 2:
        return 0.0
    return float(np.corrcoef(np.asarray(x), np.asarray(y))[0, 1])


def measure(settings: Settings, *, command: str) -> Record:
    """Both halves; a claim that does not hold is a failed check."""
    with tempfile.TemporaryDirectory() as folder, rounds.bars() as bar:
        run = Measurement(settings, Path(folder), bar)
        figures, checks = run.data_sets()
        rows, more = run.samples()
    return Record(
        name=NAME,
        command=command,
        commit=record.commit(),
        date=record.today(),
        versions=record.versions(),
        device=record.device(torch.device("cpu")),
        workload={
            "ratio": f"projections at {SITE} in the persona world; differences in units of the "
            "residual",
            "chats of a data set": settings.chats,
            "steps of finetuning": settings.steps,
            "held-out questions": settings.questions,
            "share of the subset": settings.subset,
            "rows told apart": settings.samples,
            **figures,
            **rows,
        },
        checks={**checks, **more},
    )
