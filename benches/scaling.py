"""Scaling: how the cost of watching and steering grows with what is watched and steered."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch

import pvcore as pv
from benches import record, rounds
from benches.overhead import stepping
from benches.peers.subject import SMALL, Reply, Size, Subject
from benches.random_models import Shape
from benches.record import Cell, Check, Record

NAME = "scaling"
Axis = Literal["vectors", "layers", "batch", "context", "configurations"]
# What one step along an axis adds, in the words of the table.
UNITS: Mapping[Axis, str] = {
    "vectors": "vectors watched at every layer",
    "layers": "layers watched",
    "batch": "rows watched",
    "context": "tokens of context while watching",
    "configurations": "distinct coefficients in a batch of 16",
}
SCORES_MAY_DIFFER = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Values along each axis, and what holds while another axis moves."""

    shape: Shape = SMALL
    vectors: tuple[int, ...] = (1, 7, 32, 128, 512)
    layers: tuple[int, ...] = (1, 2, 4, 8)
    batch: tuple[int, ...] = (1, 8, 32)
    context: tuple[int, ...] = (16, 256, 768)
    configurations: tuple[int, ...] = (1, 4, 16)
    new_tokens: int = 16
    rounds: int = 40

    def values(self, axis: Axis) -> tuple[int, ...]:
        found: tuple[int, ...] = getattr(self, axis)
        return found


QUICK = Settings(
    shape=Shape(hidden=64, layers=2, vocabulary=96),
    vectors=(1, 3),
    layers=(1, 2),
    batch=(1, 2),
    context=(4, 8),
    configurations=(1, 16),
    new_tokens=4,
    rounds=2,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One value on one axis: a job in pvcore, and the same in hooks of plain torch."""

    subject: Subject
    plan: pv.Plan
    layers: int
    steered: bool

    def reference(self) -> Reply:
        return self.subject.reference("rows" if self.steered else "watch")


def measure(settings: Settings, *, command: str) -> Record:
    """Check first, then time. A failed check leaves no figure standing."""
    checks: dict[str, Check] = {}
    cells: dict[str, Cell] = {}
    slopes: dict[str, record.Plain] = {}
    for axis in UNITS:
        points = {value: point_of(axis, value, settings) for value in settings.values(axis)}
        for value, point in points.items():
            checks[f"{axis} {value}"] = Check(worst=error_of(point), bound=SCORES_MAY_DIFFER)
        right = all(checks[f"{axis} {value}"].passed for value in points)
        for value, point in points.items():
            label = f"{UNITS[axis]}/{value}/decode step"
            failed = Cell(status="failed", reason=f"{axis} {value}")
            cells[label] = timed(point, settings) if right else failed
        if right:
            medians = [cells[f"{UNITS[axis]}/{value}/decode step"].p50 or 0.0 for value in points]
            slopes[f"slope, per unit of {axis}"] = slope(list(points), medians)
    if not all(check.passed for check in checks.values()):
        cells = {label: Cell(status="failed", reason="a wrong result") for label in cells}
    return Record(
        name=NAME,
        command=command,
        commit=record.commit(),
        date=record.today(),
        versions=record.versions(),
        device=record.device(torch.device("cpu")),
        workload=_workload(settings) | slopes,
        checks=checks,
        cells=cells,
    )


def point_of(axis: Axis, value: int, settings: Settings) -> Point:
    """The job at one place: everything at its usual value but one."""
    size = Size(shape=settings.shape, new_tokens=settings.new_tokens)
    layers, configurations = settings.shape.layers, 0
    if axis == "vectors":
        size = replace(size, vectors=value)
    elif axis == "layers":
        layers = value
    elif axis == "batch":
        size = replace(size, batch=value)
    elif axis == "context":
        size = replace(size, prompt_tokens=value)
    else:
        size, configurations = replace(size, batch=16, configurations=value), value
    subject = Subject(size)
    if not configurations:
        bank = pv.VectorBank(subject.vectors, layers=range(layers))
        return Point(subject=subject, plan=pv.Plan(monitor=bank), layers=layers, steered=False)
    add = pv.Add(
        subject.vectors[0], coeff=subject.coeffs.tolist(), layers=[subject.layer], span="all"
    )
    return Point(subject=subject, plan=pv.Plan(add), layers=0, steered=True)


def error_of(point: Point) -> float:
    """The worst difference of a projection, or 1 for other tokens than hooks of plain torch."""
    wanted, got = point.reference(), armed(point)()
    if not torch.equal(wanted.tokens, got.tokens):
        return 1.0
    if point.steered:
        plain = point.subject.generate(point.subject.plain)
        return 1.0 if torch.equal(got.tokens, plain) else 0.0
    assert wanted.scores is not None
    assert got.scores is not None
    return float((wanted.scores()[:, : point.layers] - got.scores()).abs().max())


def armed(point: Point) -> Callable[..., Reply]:
    """The job in pvcore, ready to run again and again; settings given go to `generate`."""
    model = pv.HookedModel(point.subject.fresh(), model_id="")
    prompts, plan = list(point.subject.ids), point.plan

    def run(**extra: Any) -> Reply:
        with model.arm(plan) as seen:
            tokens = torch.stack(model.generate_ids(prompts, **point.subject.settings, **extra))
        return Reply(
            tokens=tokens,
            scores=lambda: torch.stack([seen[name].steps for name in seen.traits], dim=-1),
        )

    return run


def timed(point: Point, settings: Settings) -> Cell:
    """The median decode step beside that of plain generation, round by round."""
    subject = point.subject
    jobs = {
        "plain": stepping(lambda **extra: subject.generate(subject.plain, **extra), on_gpu=False),
        "armed": stepping(armed(point), on_gpu=False),
    }
    laps = rounds.interleave(jobs, rounds=settings.rounds, what=str(subject.size.vectors))
    return rounds.paired(laps["armed"], laps["plain"], clock="step")


def slope(values: Sequence[int], ratios: Sequence[float]) -> float:
    """What one unit more adds to the ratio, by least squares."""
    return float(round(float(np.polyfit(values, ratios, 1)[0]), 6))


def _workload(settings: Settings) -> dict[str, record.Plain]:
    return {
        "ratio": "CPU time of a decode step beside plain `hf.generate`",
        "model": "Qwen2, random weights",
        "hidden": settings.shape.hidden,
        "layers": settings.shape.layers,
        "dtype": "float32",
        "new tokens": settings.new_tokens,
        "rounds": settings.rounds,
        "where nothing else is said": "7 vectors, all layers, batch 1, 16 tokens of context",
    }
