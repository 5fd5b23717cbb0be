"""What each row of the grid does while it generates, and the runs that do it with an engine."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

import pvcore as pv
from benches.arms import Reply, Run, Task
from benches.engines import Engine, plain_run
from benches.random_models import twin

PLAIN, AGAIN, IDLE = "plain", "plain, timed twice", "taps on, nothing armed"
# How many vectors of a bank are held to raw hooks: all of 512 would take longer than the timing.
COMPARED = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """One row: `vectors` watched at some layers, and layers where the first vector is added.

    A `key` row is measured also where only few rows can be afforded.
    """

    vectors: int = 0
    watched: tuple[int, ...] = ()
    steered: tuple[int, ...] = ()
    key: bool = False


def ways(counts: Sequence[int], n_layers: int) -> dict[str, Way]:
    """Every row that arms something, by its name in the table."""
    every, one = tuple(range(n_layers)), (n_layers // 2,)
    keys = {7, 128} & set(counts) or set(counts)
    found: dict[str, Way] = {}
    for count in counts:
        what = f"monitor {count} vector{'s' * (count > 1)}"
        found[f"{what} at one layer"] = Way(vectors=count, watched=one)
        found[f"{what} at {n_layers} layers"] = Way(vectors=count, watched=every, key=count in keys)
    found["steer one layer"] = Way(steered=one, key=True)
    found[f"steer {n_layers} layers"] = Way(steered=every)
    count = 7 if 7 in counts else counts[0]
    name = f"monitor {count} vectors at {n_layers} layers, steer one"
    found[name] = Way(vectors=count, watched=every, steered=one, key=True)
    return found


def bank_of(task: Task, way: Way) -> pv.VectorBank:
    return pv.VectorBank(task.vectors[: way.vectors], layers=list(way.watched))


def runs_of(task: Task, engine: Engine, rows: Mapping[str, Way]) -> dict[str, Run]:
    """Plain generation, the rows that arm nothing, and each given row: on a twin of its own,
    because a model keeps one compiled generation.
    """
    hooked = pv.HookedModel(twin(task.plain), model_id="")
    runs = {
        PLAIN: plain_run(task, twin(task.plain), engine),
        AGAIN: plain_run(task, twin(task.plain), engine),
        IDLE: plain_run(task, hooked.hf, engine),
    }
    return runs | {name: armed_run(task, engine, way) for name, way in rows.items()}


def armed_run(task: Task, engine: Engine, way: Way) -> Run:
    """pvcore's generation under the row's plan. What a user makes once is made outside the run."""
    model = pv.HookedModel(twin(task.plain), model_id="")
    prompts, how = list(task.prompts), engine.graph or "eager"
    adds = (
        [pv.Add(task.vectors[0], coeff=task.coeff, layers=list(way.steered))] if way.steered else []
    )
    plan = pv.Plan(*adds, monitor=bank_of(task, way) if way.vectors else None)

    def run(**extra: Any) -> Reply:
        with model.arm(plan) as seen:
            tokens = torch.stack(model.generate_ids(prompts, engine=how, **task.settings, **extra))
        if not way.vectors:
            return Reply(tokens=tokens)
        names = [seen.traits[at] for at in compared(way.vectors)]
        return Reply(
            tokens=tokens,
            scores=lambda: torch.stack([seen[name].steps for name in names], dim=-1),
            prompt=lambda: torch.stack([seen[name].prompt for name in names], dim=-1),
        )

    return run


def compared(count: int) -> list[int]:
    """Which vectors of a bank are held to raw hooks: the first, the last, and some between."""
    return sorted({round(at) for at in torch.linspace(0, count - 1, min(count, COMPARED)).tolist()})
