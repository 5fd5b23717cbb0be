"""The grid: what watching and steering cost by vectors, layers, batch and engine, beside plain
generation by the same means. Prompt and decoding are told apart.
"""

import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import inf
from time import monotonic

import torch

import pvcore as pv
from benches import lockstep, record, rounds
from benches.arms import Run, Task
from benches.engines import Engine, Name
from benches.grid_arms import AGAIN, IDLE, PLAIN, Way, runs_of, ways
from benches.grid_checks import References, check
from benches.loading import called, loaded
from benches.random_models import Shape, twin
from benches.record import Cell, Check, Record
from benches.rounds import Lap

NAME = "grid"
COLUMNS = PREFILL, DECODE = "prefill", "decode"
MILLISECONDS = {PREFILL: "prefill time", DECODE: "decode time a token"}
SMALL = Shape(hidden=256, layers=8, vocabulary=512)
LATE = "no time left"
# What a CPU cannot afford, with the reason: of some groups all but the key rows, of others all.
FEW: Mapping[tuple[Name, int], str] = dict.fromkeys(
    [("compiled", 1), ("graph", 32), ("graph", 256)], "every row is compiled, and only key rows are"
)
LEFT: Mapping[tuple[Name, int], str] = dict.fromkeys(
    [("compiled", 8), ("compiled", 32), ("compiled", 256)],
    "inductor compiles each row at each batch, which takes a CPU minutes",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How much is measured. No row is begun after `minutes`; `key` leaves all but key rows out."""

    shape: Shape = SMALL
    model: str | None = None
    vectors: tuple[int, ...] = (1, 7, 32, 128, 512)
    batches: tuple[int, ...] = (1, 8, 32, 256)
    engines: tuple[Name, ...] = ("eager", "compiled", "graph")
    backend: str = "inductor"
    prompt_tokens: int = 16
    new_tokens: int = 12
    generations: Mapping[int, int] = field(default_factory=lambda: {1: 16, 8: 12, 32: 6, 256: 3})
    key: bool = False
    minutes: float | None = None
    seed: int = 0


QUICK = Settings(
    shape=Shape(hidden=64, layers=2, vocabulary=128),
    vectors=(9,),
    batches=(2,),
    engines=("eager", "graph"),
    new_tokens=4,
    generations={2: 1},
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """One engine at one batch: the rows that are timed, and why the others are not."""

    engine: Engine
    batch: int
    rows: Mapping[str, Way]
    missing: Mapping[str, str]

    def label(self, row: str, column: str) -> str:
        return f"{self.engine}, batch {self.batch}/{row}/{column}"


def measure(settings: Settings, *, command: str) -> Record:
    """Check first, then time, group by group. A failed check leaves no figure standing."""
    late = _deadline(settings.minutes)
    checks: dict[str, Check] = {}
    cells: dict[str, Cell] = {}
    on_gpu = torch.cuda.is_available()
    plain = loaded(settings.model, settings.shape, seed=settings.seed, on_gpu=on_gpu)
    hooked = pv.HookedModel(twin(plain), model_id="")
    for batch in settings.batches:
        task = task_of(plain, hooked, batch, settings)
        references = References(task)
        for group in groups(task, batch, settings):
            cells |= _missing(group, group.missing)
            if not group.rows:
                continue
            found, timed = _measured(group, references, settings, late)
            checks |= {f"{group.engine}, batch {batch}: {what}": one for what, one in found.items()}
            cells |= timed
    if not on_gpu:
        cells["CUDA graphs/every row/decode"] = Cell(status="not measured", reason="no GPU")
    wrong = [what for what, one in checks.items() if not one.passed]
    if wrong:
        cells = {label: Cell(status="failed", reason=wrong[0]) for label in cells}
    return Record(
        name=NAME,
        command=command,
        commit=record.commit(),
        date=record.today(),
        versions=record.versions(),
        device=record.device(hooked.device),
        workload=_workload(settings, hooked),
        checks=checks,
        cells=dict(sorted(cells.items(), key=lambda item: _order(item[0], settings))),
    )


def _deadline(minutes: float | None) -> Callable[[], bool]:
    """Tells whether the time is up."""
    end = inf if minutes is None else monotonic() + 60 * minutes
    return lambda: monotonic() >= end


def task_of(plain: object, hooked: pv.HookedModel, batch: int, settings: Settings) -> Task:
    """What is generated at one batch."""
    return Task.of(
        plain,
        hooked,
        [f"trait {number}" for number in range(max(settings.vectors))],
        batch=batch,
        prompt_tokens=settings.prompt_tokens,
        new_tokens=settings.new_tokens,
        seed=settings.seed,
    )


def groups(task: Task, batch: int, settings: Settings) -> list[Group]:
    """The engines at one batch, and what of the table each of them is measured on."""
    every = ways(settings.vectors, task.model.n_layers)
    on_cpu = task.model.device.type == "cpu"
    found = []
    for name in settings.engines:
        few = FEW.get((name, batch), "") if on_cpu else ""
        left = LEFT.get((name, batch), "") if on_cpu else ""
        few = few or ("left out of the reduced grid" if settings.key else "")
        rows = {} if left else {row: way for row, way in every.items() if way.key or not few}
        missing = {row: left or few for row in every if row not in rows}
        if left:
            missing |= dict.fromkeys((AGAIN, IDLE), left)
        engine = Engine.of(name, task.model.device, backend=settings.backend)
        found.append(Group(engine=engine, batch=batch, rows=rows, missing=missing))
    return found


def _missing(group: Group, reasons: Mapping[str, str]) -> dict[str, Cell]:
    return {
        group.label(row, column): Cell(status="not measured", reason=reason)
        for row, reason in reasons.items()
        for column in (PREFILL, DECODE)
    }


def _measured(
    group: Group, references: References, settings: Settings, late: Callable[[], bool]
) -> tuple[dict[str, Check], dict[str, Cell]]:
    """The checks of one group and, unless one of them failed, its figures."""
    task = references.task
    runs = runs_of(task, group.engine, group.rows)
    wanted = 0 if group.engine.graph is None else 1
    checks, checked = check(references, runs, group.rows, late, graphs=wanted)
    cells = _missing(group, {row: LATE for row in runs if row not in checked and row != PLAIN})
    runs = {row: run for row, run in runs.items() if row in checked}
    if not runs or not all(one.passed for one in checks.values()):
        failed = dict.fromkeys((row for row in runs if row != PLAIN), Cell(status="failed"))
        labels = ((group.label(row, one), cell) for row, cell in failed.items() for one in COLUMNS)
        return checks, cells | dict(labels)
    for together in _companies(group, runs):
        cells |= _timed(group, together, settings, on_gpu=task.model.device.type == "cuda")
    _free()
    return checks, cells


def _companies(group: Group, runs: Mapping[str, Run]) -> list[dict[str, Run]]:
    """The runs that are timed together. A compiled step with idle taps is compiled anew as soon as
    anything is armed in the process, so that it is timed apart.
    """
    quiet = {row: runs[row] for row in (PLAIN, AGAIN, IDLE) if row in runs}
    if group.engine.graph is None or len(quiet) < 2:
        return [dict(runs)]
    rest = {row: run for row, run in runs.items() if row not in (AGAIN, IDLE)}
    return [quiet, rest] if len(rest) > 1 else [quiet]


def _timed(
    group: Group, runs: Mapping[str, Run], settings: Settings, *, on_gpu: bool
) -> dict[str, Cell]:
    count, what = settings.generations.get(group.batch, 8), f"{group.engine}, batch {group.batch}"
    if on_gpu:
        laps = lockstep.alternate(runs, generations=count, finish=torch.cuda.synchronize, what=what)
    else:
        laps = lockstep.phases(runs, generations=count, new_tokens=settings.new_tokens, what=what)
    cells = _cells(group, {PREFILL: laps.prompts, DECODE: laps.decoding}, on_gpu)
    return cells | (_absolute(group, laps, settings.new_tokens - 1) if on_gpu else {})


def _cells(
    group: Group, laps: Mapping[str, Mapping[str, list[Lap]]], on_gpu: bool
) -> dict[str, Cell]:
    clock: rounds.Clock = "wall" if on_gpu else "cpu"
    return {
        group.label(row, column): rounds.paired(mine, by_row[PLAIN], clock=clock)
        for column, by_row in laps.items()
        for row, mine in by_row.items()
        if row != PLAIN
    }


def _absolute(group: Group, laps: lockstep.Phases, steps: int) -> dict[str, Cell]:
    """Milliseconds, which a GPU alone may report."""
    cells = {}
    for column, by_row, share in ((PREFILL, laps.prompts, 1), (DECODE, laps.decoding, steps)):
        for row, mine in by_row.items():
            p20, p50, p80 = rounds.spread([1000 * lap.wall / share for lap in mine])
            cell = Cell(status="measured", p20=p20, p50=p50, p80=p80, n=len(mine), unit="ms")
            cells[group.label(row, MILLISECONDS[column])] = cell
    return cells


def _free() -> None:
    """Compiled steps and their caches are large, and no later group uses them."""
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _order(label: str, settings: Settings) -> tuple[int, int]:
    """Engines as they are set, each with its batches."""
    group = label.split("/")[0]
    kinds = ("eager", "compiled", "graph", "CUDA graphs")
    batch = int(group.rpartition("batch ")[2]) if "batch " in group else 0
    kind = next(at for at, kind in enumerate(kinds) if group.startswith(kind))
    return kind, settings.batches.index(batch) if batch else 0


def _workload(settings: Settings, model: pv.HookedModel) -> dict[str, record.Plain]:
    time = "time" if model.device.type == "cuda" else "CPU time"
    exact = model.dtype == torch.float32
    return {
        "ratio": (
            f"{time} beside plain generation on the same weights by the same means: eager is "
            "`hf.generate`, compiled and graph are transformers' compiled generation with the same "
            "backend; prefill is all up to the first token, with arming, and decode all after it"
        ),
        "model": called(settings.model, model.hf.config),
        "hidden": model.d_model,
        "layers": model.n_layers,
        "vocabulary": int(model.hf.config.get_text_config().vocab_size),
        "dtype": str(model.dtype).removeprefix("torch."),
        "prompt tokens": settings.prompt_tokens,
        "new tokens": settings.new_tokens,
        "held to raw hooks": "tokens" if exact else "logits of forced tokens",
        "generations": ", ".join(
            f"{count} at batch {batch}" for batch, count in settings.generations.items()
        ),
    }
