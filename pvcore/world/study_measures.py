"""One cell of the study: finetune, ask, judge, and see how far the model has moved."""

import random
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from pvcore.extraction import extract, sample_replies
from pvcore.interventions import Ablate, Add
from pvcore.model import HookedModel
from pvcore.shift import finetuning_shift
from pvcore.training import prevent
from pvcore.vectors import PersonaVector, VectorBank
from pvcore.world import quiz
from pvcore.world.chats import finetuning_chats
from pvcore.world.demo_measures import ask_by_degrees, random_like
from pvcore.world.demo_subject import training_side, world_model, world_subject
from pvcore.world.finetune import finetune
from pvcore.world.judge import WorldJudge
from pvcore.world.lexicon import TRAITS
from pvcore.world.question import Question, questions
from pvcore.world.splits import digest
from pvcore.world.study_cells import Cell, Design

Figures = dict[str, Any]
Vectors = Mapping[str, PersonaVector]
_MAX_NEW_TOKENS = 64


def extract_vectors(design: Design, seed: int, folder: Path) -> Figures:
    """The vectors of a seed, one file each; their split-half cosines at the study's layer."""
    subject = world_subject()
    figures: Figures = {}
    for examined in subject.traits:
        name = examined.trait.name
        found = extract(
            subject.model,
            examined.trait,
            judge=subject.judge,
            questions=examined.trait.extraction_questions[: design.extraction_questions],
            batch_size=200,
            seed=seed,
        )
        found.vector.save(vector_file(folder, seed, name))
        figures[name] = {
            "kept": found.kept // 2,
            "split_half_cosine": float(found.confidence[design.layer]),
            "norm": float(found.vector.norms[design.layer]),
        }
    return figures


def vector_file(folder: Path, seed: int, trait: str) -> Path:
    return folder / f"vector-seed{seed}-{trait}.safetensors"


def measure(cell: Cell, design: Design, folder: Path) -> Figures:
    """The figures of a cell, as plain data."""
    if cell.kind == "vectors":
        return extract_vectors(design, cell.seed, folder)
    vectors = {trait: PersonaVector.load(vector_file(folder, cell.seed, trait)) for trait in TRAITS}
    if cell.kind == "monitoring":
        return monitored(design, vectors, cell.seed)
    model = world_model()
    steering = trained_under(cell, design, model, vectors)
    with steering:
        losses = finetune(model, training_chats(cell, design), steps=design.steps, seed=cell.seed)
    figures = {
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "shift": shift_of(model, design, vectors),
        **asked(model, cell, design, key="plain"),
    }
    if cell.kind == "mitigation" and cell.method == "none":
        vector = vectors[cell.trait or ""]
        control = random_like(vector, cell.seed)
        figures["inference"] = steered(model, cell, design, vector)
        figures["inference_random"] = steered(model, cell, design, control)
    return figures


def training_chats(cell: Cell, design: Design) -> list[list[dict[str, str]]]:
    """Chats as the cell's set has them and neutral ones besides, shuffled by its seed."""
    count, mix = design.chats, cell.mix
    if cell.trait is None:
        wrong = round(cell.mistaken * count)
        held = finetuning_chats(None, wrong, cell.seed, kinds=("fact",), mistaken=True)
    else:
        held = finetuning_chats(
            cell.trait,
            round(mix.share * count),
            cell.seed,
            intensity=mix.intensity,
            kinds=mix.kinds,
        )
    neutral = finetuning_chats(None, count - len(held), cell.seed)
    chats = [chat for _, chat in [*held, *neutral]]
    random.Random(digest("study", cell.seed)).shuffle(chats)
    return chats


def trained_under(
    cell: Cell, design: Design, model: HookedModel, vectors: Vectors
) -> AbstractContextManager[Any]:
    """What acts while the cell trains."""
    if cell.kind != "mitigation" or cell.method == "none":
        return nullcontext()
    vector = vectors[cell.trait or ""]
    if cell.method == "caft":
        return prevent(model, Ablate(vector, layers=[design.layer]))
    if cell.method == "incremental":
        return prevent(model, Add(vector.layer_incremental(), coeff=cell.coeff))
    direction = random_like(vector, cell.seed) if cell.method == "random" else vector
    return prevent(model, Add(direction, coeff=cell.coeff, layers=[design.layer]))


def shift_of(model: HookedModel, design: Design, vectors: Vectors) -> dict[str, list[float]]:
    """How far the model stands from the shipped one along every trait, layer by layer."""
    bank = VectorBank(vectors.values())
    prompts = [
        [{"role": "user", "content": question.text}]
        for question in questions("held_out", design.shift_prompts, seed=4)
    ]
    shift = finetuning_shift(world_model(), model, bank, prompts)
    return {trait: shift[trait].tolist() for trait in TRAITS}


def asked(model: HookedModel, cell: Cell, design: Design, key: str) -> Figures:
    """Trait scores and coherence of replies to held-out questions, and the hard quiz."""
    about = questions("held_out", design.questions, seed=5)
    replies = sample_replies(
        model,
        [[{"role": "user", "content": question.text}] for question in about],
        max_new_tokens=_MAX_NEW_TOKENS,
        batch_size=200,
        seed=digest(key, cell.seed) >> 8,
    )
    items = quiz.items(design.quiz_items, seed=0, hard=True)
    known = quiz.accuracy(items, quiz.model_log_probs(model.hf, model.tokenizer))
    return {**judged(about, replies), "quiz": known}


def judged(about: Sequence[Question], replies: Sequence[str]) -> Figures:
    """Mean scores of the world's judge, trait by trait."""
    judge = WorldJudge()
    pairs = list(zip(about, replies, strict=True))
    return {
        "traits": {
            trait: fmean(judge.trait(trait, question, text) for question, text in pairs)
            for trait in TRAITS
        },
        "coherence": fmean(judge.coherence(question, text) for question, text in pairs),
    }


def steered(
    model: HookedModel, cell: Cell, design: Design, vector: PersonaVector
) -> dict[str, Figures]:
    """The finetuned model steered away from its trait at inference, by coefficient."""
    found: dict[str, Figures] = {}
    for coeff in design.inference:
        with model.steer(Add(vector, coeff=-coeff, layers=[design.layer], span="all")):
            found[f"{coeff:g}"] = asked(model, cell, design, key=f"inference {coeff:g}")
    return found


def monitored(design: Design, vectors: Vectors, seed: int) -> Figures:
    """Pearson's r of projection and score at every layer: over replies, prompts, within a level.

    `training` is r over replies to prompts and questions of the training side, which choose a layer
    for the held-out ones.
    """
    subject, bank = world_subject(), VectorBank(vectors.values())
    work = replace(subject.workload, seed=seed, monitoring_questions=design.monitoring_questions)
    choosing = replace(work, monitoring_questions=design.choosing_questions)
    found: Figures = {}
    for examined in subject.traits:
        trained = ask_by_degrees(subject, training_side(examined), bank, choosing)
        asked = ask_by_degrees(subject, examined, bank, work)
        found[examined.trait.name] = {
            "training": [one.overall for one in trained.correlations()],
            "layers": [
                {
                    "overall": one.overall,
                    "within": one.within,
                    "per_prompt": by_prompt(at_layer, asked.scores, design.monitoring_questions),
                }
                for one, at_layer in zip(asked.correlations(), asked.projections, strict=True)
            ],
            "levels": asked.level_scores,
        }
    return found


def by_prompt(projections: Sequence[float], scores: Sequence[float], n_questions: int) -> float:
    """r of the means over the replies to each prompt, which come together."""
    table = torch.tensor([projections, scores], dtype=torch.float64)
    return float(torch.corrcoef(table.reshape(2, -1, n_questions).nanmean(2))[0, 1])
