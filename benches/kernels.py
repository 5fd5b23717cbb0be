"""The kernels' CPU path beside the best sequence of torch calls written by hand for each shape."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from time import process_time

import torch
from torch import Tensor

from benches import record, rounds
from benches.record import Cell, Check, Record
from pvcore_kernels import ops
from pvcore_kernels.bank import bank

NAME = "kernels"
TARGET = 1.3
SCORES = 1e-6


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Operands:
    """One request for all rows, as in a prefill. `columns` is the bank as torch multiplies it."""

    h: Tensor
    v: Tensor
    columns: Tensor
    delta: Tensor
    row: Tensor
    coeff: Tensor
    scores: Tensor

    @classmethod
    def of(cls, t: int, k: int, d: int, dtype: torch.dtype) -> "Operands":
        generator = torch.Generator().manual_seed(0)
        raw = torch.randn(k, d, generator=generator)
        v = bank(raw).units
        return cls(
            h=torch.randn(t, d, generator=generator).to(dtype),
            v=v,
            columns=v.mT,
            delta=torch.zeros(1, d),
            row=torch.zeros(t, dtype=torch.int32),
            coeff=torch.zeros(t, k),
            scores=torch.empty(t, k),
        )


Job = Callable[[Operands], object]


def _project(x: Operands) -> object:
    return torch.mm(x.h.float(), x.columns, out=x.scores)


def _add(x: Operands) -> object:
    return x.h.add_(x.delta[0])


def _add_each(x: Operands) -> object:
    if x.h.dtype == torch.float32:
        return x.h.addmm_(x.coeff, x.v)
    return x.h.copy_(torch.addmm(x.h.float(), x.coeff, x.v))


PAIRS: dict[str, tuple[Job, Job]] = {
    "project": (lambda x: ops.project_out(x.h, x.v, x.scores), _project),
    "steer": (lambda x: ops.steer_(x.h, x.delta, x.row), _add),
    "steer and project": (
        lambda x: ops.steer_project_(x.h, x.v, x.delta, x.row, x.scores),
        lambda x: (_project(x), _add(x)),
    ),
    "steer each row and project": (
        lambda x: ops.steer_project_tokens_(x.h, x.v, x.coeff, x.scores),
        lambda x: (_project(x), _add_each(x)),
    ),
}


def measure(settings: Settings, *, command: str) -> Record:
    """Check first, then time. A failed check leaves no figure standing."""
    shapes = list(product(DTYPES, settings.rows, settings.vectors))
    checks = {
        f"{name}, {t} rows, {k} vectors, {dtype}": Check(
            worst=error_of(name, Operands.of(t, k, settings.width, DTYPES[dtype])), bound=SCORES
        )
        for dtype, t, k in shapes
        for name in PAIRS
    }
    wrong = next((name for name, one in checks.items() if not one.passed), "")
    cells: dict[str, Cell] = {}
    for dtype, t, k in shapes:
        x = Operands.of(t, k, settings.width, DTYPES[dtype])
        for name in PAIRS:
            failed = Cell(status="failed", reason=wrong)
            label = f"{dtype}/{t} rows, {k} vectors/{name}"
            cells[label] = failed if wrong else timed(name, x, settings)
    return Record(
        name=NAME,
        command=command,
        commit=record.commit(),
        date=record.today(),
        versions=record.versions(),
        device=record.device(torch.device("cpu")),
        workload={
            "ratio": "CPU time of an op in place beside the same in torch calls written by hand",
            "width": settings.width,
            "bank": "float32",
            "rounds": settings.rounds,
        },
        checks=checks,
        cells=cells,
    )


def error_of(name: str, x: Operands) -> float:
    """The worst error of a score as a share of `|h| |v|`; 1 where a row moved: nothing is added."""
    before = x.h.clone()
    x.scores.fill_(0 if name == "steer" else torch.nan)
    PAIRS[name][0](x)
    exact = before.double() @ x.v.double().mT
    if name == "steer":
        return 0.0 if torch.equal(x.h, before) else 1.0
    scale = before.double().norm(dim=1)[:, None] * x.v.double().norm(dim=1)
    error = float(((x.scores.double() - exact).abs() / scale).nan_to_num(nan=1.0).max())
    return error if torch.equal(x.h, before) else 1.0


def timed(name: str, x: Operands, settings: Settings) -> Cell:
    """Paired ratios of the op to the hand-written sequence."""
    calls = max(1, settings.elements // x.h.numel())

    def repeated(job: Job) -> rounds.Job:
        def run() -> float:
            start = process_time()
            for _ in range(calls):
                job(x)
            return process_time() - start

        return run

    ours, hand = PAIRS[name]
    jobs = {"ours": repeated(ours), "hand": repeated(hand)}
    laps = rounds.interleave(jobs, rounds=settings.rounds, what=name)
    return rounds.paired(laps["ours"], laps["hand"], clock="step", target=TARGET)
