"""Breakdown: what each part of a watched or steered step costs, beside the part before it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

import pvcore as pv
from benches import lockstep, overhead, record, rounds
from benches.arms import Reply, Run, Task
from benches.arms_checks import differing
from benches.loading import called
from benches.overhead import SMALL
from benches.random_models import Shape
from benches.record import Cell, Check, Record

NAME = "breakdown"
PLAIN = "plain"
# Each way does what the one it is held beside does, and one thing more.
PARTS = {
    "again": (PLAIN, "plain, timed twice"),
    "idle": (PLAIN, "idle taps at {layers} layers"),
    "unarmed": ("idle", "`model.generate_ids` in place of `hf.generate`"),
    "steer": ("unarmed", "steering one layer"),
    "kept": ("unarmed", "keeping the newest rows of {layers} layers"),
    "monitor": ("kept", "scoring them on {vectors} vectors"),
}
PART, WHOLE = "beside the part before", "beside plain"


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How much is measured; every part in eager decode."""

    shape: Shape = SMALL
    model: str | None = None
    batch: int = 1
    prompt_tokens: int = 16
    new_tokens: int = 32
    generations: int = 96
    seed: int = 0


QUICK = Settings(shape=Shape(hidden=64, layers=2, vocabulary=128), new_tokens=6, generations=2)


def arms(task: Task) -> dict[str, Run]:
    """Every way by name."""
    whole = task.arms()
    made = {name: whole[name] for name in (PLAIN, *PARTS) if name in whole}
    return made | {"kept": lambda **extra: Reply(tokens=task.armed(unscored(task), extra).tokens)}


@contextmanager
def unscored(task: Task) -> Iterator[pv.Seen]:
    """A monitor whose rows are kept as long as a monitor's, and then dropped."""
    with task.model.monitor(task.bank) as seen:
        seen._score_waiting = _drop  # type: ignore[assignment, method-assign]
        yield seen


def _drop(held: Any) -> None:
    held.columns.take()


def check(task: Task) -> dict[str, Check]:
    """Every way makes the tokens of bare transformers, and each part does its share of the work."""
    runs = arms(task)
    plain = runs[PLAIN]().tokens
    checks = {
        f"tokens, {name}": Check(worst=differing(run().tokens, plain), bound=0)
        for name, run in runs.items()
        if name != "steer"
    }
    steered = Check(worst=int(torch.equal(runs["steer"]().tokens, plain)), bound=0)
    missed = task.new_tokens - 1 - rows_kept(task)
    return checks | {
        "steered tokens that are plain ones": steered,
        "steps whose rows are not kept": Check(worst=abs(missed), bound=0),
    }


def rows_kept(task: Task) -> int:
    """How many steps' rows a monitor that scores none has held over one generation."""
    with unscored(task) as seen:
        task.model.generate_ids(list(task.prompts), **task.settings)
        ((held),) = seen._records.values()
        return held.columns.taken + min(map(len, held.columns.rows))


def measure(settings: Settings, *, command: str) -> Record:
    """Check first, then time. A failed check leaves no figure standing."""
    (task,) = overhead.tasks_of(_as_overhead(settings)).values()
    checks = check(task)
    wrong = [name for name, one in checks.items() if not one.passed]
    cells = _refused(task, wrong[0]) if wrong else _timed(task, settings)
    return Record(
        name=NAME,
        command=command,
        commit=record.commit(),
        date=record.today(),
        versions=record.versions(),
        device=record.device(torch.device("cpu")),
        workload=_workload(settings, task),
        checks=checks,
        cells=cells,
    )


def _as_overhead(settings: Settings) -> overhead.Settings:
    return overhead.Settings(
        shape=settings.shape,
        model=settings.model,
        batches=(settings.batch,),
        prompt_tokens=settings.prompt_tokens,
        new_tokens=settings.new_tokens,
        seed=settings.seed,
    )


def _labels(task: Task) -> list[tuple[str, str, str]]:
    """Each figure: the way that is timed, the one it is held beside, and its label."""
    counts = {"vectors": len(task.vectors), "layers": task.model.n_layers}
    return [
        (name, below, f"one part more/{row.format(**counts)}/{column}")
        for name, (before, row) in PARTS.items()
        for below, column in ((before, PART), (PLAIN, WHOLE))
    ]


def _refused(task: Task, reason: str) -> dict[str, Cell]:
    return {label: Cell(status="failed", reason=reason) for _, _, label in _labels(task)}


def _timed(task: Task, settings: Settings) -> dict[str, Cell]:
    laps = lockstep.take_turns(
        arms(task),
        generations=settings.generations,
        new_tokens=settings.new_tokens,
        seed=settings.seed,
        what="parts of a step",
    )
    return {
        label: rounds.paired(laps[name], laps[below], clock="cpu")
        for name, below, label in _labels(task)
    }


def _workload(settings: Settings, task: Task) -> dict[str, record.Plain]:
    return {
        "ratio": "CPU time of all that follows the first token, the ways taking turns after each",
        "model": called(settings.model, task.plain.config),
        "hidden": task.model.d_model,
        "layers": task.model.n_layers,
        "batch": settings.batch,
        "prompt tokens": settings.prompt_tokens,
        "new tokens": settings.new_tokens,
        "vectors": len(task.vectors),
        "generations in turns": settings.generations,
    }
