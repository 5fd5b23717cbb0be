"""Compiled generation: what watching and steering cost where plain generation is compiled too."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

import pvcore as pv
from benches import lockstep, record, rounds
from benches.arms import Reply, Task
from benches.arms_checks import differing, projection_error
from benches.engines import compiled_run
from benches.loading import called, loaded
from benches.overhead import ROWS as WORDS
from benches.random_models import Shape, twin
from benches.record import Cell, Check, Record

NAME = "compiled"
COLUMN = "decoding"
ROWS = {name: WORDS[name] for name in ("again", "idle", "unarmed", "monitor", "steer", "both")} | {
    "idle": "taps on, compiled `hf.generate`",
    "eager": "plain, not compiled",
}
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
    new_tokens: int = 32
    generations: int = 12
    backend: str = "inductor"
    seed: int = 0


QUICK = Settings(
    shape=Shape(hidden=64, layers=2, vocabulary=128),
    vectors=9,
    batches=(2,),
    new_tokens=5,
    generations=1,
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
        self.runs: dict[str, Run] = {
            "plain": self._compiled(twin(plain)),
            "again": self._compiled(twin(plain)),
            "idle": self._compiled(self._hooked().hf),
            "unarmed": self._graphed(lambda _: nullcontext()),
            "monitor": self._graphed(lambda model: model.monitor(self.task.bank)),
            "steer": self._graphed(lambda model: model.steer(add)),
            "both": self._graphed(lambda model: model.arm(pv.Plan(add, monitor=self.task.bank))),
            "eager": lambda **extra: self.task.unhooked(plain, extra),
        }

    def _hooked(self) -> pv.HookedModel:
        return pv.HookedModel(twin(self.task.plain), model_id="")

    def _compiled(self, hf: Any) -> Run:
        """transformers' own compiled generation on a static cache."""
        return compiled_run(self.task, hf, pv.Graph(backend=self.settings.backend))

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
        """Plain tokens where nothing steers, a bare hook's where something does, right scores."""
        replies = {name: run() for name, run in self.runs.items()}
        steered = self.task.hooked(steers=True, watches=False)()
        found: dict[str, Check] = {}
        for name, reply in replies.items():
            wanted = steered if name in ("steer", "both") else replies["eager"]
            found[f"{name}: tokens unlike eager generation's"] = Check(
                worst=differing(reply.tokens, wanted.tokens), bound=0
            )
        same = (steered.tokens == replies["eager"].tokens).all(1)
        found["steer: replies it left as they were"] = Check(worst=int(same.sum()), bound=0)
        for name, moved in (("monitor", False), ("both", True)):
            error = projection_error(self.task, replies[name], steered=moved)
            found[f"{name}: error of a projection, as a share of its row"] = Check(
                worst=error, bound=ERROR_BOUND
            )
        return {f"batch {self.batch}, {name}": one for name, one in found.items()}


def measure(settings: Settings, *, command: str) -> Record:
    """Check first, then time. A failed check leaves no figure standing."""
    ways = {batch: Ways(settings, batch) for batch in settings.batches}
    checks = {name: one for way in ways.values() for name, one in way.checks().items()}
    wrong = [name for name, one in checks.items() if not one.passed]
    first = ways[settings.batches[0]].task
    cells: dict[str, Cell] = {}
    for way in ways.values():
        labels = _labels(way)
        if wrong:
            cells |= {label: Cell(status="failed", reason=wrong[0]) for label in labels.values()}
        else:
            cells |= _timed(way, labels, settings)
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


def _labels(way: Ways) -> dict[str, str]:
    counts = {"vectors": way.settings.vectors, "layers": way.task.model.n_layers}
    return {
        name: f"batch {way.batch}/{row.format(**counts)}/{COLUMN}" for name, row in ROWS.items()
    }


def _timed(way: Ways, labels: Mapping[str, str], settings: Settings) -> dict[str, Cell]:
    laps = lockstep.take_turns(
        way.runs,
        generations=settings.generations,
        new_tokens=settings.new_tokens,
        seed=settings.seed,
        what=f"batch {way.batch}",
    )
    targets = TARGETS if way.batch == 1 else {}
    return {
        label: rounds.paired(laps[name], laps["plain"], clock="cpu", target=targets.get(name))
        for name, label in labels.items()
    }


def _workload(settings: Settings, task: Task) -> dict[str, record.Plain]:
    return {
        "ratio": (
            "CPU time of all that follows the first token, beside transformers' compiled "
            "generation on the same weights, the ways taking turns after each token"
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
        "generations": settings.generations,
    }
