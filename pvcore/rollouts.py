"""Rollouts: replies sampled under contrasting prompts, their scores, and which of them are kept."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

from pvcore.errors import ExtractionError
from pvcore.request_checks import check_whole
from pvcore.traits import ContrastPair

Score = float | int | None
Conversation = list[dict[str, str]]
FEWEST_PAIRS = 2  # one for each half of the split whose cosine is the confidence


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One reply to be written: `copy` counts those to the same question under the same prompt."""

    positive: bool
    system_prompt: str
    question: str
    copy: int

    @property
    def chat(self) -> Conversation:
        """The messages that the reply answers."""
        return asked(self.system_prompt, self.question)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """One sampled reply with its scores; `dropped` says why the mean leaves it out, "" if kept."""

    positive: bool
    system_prompt: str
    question: str
    answer: str
    trait_score: Score
    coherence_score: Score
    dropped: str

    @property
    def chat(self) -> Conversation:
        """The whole conversation."""
        reply = {"role": "assistant", "content": self.answer}
        return [*asked(self.system_prompt, self.question), reply]


def asked(system_prompt: str, question: str) -> Conversation:
    """A question under a system prompt, or on its own where that is empty."""
    system = [{"role": "system", "content": system_prompt}] if system_prompt else []
    return [*system, {"role": "user", "content": question}]


def turns(
    prompts: Sequence[ContrastPair], questions: Sequence[str], rollouts: int
) -> tuple[Turn, ...]:
    """Every question under every positive prompt, then in the same order under every negative."""
    check_whole(ExtractionError, rollouts=rollouts)
    if rollouts < 1 or not prompts or not questions:
        raise ExtractionError(
            f"got {len(prompts)} pairs of system prompts, {len(questions)} questions and rollouts="
            f"{rollouts}; wanted at least one of each"
        )
    sides = {
        True: [pair.positive for pair in prompts],
        False: [pair.negative for pair in prompts],
    }
    return tuple(
        Turn(positive=positive, system_prompt=prompt, question=question, copy=copy)
        for positive, side in sides.items()
        for prompt, question, copy in product(side, questions, range(rollouts))
    )


def pairwise_filter(
    positive_scores: Sequence[Score],
    negative_scores: Sequence[Score],
    positive_coherence: Sequence[Score],
    negative_coherence: Sequence[Score],
    threshold: float | int = 50.0,
) -> tuple[bool, ...]:
    """Which rows are kept: both replies coherent, the positive one with the trait, the other not.

    The rule of the paper's code, by row: three scores from `threshold` up, and the negative trait
    score below it. A row with a score that is None or NaN is not kept.
    """
    columns = (positive_scores, negative_scores, positive_coherence, negative_coherence)
    if len({len(column) for column in columns}) > 1:
        raise ExtractionError(
            f"got {', '.join(str(len(column)) for column in columns)} scores; wanted one of each "
            "kind per row"
        )
    numbers = ((math.nan if n is None else n for n in row) for row in zip(*columns, strict=True))
    return tuple(
        positive >= threshold
        and negative < threshold
        and coherent >= threshold
        and negative_coherent >= threshold
        for positive, negative, coherent, negative_coherent in numbers
    )


def filtered(rows: Sequence[Rollout], threshold: float | int) -> tuple[Rollout, ...]:
    """The rollouts, positive half first, with the reason why the pairwise filter drops them.

    What was dropped before stays so, whatever its scores, and its counterpart goes with it.
    """
    positive, negative = rows[: len(rows) // 2], rows[len(rows) // 2 :]
    kept = pairwise_filter(
        [row.trait_score for row in positive],
        [row.trait_score for row in negative],
        [row.coherence_score for row in positive],
        [row.coherence_score for row in negative],
        threshold,
    )
    kept = tuple(
        keep and not (one.dropped or other.dropped)
        for keep, one, other in zip(kept, positive, negative, strict=True)
    )
    return tuple(
        replace(row, dropped="" if keep else _reason(row, threshold))
        for row, keep in zip(rows, (*kept, *kept), strict=True)
    )


def kept_of(rows: Sequence[Rollout], trait: str) -> list[int]:
    """The indices of those that are kept; `ExtractionError` where they are too few."""
    kept = [index for index, row in enumerate(rows) if not row.dropped]
    if len(kept) < 2 * FEWEST_PAIRS:
        dropped = ", ".join(f"{n} {reason}" for reason, n in reasons_of(rows).items())
        raise ExtractionError(
            f"got {len(kept) // 2} of {len(rows) // 2} pairs kept for {trait!r} (replies dropped: "
            f"{dropped}); wanted at least {FEWEST_PAIRS}. Try more rollouts, or prompts this model "
            "follows"
        )
    return kept


def reasons_of(rows: Sequence[Rollout]) -> Mapping[str, int]:
    """How many rollouts were dropped for each reason."""
    return Counter(row.dropped for row in rows if row.dropped)


def _reason(row: Rollout, threshold: float | int) -> str:
    if row.dropped or row.trait_score is None or row.coherence_score is None:
        return row.dropped or "not judged"
    if (row.trait_score >= threshold) != row.positive:
        return "positive without the trait" if row.positive else "negative with the trait"
    return "incoherent" if row.coherence_score < threshold else "its counterpart was dropped"
