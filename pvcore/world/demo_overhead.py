"""What watching and steering cost: time per token beside plain generation, interleaved."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from time import perf_counter
from typing import Any

import numpy as np
from rich.progress import Progress

from pvcore.interventions import Add
from pvcore.plan import Plan
from pvcore.vectors import PersonaVector, VectorBank
from pvcore.world.demo_record import OverheadFigures, Workload
from pvcore.world.demo_subject import Subject

_BATCHES = (1, 16)
Arm = Callable[[], AbstractContextManager[Any]]


def overhead(
    subject: Subject, vectors: Mapping[str, PersonaVector], work: Workload, bar: Progress
) -> tuple[OverheadFigures, ...]:
    """Ratios of time per token to plain generation in the same round, p20, p50 and p80.

    Every reply has the same number of tokens. The arms of a round run one after another and their
    order turns, so that a machine that slows down slows all of them.
    """
    arms = _arms(subject, vectors, work)
    rounds = [(batch, turn) for batch in _BATCHES for turn in range(-1, work.rounds)]
    ratios: dict[tuple[str, int], list[float]] = {}
    for batch, turn in bar.track(rounds, description="measuring overhead"):
        times = _round(subject, arms, batch, turn % len(arms), work)
        if turn >= 0:  # the round before the first warms up
            for label in list(arms)[1:]:
                ratios.setdefault((label, batch), []).append(times[label] / times["plain"])
    return tuple(
        OverheadFigures(
            label=label,
            batch=batch,
            rounds=work.rounds,
            p20=float(np.quantile(row, 0.2)),
            p50=float(np.quantile(row, 0.5)),
            p80=float(np.quantile(row, 0.8)),
        )
        for (label, batch), row in ratios.items()
    )


def _arms(subject: Subject, vectors: Mapping[str, PersonaVector], work: Workload) -> dict[str, Arm]:
    model, bank = subject.model, VectorBank(vectors.values())
    first = next(iter(vectors.values()))
    add = Add(first, coeff=1.0, layers=[work.layer])
    watching = f"{len(bank)} vectors watched at {len(bank.sites)} layers"
    return {
        "plain": nullcontext,
        watching: lambda: model.monitor(bank),
        "one layer steered": lambda: model.steer(add),
        "both": lambda: model.arm(Plan(add, monitor=bank)),
    }


def _round(
    subject: Subject, arms: Mapping[str, Arm], batch: int, turn: int, work: Workload
) -> dict[str, float]:
    questions = subject.traits[0].trait.evaluation_questions
    chats = [[{"role": "user", "content": questions[row % len(questions)]}] for row in range(batch)]
    exactly: dict[str, Any] = {
        "min_new_tokens": work.timed_tokens,
        "max_new_tokens": work.timed_tokens,
    }
    labels = [*list(arms)[turn:], *list(arms)[:turn]]
    times = {}
    for label in labels:
        with arms[label]():
            start = perf_counter()
            subject.model.generate_ids(chats, do_sample=False, **exactly)
            times[label] = perf_counter() - start
    return times
