"""The measurements of a demo: vectors, dose and response, monitoring, and what zero changes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isnan, nan
from statistics import fmean
from typing import Any

import torch
from rich.progress import Progress

from pvcore.controls import random_of_same_norm
from pvcore.correlation import Correlations, MonitoredReply, correlations
from pvcore.extraction import Conversation, Extraction, Rollout, extract, sample_replies
from pvcore.interventions import Add
from pvcore.judge import Judgement, judge_all
from pvcore.vectors import PersonaVector, VectorBank
from pvcore.world.demo_record import (
    DoseFigures,
    MonitorFigures,
    VectorFigures,
    Workload,
    ZeroFigures,
)
from pvcore.world.demo_subject import Examined, Subject
from pvcore.world.splits import digest

Vectors = Mapping[str, PersonaVector]


def extract_all(subject: Subject, work: Workload, bar: Progress) -> dict[str, Extraction]:
    """The vector of every trait at every layer, by the paper's protocol."""
    return {
        examined.trait.name: extract(
            subject.model,
            examined.trait,
            judge=subject.judge,
            questions=examined.trait.extraction_questions[: work.extraction_questions],
            rollouts=work.rollouts,
            max_new_tokens=work.max_new_tokens,
            batch_size=work.batch_size,
            seed=work.seed,
        )
        for examined in bar.track(subject.traits, description="extracting vectors")
    }


def vector_figures(extraction: Extraction) -> VectorFigures:
    """An extraction without its rollouts."""
    positive, negative = (
        _mean([_score(rollout) for rollout in extraction.rollouts if rollout.positive == side])
        for side in (True, False)
    )
    layers = extraction.layers
    return VectorFigures(
        trait=extraction.vector.trait,
        pairs=len(extraction.rollouts) // 2,
        kept=extraction.kept // 2,
        reasons=extraction.reasons,
        positive_score=positive,
        negative_score=negative,
        norms=tuple(layer.norm for layer in layers),
        split_half_cosine=tuple(layer.split_half_cosine for layer in layers),
        separation=tuple(layer.separation for layer in layers),
    )


def cosines(vectors: Vectors, layer: int) -> tuple[tuple[float, ...], ...]:
    """Cosine of every vector with every other at one layer."""
    return tuple(
        tuple(float(one.at(layer).cosine(other.at(layer))) for other in vectors.values())
        for one in vectors.values()
    )


def dose_responses(
    subject: Subject, vectors: Vectors, work: Workload, bar: Progress
) -> tuple[DoseFigures, ...]:
    """Every trait at every layer of the workload, no system prompt, beside a random control.

    All doses of a vector run as one request, each row with its own coefficient; vector and control
    draw the same random numbers.
    """
    runs = [(examined, layer) for examined in subject.traits for layer in work.layers]
    return tuple(
        _dose_response(subject, examined, vectors[examined.trait.name], layer, work)
        for examined, layer in bar.track(runs, description="steering by dose")
    )


def _dose_response(
    subject: Subject, examined: Examined, vector: PersonaVector, layer: int, work: Workload
) -> DoseFigures:
    questions = examined.trait.evaluation_questions[: work.steering_questions]
    asked = [question for _ in work.coefficients for question in questions]
    coefficients = [dose for dose in work.coefficients for _ in questions]
    rows: list[Judgement] = []
    for direction in (vector, random_like(vector, work.seed)):
        replies = _steered_replies(subject, direction, layer, asked, coefficients, work)
        rows += judged(subject, examined, asked, replies)
    means = [
        mean_scores(rows[first : first + len(questions)])
        for first in range(0, len(rows), len(questions))
    ]
    real, control = means[: len(work.coefficients)], means[len(work.coefficients) :]
    return DoseFigures(
        trait=examined.trait.name,
        layer=layer,
        coefficients=work.coefficients,
        scores=tuple(score for score, _ in real),
        coherence=tuple(coherence for _, coherence in real),
        control_scores=tuple(score for score, _ in control),
        control_coherence=tuple(coherence for _, coherence in control),
        sampled=len(rows),
        judged=sum(row.failure is None for row in rows),
    )


def random_like(vector: PersonaVector, seed: int) -> PersonaVector:
    """Random directions with the norms of a vector; each trait draws its own."""
    generator = torch.Generator().manual_seed(digest("control", vector.trait, seed) >> 1)
    return random_of_same_norm(vector, generator)


def monitoring(
    subject: Subject, vectors: Vectors, work: Workload, bar: Progress
) -> tuple[MonitorFigures, ...]:
    """Prompts that ask for a trait by degrees: projection before the reply, score after it."""
    bank = VectorBank(vectors.values())
    return tuple(
        _monitored(subject, examined, bank, work)
        for examined in bar.track(subject.traits, description="monitoring")
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """Replies to prompts that ask by degrees: levels, scores, and projections layer by layer."""

    levels: Sequence[float]
    prompts: Sequence[tuple[str, str]]
    projections: Sequence[Sequence[float]]
    scores: Sequence[float]
    judged: int

    def correlations(self) -> list[Correlations]:
        """Of projections and scores, at every layer."""
        return [
            correlations(
                [
                    MonitoredReply(projection=x, score=score, level=f"{level:g}", prompt=prompt)
                    for x, score, level, prompt in zip(
                        one, self.scores, self.levels, self.prompts, strict=True
                    )
                ]
            )
            for one in self.projections
        ]

    @property
    def level_scores(self) -> dict[str, float]:
        """The mean score at each level."""
        return {
            f"{level:g}": _mean(
                [s for s, at in zip(self.scores, self.levels, strict=True) if at == level]
            )
            for level in dict.fromkeys(self.levels)
        }


def ask_by_degrees(subject: Subject, examined: Examined, bank: VectorBank, work: Workload) -> Asked:
    """Every graded prompt with each of the last evaluation questions; replies to one come together.

    Projections are along the vector of the trait, at the last token before the reply.
    """
    name = examined.trait.name
    questions = examined.trait.evaluation_questions[-work.monitoring_questions :]
    asked = [
        (level, prompt, question)
        for level, prompts in examined.graded
        for prompt in prompts
        for question in questions
    ]
    with subject.model.monitor(bank) as seen:
        replies = sampled(subject, [chat(question, prompt) for _, prompt, question in asked], work)
    rows = judged(subject, examined, [question for _, _, question in asked], replies)
    return Asked(
        levels=[level for level, _, _ in asked],
        prompts=[(prompt, question) for _, prompt, question in asked],
        projections=seen[name].last_prompt_token.tolist(),
        scores=[_score(row) for row in rows],
        judged=sum(row.failure is None for row in rows),
    )


def _monitored(
    subject: Subject, examined: Examined, bank: VectorBank, work: Workload
) -> MonitorFigures:
    asked = ask_by_degrees(subject, examined, bank, work)
    figures = asked.correlations()
    chosen = [site.layer for site in bank.sites].index(work.monitoring_layer)
    return MonitorFigures(
        trait=examined.trait.name,
        layer=work.monitoring_layer,
        overall=figures[chosen].overall,
        within=figures[chosen].within,
        overall_by_layer=tuple(figure.overall for figure in figures),
        level_scores=asked.level_scores,
        replies=tuple(zip(asked.levels, asked.projections[chosen], asked.scores, strict=True)),
        sampled=len(asked.scores),
        judged=asked.judged,
    )


def zero_changes_nothing(subject: Subject, vectors: Vectors, work: Workload) -> ZeroFigures:
    """Greedy replies with every vector added at every layer 0 times, and then at full strength."""
    questions = subject.traits[0].trait.evaluation_questions[: work.steering_questions]
    chats = [chat(question) for question in questions]
    settings: dict[str, Any] = {"do_sample": False, "max_new_tokens": work.max_new_tokens}
    plain = subject.model.generate_ids(chats, **settings)
    equal = []
    for dose in (0.0, max(work.coefficients)):
        with subject.model.steer(*(Add(vector, coeff=dose) for vector in vectors.values())):
            steered = subject.model.generate_ids(chats, **settings)
        equal.append(sum(map(torch.equal, plain, steered)))
    return ZeroFigures(rows=len(chats), equal_at_zero=equal[0], equal_at_strongest=equal[1])


def _steered_replies(
    subject: Subject,
    vector: PersonaVector,
    layer: int,
    questions: Sequence[str],
    coefficients: Sequence[float],
    work: Workload,
) -> list[str]:
    replies: list[str] = []
    for first in range(0, len(questions), work.batch_size):
        batch = slice(first, first + work.batch_size)
        with subject.model.steer(Add(vector, coeff=coefficients[batch], layers=[layer])):
            replies += sampled(subject, [chat(q) for q in questions[batch]], work, part=first)
    return replies


def sampled(
    subject: Subject, chats: Sequence[Conversation], work: Workload, *, part: int = 0
) -> list[str]:
    """Replies at the size and seed of the workload; parts of one request are seeded apart."""
    return sample_replies(
        subject.model,
        chats,
        max_new_tokens=work.max_new_tokens,
        batch_size=work.batch_size,
        seed=work.seed + part,
    )


def chat(question: str, system_prompt: str = "") -> Conversation:
    """A question on its own, or under a system prompt."""
    system = [{"role": "system", "content": system_prompt}] if system_prompt else []
    return [*system, {"role": "user", "content": question}]


def judged(
    subject: Subject, examined: Examined, questions: Sequence[str], replies: Sequence[str]
) -> tuple[Judgement, ...]:
    """The judge's word on every reply, in order."""
    pairs = zip(questions, replies, strict=True)
    return judge_all(subject.judge, examined.trait.name, pairs).rows


def _score(row: Judgement | Rollout) -> float:
    return nan if row.trait_score is None else row.trait_score


def mean_scores(rows: Sequence[Judgement]) -> tuple[float, float]:
    """Mean trait and coherence score of the judged rows."""
    coherence = [nan if row.coherence_score is None else row.coherence_score for row in rows]
    return _mean([_score(row) for row in rows]), _mean(coherence)


def _mean(numbers: Sequence[float]) -> float:
    known = [number for number in numbers if not isnan(number)]
    return fmean(known) if known else nan
