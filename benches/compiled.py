"""Compiled generation: what watching and steering cost where plain generation is compiled too."""

from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

import pvcore as pv
from benches import lockstep, record, rounds
from benches.arms import Reply, Task
from benches.arms_checks import ERROR, differing, projection_error
from benches.engines import compiled_run, graphs_of, own_cache_run
from benches.loading import called, loaded
from benches.overhead import ROWS as WORDS
from benches.random_models import Shape, twin
from benches.record import Cell, Check, Record
from benches.tables import counted
from pvcore.graph import room

NAME = "compiled"
COLUMN = "decoding"
# Beside what: plain generation on a cache as long as the engine's, or on transformers' own.
COLUMNS = {"plain": "beside plain", "own": "beside plain on transformers' own cache"}
# A step with idle taps is compiled for a process in which nothing is armed, and again when a plan
# is: it is timed while nothing else is either.
QUIET = {"again": WORDS["again"], "idle": "taps on, compiled `hf.generate`"}
ROWS = {name: WORDS[name] for name in ("unarmed", "monitor", "steer")}
TARGETS = {"idle": 1.0, "monitor": 1.03, "steer": 1.01}
ERROR_BOUND = 1e-5

Run = Callable[..., Reply]

QWEN_HALF = Shape(hidden=896, layers=24, vocabulary=4096)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How much is measured. `backend` is that of `torch.compile` on both sides."""

    shape: Shape = QWEN_HALF
    model: str | None = None
    vectors: int = 128
    batches: tuple[int, ...] = (1, 8)
    prompt_tokens: int = 16
    new_tokens: int = 24
    generations: int = 32
    # Of batches above 1, which have no targets.
    larger: int = 6
    backend: str = "inductor"
    seed: int = 0


QUICK = Settings(
    shape=Shape(hidden=64, layers=2, vocabulary=128),
    vectors=9,
    batches=(2,),
    new_tokens=5,
    generations=1,
    larger=1,
    backend="eager",
)


class Ways:
    """Each way to generate, on a twin of its own: a model keeps one compiled generation."""

    def __init__(self, settings: Settings, batch: int) -> None:
        self.settings, self.batch = settings, batch
        plain = loaded(settings.model, settings.shape, seed=settings.seed)
        self.task = Task.of(
            plain,
            pv.HookedModel(twin(plain), model_id=""),
            [f"trait {number}" for number in range(settings.vectors)],
            batch=batch,
            prompt_tokens=settings.prompt_tokens,
            new_tokens=settings.new_tokens,
            seed=settings.seed,
        )
        task = self.task
        add = pv.Add(task.vectors[0], coeff=task.coeff, layers=[task.layer])
        graph = pv.Graph(backend=settings.backend)
        self.runs: dict[str, Run] = {
            "plain": compiled_run(task, twin(plain), graph),
            "again": compiled_run(task, twin(plain), graph),
            "idle": compiled_run(task, self._hooked().hf, graph),
            "own": own_cache_run(task, twin(plain), graph),
            "unarmed": self._graphed(lambda _: nullcontext()),
            "monitor": self._graphed(lambda model: model.monitor(self.task.bank)),
            "steer": self._graphed(lambda model: model.steer(add)),
        }
        self.graphs: Counter[str] = Counter()

    def _hooked(self) -> pv.HookedModel:
        return pv.HookedModel(twin(self.task.plain), model_id="")

    def _graphed(
        self, arming: Callable[[pv.HookedModel], AbstractContextManager[pv.Seen | None]]
    ) -> Run:
        """pvcore's compiled generation, inside the block of a plan or of none."""
        model, engine = self._hooked(), pv.Graph(backend=self.settings.backend)

        def run(**extra: Any) -> Reply:
            with arming(model) as seen:
                tokens = torch.stack(
                    model.generate_ids(
                        list(self.task.prompts), engine=engine, **self.task.settings, **extra
                    )
                )
            if seen is None or not seen.traits:
                return Reply(tokens=tokens)
            return Reply(
                tokens=tokens,
                scores=lambda: torch.stack([seen[name].steps for name in seen.traits], dim=-1),
            )

        return run

    def checks(self) -> dict[str, Check]:
        """Plain tokens where nothing steers, a bare hook's where something does, right scores, and
        one graph for each way, which its second generation runs again.
        """
        replies = {name: self._counted(name) for name in self.runs for _ in range(2)}
        eager = self.task.unhooked(self.task.plain, {})
        steered = self.task.hooked(steers=True, watches=False)()
        found: dict[str, Check] = {}
        for name, reply in replies.items():
            wanted = steered if name == "steer" else eager
            found[f"{name}: tokens unlike eager generation's"] = Check(
                worst=differing(reply.tokens, wanted.tokens), bound=0
            )
            found[f"{name}: graphs more or less than one"] = Check(
                worst=abs(self.graphs[name] - 1), bound=0
            )
        same = (steered.tokens == eager.tokens).all(1)
        found["steer: replies it left as they were"] = Check(worst=int(same.sum()), bound=0)
        error = projection_error(self.task, replies["monitor"], steered=False)
        found[f"monitor: {ERROR}"] = Check(worst=error, bound=ERROR_BOUND)
        return {f"batch {self.batch}, {name}": one for name, one in found.items()}

    def _counted(self, name: str) -> Reply:
        reply, graphs = graphs_of(self.runs[name])
        self.graphs[name] += graphs
        return reply


def measure(settings: Settings, *, command: str) -> Record:
    """Check first, then time. A failed check leaves no figure standing."""
    ways = {batch: Ways(settings, batch) for batch in settings.batches}
    checks = {name: one for way in ways.values() for name, one in way.checks().items()}
    wrong = [name for name, one in checks.items() if not one.passed]
    first = ways[settings.batches[0]].task
    cells: dict[str, Cell] = {}
    for way in ways.values():
        if wrong:
            cells |= dict.fromkeys(labels(way).values(), Cell(status="failed", reason=wrong[0]))
        else:
            cells |= _timed(way, settings)
    return Record(
        name=NAME,
        command=command,
        commit=record.commit(),
        date=record.today(),
        versions=record.versions(),
        device=record.device(first.model.device),
        workload=_workload(settings, first),
        checks=checks,
        cells=cells,
    )


def labels(way: Ways) -> dict[tuple[str, str], str]:
    """The label of each figure, by the way that is timed and the one it is held beside."""
    counts = {"vectors": way.settings.vectors, "layers": way.task.model.n_layers}
    quiet = {
        (name, "plain"): f"batch {way.batch}, nothing armed/{row}/{COLUMN}"
        for name, row in QUIET.items()
    }
    return quiet | {
        (name, below): f"batch {way.batch}/{row.format(**counts)}/{column}"
        for name, row in ROWS.items()
        for below, column in COLUMNS.items()
    }


def _timed(way: Ways, settings: Settings) -> dict[str, Cell]:
    """Where nothing is armed, and then where something is, each beside plain ways of its own."""
    targets = TARGETS if way.batch == 1 else {}
    cells: dict[str, Cell] = {}
    for rows, below in ((QUIET, ("plain",)), (ROWS, tuple(COLUMNS))):
        laps = lockstep.take_turns(
            {name: way.runs[name] for name in (*below, *rows)},
            generations=settings.generations if way.batch == 1 else settings.larger,
            new_tokens=settings.new_tokens,
            seed=settings.seed,
            what=f"batch {way.batch}, {counted(len(rows), 'rows')}",
        )
        cells |= {
            label: rounds.paired(laps[name], laps[beside], clock="cpu", target=targets.get(name))
            for (name, beside), label in labels(way).items()
            if name in rows
        }
    return cells


def _workload(settings: Settings, task: Task) -> dict[str, record.Plain]:
    columns = settings.prompt_tokens + settings.new_tokens - 1
    padded = room(columns)
    return {
        "ratio": (
            "CPU time of all that follows the first token, beside transformers' compiled "
            "generation on the same weights, the ways taking turns after each token; plain runs on "
            f"a static cache of {padded} columns, as the engine does, and on transformers' own of "
            f"{columns}"
        ),
        "model": called(settings.model, task.plain.config),
        "hidden": task.model.d_model,
        "layers": task.model.n_layers,
        "vocabulary": int(task.plain.config.vocab_size),
        "dtype": str(task.model.dtype).removeprefix("torch."),
        "backend": settings.backend,
        "prompt tokens": settings.prompt_tokens,
        "new tokens": settings.new_tokens,
        "vectors": settings.vectors,
        "generations": f"{settings.generations} at batch 1, else {settings.larger}",
    }
