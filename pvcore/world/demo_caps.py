"""Capping: prompts that ask for a trait, with the projection held where plain replies have it."""

from collections.abc import Mapping

from rich.progress import Progress

from pvcore.interventions import Cap
from pvcore.vectors import PersonaVector, VectorBank
from pvcore.world.demo_measures import chat, judged, mean_scores, sampled
from pvcore.world.demo_record import CapFigures, Workload
from pvcore.world.demo_subject import Examined, Subject

Levels = Mapping[int, float]


def capped(
    subject: Subject, vectors: Mapping[str, PersonaVector], work: Workload, bar: Progress
) -> tuple[CapFigures, ...]:
    """Every trait asked for at full strength, without and with a cap at every layer."""
    bank = VectorBank(vectors.values())
    plain = _plain_levels(subject, bank, work)
    return tuple(
        _capped(subject, examined, vectors[examined.trait.name], plain[examined.trait.name], work)
        for examined in bar.track(subject.traits, description="capping")
    )


def cap_at(vector: PersonaVector, levels: Levels) -> Cap:
    """The cap that holds a vector's projection at a level of its own at each layer."""
    return Cap(vector, max=dict(levels))


def _plain_levels(subject: Subject, bank: VectorBank, work: Workload) -> dict[str, Levels]:
    """Mean projection over the tokens of plain replies, of each trait at each layer."""
    questions = subject.traits[0].trait.evaluation_questions[: work.steering_questions]
    with subject.model.monitor(bank) as seen:
        sampled(subject, [chat(question) for question in questions], work)
    layers = [site.layer for site in bank.sites]
    return {
        trait: dict(zip(layers, seen[trait].steps.nanmean((0, 2)).tolist(), strict=True))
        for trait in bank.traits
    }


def _capped(
    subject: Subject, examined: Examined, vector: PersonaVector, levels: Levels, work: Workload
) -> CapFigures:
    questions = examined.trait.evaluation_questions[: work.steering_questions]
    prompts = examined.graded[-1][1]
    chats = [
        chat(question, prompts[place % len(prompts)]) for place, question in enumerate(questions)
    ]
    asked = judged(subject, examined, questions, sampled(subject, chats, work))
    with subject.model.steer(cap_at(vector, levels)):
        held = judged(subject, examined, questions, sampled(subject, chats, work))
    (asked_score, asked_coherence), (held_score, held_coherence) = (
        mean_scores(asked),
        mean_scores(held),
    )
    rows = [*asked, *held]
    return CapFigures(
        trait=examined.trait.name,
        max={str(layer): level for layer, level in levels.items()},
        score=asked_score,
        coherence=asked_coherence,
        capped_score=held_score,
        capped_coherence=held_coherence,
        sampled=len(rows),
        judged=sum(row.failure is None for row in rows),
    )
