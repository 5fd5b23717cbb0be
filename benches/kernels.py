"""The kernels' CPU path beside the fastest sequence of torch calls by hand for each shape."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from statistics import median
from time import process_time

import torch

from benches import kernels_by_hand as by_hand
from benches import record, rounds
from benches.kernels_by_hand import Job, Operands, Requests, then
from benches.record import Cell, Check, Record
from pvcore_kernels import ops, prepared

NAME = "kernels"
TARGET = 1.3
SCORES = 1e-6
ROWS = {torch.float32: 5e-7, torch.bfloat16: 4e-3}


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Shapes, and how long each is timed: calls of one job add up to about `elements` numbers."""

    rows: tuple[int, ...] = (1, 32, 512, 2048)
    vectors: tuple[int, ...] = (7, 128)
    width: int = 1024
    elements: int = 1 << 22
    rounds: int = 30


QUICK = Settings(rows=(1, 8), vectors=(3,), width=64, elements=1 << 10, rounds=2)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# How an op is called, and what that adds to the name of a table.
WAYS = {"prepared": ", prepared on its buffers", "op": ", checked at every call"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """An op in place, the same prepared, and every way to do its job by hand."""

    op: Job
    prepare: Callable[[Operands], Callable[[], None]]
    hand: tuple[Job, ...]
    requests: Requests = "one"
    scores: bool = True


def _steer_and_project(x: Operands) -> None:
    ops.steer_project_(x.h, x.v, x.delta, x.row, x.scores)


def _prepared_steer(x: Operands) -> Callable[[], None]:
    return prepared.steer(x.h, x.delta, x.row)


def _prepared_both(x: Operands) -> Callable[[], None]:
    return prepared.steer_project(x.h, x.v, x.delta, x.row, x.scores)


BOTH = (
    *(then(by_hand.project, way) for way in by_hand.STEER),
    by_hand.project_and_steer_alike,
)
PAIRS: dict[str, Pair] = {
    "project": Pair(
        op=lambda x: ops.project_out(x.h, x.v, x.scores),
        prepare=lambda x: prepared.project(x.h, x.v, x.scores),
        hand=(by_hand.project,),
    ),
    "steer": Pair(
        op=lambda x: ops.steer_(x.h, x.delta, x.row),
        prepare=_prepared_steer,
        hand=by_hand.STEER,
        scores=False,
    ),
    "steer, mixed requests": Pair(
        op=lambda x: ops.steer_(x.h, x.delta, x.row),
        prepare=_prepared_steer,
        hand=by_hand.STEER,
        requests="mixed",
        scores=False,
    ),
    "steer and project": Pair(op=_steer_and_project, prepare=_prepared_both, hand=BOTH),
    "steer and project, mixed requests": Pair(
        op=_steer_and_project, prepare=_prepared_both, hand=BOTH, requests="mixed"
    ),
    "steer each row and project": Pair(
        op=lambda x: ops.steer_project_tokens_(x.h, x.v, x.coeff, x.scores),
        prepare=lambda x: prepared.steer_project_tokens(x.h, x.v, x.coeff, x.scores),
        hand=(by_hand.tokens,),
    ),
}


def measure(settings: Settings, *, command: str) -> Record:
    """Check first, then time. A failed check leaves no figure standing."""
    cases = list(product(DTYPES, settings.rows, settings.vectors, PAIRS))
    checks = {
        f"{name}{WAYS[way]}, {t} rows, {k} vectors, {dtype}": Check(
            worst=error_of(name, _operands(name, t, k, settings.width, dtype), way), bound=1.0
        )
        for dtype, t, k, name in cases
        for way in WAYS
    }
    wrong = next((name for name, one in checks.items() if not one.passed), "")
    cells: dict[str, Cell] = {}
    for dtype, t, k, name in cases:
        failed = Cell(status="failed", reason=wrong)
        labels = {way: f"{dtype}{told}/{t} rows, {k} vectors/{name}" for way, told in WAYS.items()}
        x = _operands(name, t, k, settings.width, dtype).moving_nothing()
        found = dict.fromkeys(WAYS, failed) if wrong else timed(name, x, settings)
        cells |= {labels[way]: cell for way, cell in found.items()}
    return Record(
        name=NAME,
        command=command,
        commit=record.commit(),
        date=record.today(),
        versions=record.versions(),
        device=record.device(torch.device("cpu")),
        workload={
            "ratio": (
                "CPU time of an op in place beside the fastest calls of torch written by hand, "
                "which check nothing"
            ),
            "width": settings.width,
            "bank": "float32",
            "rounds": settings.rounds,
        },
        checks=checks,
        cells=cells,
    )


def _operands(name: str, t: int, k: int, d: int, dtype: str) -> Operands:
    return Operands.of(t, k, d, DTYPES[dtype], requests=PAIRS[name].requests)


def error_of(name: str, x: Operands, way: str) -> float:
    """The worst error of an op against float64 of the same inputs, in its bounds.

    A score may err by a share of `|h| |v|`, the rows by a share of their norm; a row that nothing
    is added to may not change a bit.
    """
    before = x.h.clone()
    x.scores.fill_(torch.nan)
    if way == "prepared":
        PAIRS[name].prepare(x)()
    else:
        PAIRS[name].op(x)
    h, v, errors = before.double(), x.v.double(), []
    if PAIRS[name].scores:
        scale = h.norm(dim=1)[:, None] * v.norm(dim=1)
        errors.append(float(((x.scores.double() - h @ v.mT).abs() / scale).max()) / SCORES)
    resting = x.row < 0
    if name.startswith("steer each"):
        h = h + x.coeff.double() @ v
    elif name.startswith("steer"):
        h = h + x.delta.double()[x.row.clamp(min=0).long()] * ~resting[:, None]
        errors.append(0.0 if torch.equal(x.h[resting], before[resting]) else torch.inf)
    errors.append(float((x.h.double() - h).norm() / h.norm()) / ROWS[x.h.dtype])
    return torch.inf if any(one != one for one in errors) else max(errors)


def timed(name: str, x: Operands, settings: Settings) -> dict[str, Cell]:
    """Paired ratios of the op, called either way, to the fastest way by hand, by its median."""
    calls = max(1, settings.elements // x.h.numel())
    ready = PAIRS[name].prepare(x)

    def run() -> float:
        start = process_time()
        for _ in range(calls):
            ready()
        return process_time() - start

    def repeated(job: Job) -> rounds.Job:
        def run() -> float:
            start = process_time()
            for _ in range(calls):
                job(x)
            return process_time() - start

        return run

    hand = PAIRS[name].hand
    jobs = {"op": repeated(PAIRS[name].op), "prepared": run}
    jobs |= {f"by hand {way}": repeated(job) for way, job in enumerate(hand)}
    laps = rounds.interleave(jobs, rounds=settings.rounds, what=name)
    ours = {way: laps.pop(way) for way in WAYS}
    fastest = min(laps.values(), key=lambda laps: median(lap.step or 0.0 for lap in laps))
    return {way: rounds.paired(ours[way], fastest, clock="step", target=TARGET) for way in WAYS}
