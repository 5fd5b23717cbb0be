"""Training: what preventative steering costs a training step, beside the same step without it."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

import pvcore as pv
from benches import record, rounds
from benches.random_models import Shape, random_qwen2, random_vectors, twin
from benches.record import Cell, Check, Record

NAME = "training"
GROUP = "training step"
PLAIN = "plain"
ROWS = {
    "again": "plain, timed twice",
    "one": "`PreventionCallback` at one layer",
    "all": "`PreventionCallback` at every layer",
    "hook one": "bare hook at one layer",
    "hook all": "bare hooks at every layer",
}
CLOCKS: dict[str, rounds.Clock] = {"CPU time": "cpu", "wall clock": "wall"}
TARGETS = {"one": 1.02}
COEFF = 0.5
GRADIENTS_MAY_DIFFER = 1e-6

SMALL = Shape(hidden=256, layers=8, vocabulary=512)

Job = Callable[[], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How much is measured; every fourth row is half padding."""

    shape: Shape = SMALL
    batch: int = 4
    tokens: int = 128
    steps: int = 2
    rounds: int = 40


QUICK = Settings(
    shape=Shape(hidden=64, layers=2, vocabulary=128), batch=2, tokens=8, steps=1, rounds=2
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One model and one batch; each arm trains a twin of it on the same weights."""

    hf: Any
    ids: Tensor
    mask: Tensor
    vector: pv.PersonaVector
    steps: int

    def loss(self, hf: Any) -> Any:
        labels = self.ids.masked_fill(self.mask == 0, -100)
        given = {"input_ids": self.ids, "attention_mask": self.mask, "labels": labels}
        return hf(**given, use_cache=False).loss

    def step(self, hf: Any, optimizer: torch.optim.Optimizer) -> None:
        self.loss(hf).backward()
        optimizer.step()
        optimizer.zero_grad()

    def layers(self, arm: str) -> list[int]:
        count = len(self.vector.sites)
        return list(range(count)) if arm.endswith("all") else [count // 2]

    def job(self, arm: str) -> Job:
        """A few steps with nothing, with bare hooks, or as a trainer calls back."""
        hf = twin(self.hf)
        # So small a rate that the model stays what it was, round after round.
        optimizer = torch.optim.AdamW(hf.parameters(), lr=1e-9, weight_decay=0.0)
        state = SimpleNamespace(global_step=0, max_steps=self.steps)
        callback = self.callback(arm) if arm in ("one", "all") else None

        def train() -> None:
            if callback is not None:
                callback.on_train_begin(None, state, None, model=hf)
            with self.hooked(hf, arm):
                for _ in range(self.steps):
                    if callback is not None:
                        callback.on_step_begin(None, state, None)
                    self.step(hf, optimizer)
                    if callback is not None:
                        callback.on_step_end(None, state, None)
            if callback is not None:
                callback.on_train_end(None, state, None)

        return train

    def callback(self, arm: str) -> pv.PreventionCallback:
        add = pv.Add(self.vector, coeff=COEFF, layers=self.layers(arm))
        return pv.PreventionCallback(add)

    @contextmanager
    def hooked(self, hf: Any, arm: str) -> Iterator[None]:
        handles = [
            hf.model.layers[layer].register_forward_hook(adding(self.vector, layer))
            for layer in (self.layers(arm) if arm.startswith("hook") else [])
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def gradients(self, arm: str) -> list[Tensor]:
        """Of every weight, in one step of an arm."""
        hf = twin(self.hf)
        state = SimpleNamespace(global_step=0, max_steps=1)
        callback = self.callback(arm) if arm in ("one", "all") else None
        hf.zero_grad()
        if callback is not None:
            callback.on_train_begin(None, state, None, model=hf)
        with self.hooked(hf, arm):
            self.loss(hf).backward()
        if callback is not None:
            callback.on_train_end(None, state, None)
        found = [weight.grad.clone() for weight in hf.parameters()]
        hf.zero_grad()
        return found


def adding(vector: pv.PersonaVector, layer: int) -> Callable[[Any, Any, Tensor], Tensor]:
    delta = COEFF * vector.direction(pv.resid_post(layer))
    return lambda _block, _inputs, h: h + delta


def task_of(settings: Settings) -> Task:
    shape = settings.shape
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, shape.vocabulary, (settings.batch, settings.tokens), generator=generator)
    mask = torch.ones_like(ids)
    mask[::4, settings.tokens // 2 :] = 0
    return Task(
        hf=random_qwen2(shape).train(),
        ids=ids,
        mask=mask,
        vector=random_vectors(shape.hidden, range(shape.layers))[0],
        steps=settings.steps,
    )


def check(task: Task) -> dict[str, Check]:
    """Gradients are those of bare hooks, and not those of the plain model."""
    plain = task.gradients(PLAIN)
    found = {}
    for arm in ("one", "all"):
        got, wanted = task.gradients(arm), task.gradients(f"hook {arm}")
        found[ROWS[arm]] = Check(worst=apart(got, wanted), bound=GRADIENTS_MAY_DIFFER)
        moved = apart(got, plain) > 100 * GRADIENTS_MAY_DIFFER
        found[f"{ROWS[arm]} acts"] = Check(worst=0.0 if moved else 1.0, bound=0.0)
    return found


def apart(got: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    return max(float((one - other).abs().max()) for one, other in zip(got, wanted, strict=True))


def measure(settings: Settings, *, command: str) -> Record:
    """Check first, then time. A failed check leaves no figure standing."""
    task = task_of(settings)
    checks = check(task)
    wrong = [name for name, one in checks.items() if not one.passed]
    return Record(
        name=NAME,
        command=command,
        commit=record.commit(),
        date=record.today(),
        versions=record.versions(),
        device=record.device(torch.device("cpu")),
        workload={
            "ratio": "time of a training step (forward, backward, AdamW) beside the plain one",
            "model": "Qwen2, random weights",
            "hidden": settings.shape.hidden,
            "layers": settings.shape.layers,
            "dtype": "float32",
            "batch": settings.batch,
            "tokens": settings.tokens,
            "steps of a round": settings.steps,
            "rounds": settings.rounds,
        },
        checks=checks,
        cells=refused(wrong[0]) if wrong else timed(task, settings),
    )


def refused(reason: str) -> dict[str, Cell]:
    return {
        f"{GROUP}/{row}/{column}": Cell(status="failed", reason=reason)
        for row in ROWS.values()
        for column in CLOCKS
    }


def timed(task: Task, settings: Settings) -> dict[str, Cell]:
    jobs = {arm: task.job(arm) for arm in (PLAIN, *ROWS)}
    laps = rounds.interleave(jobs, rounds=settings.rounds, what=NAME)
    return {
        f"{GROUP}/{row}/{column}": rounds.paired(
            laps[arm], laps[PLAIN], clock=clock, target=TARGETS.get(arm)
        )
        for arm, row in ROWS.items()
        for column, clock in CLOCKS.items()
    }
