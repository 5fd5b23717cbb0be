"""A short finetune on chats that hold a trait, with and without prevention, and the shift it makes.

Only the persona world has chats to train on: a model of one's own is not finetuned.
"""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

from rich.progress import Progress

from pvcore.interventions import Add
from pvcore.model import HookedModel
from pvcore.shift import finetuning_shift
from pvcore.training import prevent
from pvcore.vectors import PersonaVector, VectorBank
from pvcore.world.chats import finetuning_chats
from pvcore.world.demo_measures import chat, judged, mean_scores, random_like, sampled
from pvcore.world.demo_record import FinetuneFigures, FinetuneWay, Workload
from pvcore.world.demo_subject import Subject, world_model
from pvcore.world.finetune import finetune


def finetuned(
    subject: Subject, vectors: Mapping[str, PersonaVector], work: Workload, bar: Progress
) -> tuple[FinetuneFigures, ...]:
    """The first trait trained into the model: undefended, prevented, and under a random vector."""
    if not subject.in_world:
        return ()
    ways: tuple[FinetuneWay, ...] = ("before", "undefended", "prevented", "random vector")
    return tuple(
        _finetuned(subject, vectors, work, way) for way in bar.track(ways, description="finetuning")
    )


def _finetuned(
    subject: Subject, vectors: Mapping[str, PersonaVector], work: Workload, way: FinetuneWay
) -> FinetuneFigures:
    examined = subject.traits[0]
    name = examined.trait.name
    vector = vectors[name]
    model = world_model()
    losses: list[float] = []
    if way != "before":
        chats = [one for _, one in finetuning_chats(name, work.finetuning_chats, work.seed)]
        with _prevention(way, model, vector, work):
            losses = finetune(model, chats, steps=work.finetuning_steps, seed=work.seed)
    questions = examined.trait.evaluation_questions[: work.steering_questions]
    asked = [chat(question) for question in questions]
    after = replace(subject, model=model)
    rows = judged(after, examined, questions, sampled(after, asked, work))
    score, coherence = mean_scores(rows)
    bank = VectorBank(vectors.values(), layers=[work.layer])
    shift = finetuning_shift(subject.model, model, bank, asked)
    return FinetuneFigures(
        trait=name,
        way=way,
        coeff=work.prevention if way in ("prevented", "random vector") else 0.0,
        score=score,
        coherence=coherence,
        shift={trait: float(shift[trait]) for trait in vectors},
        losses=tuple(_ends(losses)),
        sampled=len(rows),
        judged=sum(row.failure is None for row in rows),
    )


def _prevention(
    way: FinetuneWay, model: HookedModel, vector: PersonaVector, work: Workload
) -> AbstractContextManager[Any]:
    if way == "undefended":
        return nullcontext()
    direction = vector if way == "prevented" else random_like(vector, work.seed)
    return prevent(model, Add(direction, coeff=work.prevention, layers=[work.layer]))


def _ends(losses: list[float]) -> Iterator[float]:
    if losses:
        yield losses[0]
        yield losses[-1]
