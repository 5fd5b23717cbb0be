"""Scaling: how the cost of watching and steering grows with what is watched and steered."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

import pvcore as pv
from benches import lockstep, record, rounds
from benches.loading import called
from benches.peers.subject import SMALL, Reply, Size, Subject
from benches.random_models import Shape
from benches.record import Cell, Check, Record
from pvcore.blocks import find_decoder
from pvcore.numerals import number

NAME = "scaling"
Axis = Literal["vectors", "layers", "batch", "context", "configurations"]
# What one step along an axis adds, in the words of the table.
UNITS: Mapping[Axis, str] = {
    "vectors": "vectors watched at every layer",
    "layers": "layers watched",
    "batch": "rows watched",
    "context": "tokens of context while watching",
    "configurations": "distinct vectors in a batch of 16, each steering rows of its own",
}
COLUMN = "decoding"
SCORES_MAY_DIFFER = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Values along each axis, and what holds while another axis moves."""

    shape: Shape = SMALL
    model: str | None = None
    vectors: tuple[int, ...] = (1, 7, 32, 128, 512)
    layers: tuple[int, ...] = (1, 2, 4, 8)
    batch: tuple[int, ...] = (1, 8, 32)
    context: tuple[int, ...] = (16, 256, 768)
    configurations: tuple[int, ...] = (1, 4, 16)
    new_tokens: int = 16
    rounds: int = 24

    def values(self, axis: Axis, n_layers: int) -> tuple[int, ...]:
        found: tuple[int, ...] = getattr(self, axis)
        return tuple(one for one in found if axis != "layers" or one <= n_layers)


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
    layers: int = 0
    # What is added to each row of the batch, where something is.
    delta: Float[Tensor, "row 1 d_model"] | None = None

    def reference(self) -> Reply:
        if self.delta is None:
            return self.subject.reference("watch")
        delta, block = self.delta, find_decoder(self.subject.plain).blocks[self.subject.layer]
        handle = block.register_forward_hook(lambda _module, _args, output: output + delta)
        try:
            return Reply(tokens=self.subject.generate(self.subject.plain))
        finally:
            handle.remove()


def measure(settings: Settings, *, command: str) -> Record:
    """Check first, then time. A failed check leaves no figure standing."""
    checks: dict[str, Check] = {}
    cells: dict[str, Cell] = {}
    slopes: dict[str, record.Plain] = {}
    usual = Subject(Size(shape=settings.shape, model=settings.model))
    for axis, unit in UNITS.items():
        values = settings.values(axis, usual.n_layers)
        points = {value: point_of(axis, value, settings) for value in values}
        labels = {value: f"{unit}/{value}/{COLUMN}" for value in values}
        for value, point in points.items():
            checks[f"{axis} {value}"] = Check(worst=error_of(point), bound=SCORES_MAY_DIFFER)
        wrong = [f"{axis} {value}" for value in values if not checks[f"{axis} {value}"].passed]
        if wrong:
            cells |= dict.fromkeys(labels.values(), Cell(status="failed", reason=wrong[0]))
            continue
        ratios = timed(points, settings, what=axis)
        cells |= {labels[value]: _cell(ratios[value]) for value in values}
        slopes[f"fitted slope/one more of {axis} adds/{COLUMN}"] = slope_told(ratios)
    if not all(check.passed for check in checks.values()):
        wrong = [name for name, check in checks.items() if not check.passed]
        cells, slopes = {one: Cell(status="failed", reason=wrong[0]) for one in cells}, {}
    return Record(
        name=NAME,
        command=command,
        commit=record.commit(),
        date=record.today(),
        versions=record.versions(),
        device=record.device(torch.device("cpu")),
        workload=_workload(settings, usual) | slopes,
        checks=checks,
        cells=cells,
    )


def point_of(axis: Axis, value: int, settings: Settings) -> Point:
    """The job at one place: everything at its usual value but one."""
    size = Size(shape=settings.shape, model=settings.model, new_tokens=settings.new_tokens)
    layers = 0
    if axis == "vectors":
        size = replace(size, vectors=value)
    elif axis == "layers":
        layers = value
    elif axis == "batch":
        size = replace(size, batch=value)
    elif axis == "context":
        size = replace(size, prompt_tokens=value)
    else:
        return _configured(Subject(replace(size, batch=16, vectors=value)))
    subject = Subject(size)
    layers = layers or subject.n_layers
    bank = pv.VectorBank(subject.vectors, layers=range(layers))
    return Point(subject=subject, plan=pv.Plan(monitor=bank), layers=layers)


def _configured(subject: Subject) -> Point:
    """Every vector steers rows of its own; a single one steers all, by one number."""
    site, several = pv.resid_post(subject.layer), len(subject.vectors) > 1
    owner = torch.arange(subject.size.batch) % len(subject.vectors)
    adds = []
    for place, vector in enumerate(subject.vectors):
        own = (subject.coeff * (owner == place)).tolist()
        coeff = own if several else subject.coeff
        adds.append(pv.Add(vector, coeff=coeff, layers=[subject.layer], span="all"))
    raw = torch.stack([vector.direction(site) for vector in subject.vectors])
    return Point(subject=subject, plan=pv.Plan(*adds), delta=subject.coeff * raw[owner][:, None])


def error_of(point: Point) -> float:
    """The worst difference of a projection, or 1 for other tokens than hooks of plain torch."""
    wanted, got = point.reference(), armed(point)()
    if not torch.equal(wanted.tokens, got.tokens):
        return 1.0
    if point.delta is not None:
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


def timed(points: Mapping[int, Point], settings: Settings, *, what: str) -> dict[int, list[float]]:
    """All that follows the first token, beside plain generation of the same size: a ratio for each
    generation, all places along the axis taking turns.
    """
    arms: dict[str, lockstep.Arm] = {}
    for value, point in points.items():
        arms[f"plain {value}"] = _plain(point.subject)
        arms[f"armed {value}"] = armed(point)
    laps = lockstep.take_turns(
        arms, generations=settings.rounds, new_tokens=settings.new_tokens, what=what
    )
    return {
        value: [
            mine.cpu / plain.cpu
            for mine, plain in zip(laps[f"armed {value}"], laps[f"plain {value}"], strict=True)
        ]
        for value in points
    }


def _plain(subject: Subject) -> Callable[..., object]:
    hf = subject.fresh()
    return lambda **extra: subject.generate(hf, **extra)


def _cell(ratios: Sequence[float]) -> Cell:
    return rounds.measured(ratios)


def slope(values: Sequence[int], ratios: Sequence[float]) -> float:
    """What one unit more adds to the ratio, by least squares."""
    return float(np.polyfit(values, ratios, 1)[0])


def slope_told(ratios: Mapping[int, Sequence[float]]) -> str:
    """The slope fitted to each generation on its own, in percent of a plain step: the median and,
    in brackets, p20 and p80.
    """
    fitted = [
        slope(list(ratios), [ratios[value][turn] for value in ratios])
        for turn in range(len(next(iter(ratios.values()))))
    ]
    p20, p50, p80 = (float(np.quantile(fitted, share)) for share in (0.2, 0.5, 0.8))
    low, middle, high = (number(100 * one, signed=True) for one in (p20, p50, p80))
    return f"{middle} % ({low} to {high})"


def _workload(settings: Settings, usual: Subject) -> dict[str, record.Plain]:
    return {
        "ratio": (
            "CPU time of all that follows the first token beside plain `hf.generate` of the same "
            "size, everything on one axis taking turns after each token"
        ),
        "model": called(settings.model, usual.plain.config),
        "hidden": usual.d_model,
        "layers": usual.n_layers,
        "dtype": "float32",
        "new tokens": settings.new_tokens,
        "rounds": settings.rounds,
        "where nothing else is said": "7 vectors, all layers, batch 1, 16 tokens of context",
    }
