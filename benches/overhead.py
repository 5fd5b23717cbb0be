"""Overhead: what watching and steering cost while a model generates, beside plain transformers."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

import pvcore as pv
from benches import lockstep, record, rounds
from benches.arms import Task
from benches.arms_checks import check
from benches.loading import called, loaded
from benches.random_models import TRAITS, Shape, twin
from benches.record import Cell, Check, Record

NAME = "overhead"
PLAIN = "plain"
ROWS = {
    "again": "plain, timed twice",
    "idle": "taps on, `hf.generate`",
    "unarmed": "`model.generate_ids`, nothing armed",
    "monitor": "monitor {vectors} vectors at {layers} layers",
    "read": "the same, all scores read",
    "steer": "steer one layer",
    "both": "monitor and steer",
    "hook monitor": "bare hooks, same monitoring",
    "hook read": "bare hooks, same monitoring, all scores read",
    "hook steer": "bare hook, same steering",
    "hook both": "bare hooks, both",
}
# Told beside each other from the same laps: pvcore's way and the bare hooks'.
PAIRS = {name: f"hook {name}" for name in ("monitor", "read", "steer", "both")}
STEP, WHOLE, WALL = "decoding", "whole generation", "wall clock"
# Wanted of decode at batch 1. Larger batches only dilute what a call costs.
TARGETS = {"idle": 1.01, "steer": 1.02, "monitor": 1.03}
PAIR_TARGETS = {"monitor": 1.0}


# So small that whatever a call costs beside the model itself shows.
SMALL = Shape(hidden=256, layers=8, vocabulary=512)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How much is measured. `model` is a name or folder to load, or a `config.json` whose shape is
    filled with random weights; without it the shape is `shape`.
    """

    shape: Shape = SMALL
    model: str | None = None
    batches: tuple[int, ...] = (1, 8)
    prompt_tokens: int = 16
    new_tokens: int = 32
    generations: int = 64
    rounds: int = 40
    seed: int = 0


QUICK = Settings(
    shape=Shape(hidden=64, layers=2, vocabulary=128),
    batches=(1, 2),
    new_tokens=6,
    generations=2,
    rounds=2,
)


def measure(settings: Settings, *, command: str) -> Record:
    """Check first, then time. A failed check leaves no figure standing."""
    tasks = tasks_of(settings)
    checks: dict[str, Check] = {}
    for batch, task in tasks.items():
        found = check(task, task.arms())
        checks |= {f"batch {batch}, {name}": one for name, one in found.items()}
    wrong = [name for name, one in checks.items() if not one.passed]
    cells: dict[str, Cell] = {}
    for batch, task in tasks.items():
        cells |= _refused(batch, task, wrong[0]) if wrong else _timed(batch, task, settings)
    return Record(
        name=NAME,
        command=command,
        commit=record.commit(),
        date=record.today(),
        versions=record.versions(),
        device=record.device(tasks[settings.batches[0]].model.device),
        workload=_workload(settings, tasks[settings.batches[0]]),
        checks=checks,
        cells=cells,
    )


def tasks_of(settings: Settings) -> dict[int, Task]:
    """What is generated, by batch."""
    plain, model = _subjects(settings)
    return {batch: _task(settings, plain, model, batch) for batch in settings.batches}


def _subjects(settings: Settings) -> tuple[Any, pv.HookedModel]:
    """A model that pvcore never meets, and a twin that it hooks."""
    on_gpu = torch.cuda.is_available() and settings.model is not None
    plain = loaded(settings.model, settings.shape, seed=settings.seed, on_gpu=on_gpu)
    return plain, pv.HookedModel(twin(plain), model_id="")


def _task(settings: Settings, plain: Any, model: pv.HookedModel, batch: int) -> Task:
    return Task.of(
        plain,
        model,
        TRAITS,
        batch=batch,
        prompt_tokens=settings.prompt_tokens,
        new_tokens=settings.new_tokens,
        seed=settings.seed,
    )


def _labels(batch: int, task: Task, column: str) -> dict[tuple[str, str], str]:
    """The label of each figure, by the way that is timed and the one it is held beside."""
    counts = {"vectors": len(task.vectors), "layers": task.model.n_layers}
    rows = {name: row.format(**counts) for name, row in ROWS.items()}
    found = {(name, PLAIN): f"batch {batch}/{row}/{column}" for name, row in rows.items()}
    group = f"beside bare hooks, batch {batch}"
    return found | {
        (name, below): f"{group}/{rows[name]}/{column}" for name, below in PAIRS.items()
    }


def _refused(batch: int, task: Task, reason: str) -> dict[str, Cell]:
    labels = [
        label for column in (STEP, WHOLE, WALL) for label in _labels(batch, task, column).values()
    ]
    return {label: Cell(status="failed", reason=reason) for label in labels}


def _timed(batch: int, task: Task, settings: Settings) -> dict[str, Cell]:
    on_gpu = task.model.device.type == "cuda"
    finish = torch.cuda.synchronize if on_gpu else lambda: None
    arms = task.arms()
    busy: rounds.Clock = "wall" if on_gpu else "cpu"
    steps = _steps(batch, arms, settings, on_gpu=on_gpu)
    wholes = rounds.interleave(
        {name: partial(_whole, arm) for name, arm in arms.items()},
        rounds=settings.rounds,
        seed=settings.seed,
        finish=finish,
        what=f"batch {batch}, generations",
    )
    targets = {PLAIN: TARGETS, **dict.fromkeys(PAIRS.values(), PAIR_TARGETS)}
    columns: dict[str, tuple[dict[str, list[rounds.Lap]], rounds.Clock]] = {
        STEP: (steps, busy),
        WHOLE: (wholes, busy),
        WALL: (wholes, "wall"),
    }
    return {
        label: rounds.paired(
            laps[name],
            laps[below],
            clock=clock,
            target=targets[below].get(name) if batch == 1 else None,
        )
        for column, (laps, clock) in columns.items()
        for (name, below), label in _labels(batch, task, column).items()
    }


def _steps(
    batch: int, arms: Mapping[str, Callable[..., object]], settings: Settings, *, on_gpu: bool
) -> dict[str, list[rounds.Lap]]:
    """What follows the first token: in turns by tokens, and by generations on a GPU."""
    count, seed, what = settings.generations, settings.seed, f"batch {batch}, steps"
    if on_gpu:
        wait = torch.cuda.synchronize
        return lockstep.alternate(
            arms, generations=count, seed=seed, finish=wait, what=what
        ).decoding
    return lockstep.take_turns(
        arms, generations=count, new_tokens=settings.new_tokens, seed=seed, what=what
    )


def _whole(arm: Callable[..., object]) -> None:
    """The arm as a job, timed from its start to its end."""
    arm()


def _workload(settings: Settings, task: Task) -> dict[str, record.Plain]:
    config = task.plain.config
    return {
        "ratio": (
            "time beside plain `hf.generate` on the same weights: CPU time of all that follows the "
            "first token, the ways taking turns after each, and CPU time and wall clock of whole "
            "generations"
        ),
        "model": called(settings.model, config),
        "hidden": task.model.d_model,
        "layers": task.model.n_layers,
        "vocabulary": int(config.vocab_size),
        "dtype": str(task.model.dtype).removeprefix("torch."),
        "prompt tokens": settings.prompt_tokens,
        "new tokens": settings.new_tokens,
        "vectors": len(task.vectors),
        "generations in turns": settings.generations,
        "whole generations": settings.rounds,
    }
