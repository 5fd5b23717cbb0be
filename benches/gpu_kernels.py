"""The kernels on a GPU: checked against float64, then timed with cold caches in a CUDA graph.

    python -m benches.gpu_kernels [--out FOLDER]

Needs torch, Triton and this checkout, and no network. Without a GPU the record says so.
"""

import importlib
from collections.abc import Callable, Sequence
from functools import partial
from math import prod
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

from benches import record
from benches.gpu_workload import LAYERS, Ceilings, Point, binds, floor_us, points, rotations
from benches.record import Cell, Check, Record, Unit
from benches.rounds import spread

NAME = "gpu_kernels"
COLUMNS = (
    "project",
    "steer and project",
    "mm",
    "mm and addmm",
    "compiled by torch",
    "copy of the rows",
)
SCORES, ROWS = 1e-6, 4e-3
REPEATS = 15
# Copies of the inputs are kept within this, however cold that leaves the cache.
MOST_BYTES = 24 << 30
Call = Callable[[], object]


def measure(*, command: str) -> Record:
    """Every cell, or why it is missing."""
    if not torch.cuda.is_available():
        missing = Cell(status="not measured", reason="no GPU")
        return _record(command, {}, dict.fromkeys(_labels(), missing), torch.device("cpu"))
    importlib.import_module("pvcore_kernels.ops")  # registers torch.ops.pvcore
    device = torch.device("cuda")
    checks = {f"{point}, {point.d} wide": worst(point) for point in _checked()}
    if not all(one.passed for one in checks.values()):
        wrong = next(name for name, one in checks.items() if not one.passed)
        failed = Cell(status="failed", reason=wrong)
        return _record(command, checks, dict.fromkeys(_labels(), failed), device)
    ceilings, cells = ceilings_of(device)
    for point in points():
        cells |= timed(point, ceilings)
    cells |= deferred(ceilings)
    return _record(command, checks, cells, device)


def _checked() -> list[Point]:
    """All small ones, and of the large ones each way that a call can go."""
    large = {(32, 1024), (8192, 128)}
    return [p for p in points() if (p.t <= 256 and p.k <= 128) or (p.t, p.k) in large]


def _labels() -> list[str]:
    found = [f"{p.d} wide: {name}/{p}/time" for p in points() for name in COLUMNS]
    return [*found, f"all {LAYERS} layers at once/1 rows, 128 vectors/time"]


def inputs(point: Point, seed: int = 0) -> dict[str, Tensor]:
    """Rows, a bank, a delta for each of eight requests, and buffers for what is written."""
    generator = torch.Generator("cuda").manual_seed(seed)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, device="cuda", generator=generator)

    v = draw(point.k, point.d)
    bank = torch.float32 if point.bank_bytes == 4 else torch.bfloat16
    return {
        "h": draw(point.t, point.d).bfloat16(),
        "v": (v / v.norm(dim=1, keepdim=True)).to(bank),
        "delta": draw(8, point.d),
        "row": (torch.arange(point.t, device="cuda") % 9 - 1).int(),
        "c": draw(point.t, point.k),
        "scores": torch.full((point.t, point.k), torch.nan, device="cuda"),
    }


def worst(point: Point) -> Check:
    """The worst error of scores and rows against float64 of the same rounded inputs, in bounds."""
    x = inputs(point)
    h, v, row = x["h"], x["v"], x["row"]
    moved, scores = torch.ops.pvcore.steer_project(h, v, x["delta"], row)
    torch.ops.pvcore.project_out(h, v, x["scores"])
    exact = h.double() @ v.double().mT
    scale = h.double().norm(dim=1)[:, None] * v.double().norm(dim=1)
    off = max(float(((s.double() - exact).abs() / scale).max()) for s in (scores, x["scores"]))
    wanted = h.double() + x["delta"].double()[row.clamp(min=0).long()] * (row >= 0)[:, None]
    rows = float((moved.double() - wanted).norm() / wanted.norm())
    kept = torch.equal(moved[row < 0], h[row < 0])
    return Check(worst=max(off / SCORES, rows / ROWS, 0.0 if kept else 2.0), bound=1.0)


def cold(calls: Sequence[Call]) -> list[float]:
    """Microseconds a call, all of them in one captured graph, repeated; every variant is warm."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    times = []
    for _ in range(REPEATS):
        start, end = _event(), _event()
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(1000 * start.elapsed_time(end) / len(calls))
    return times


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def cell(times: Sequence[float], unit: Unit = "us", target: float | None = None) -> Cell:
    p20, p50, p80 = spread(list(times))
    return Cell(
        status="measured", p20=p20, p50=p50, p80=p80, n=len(times), unit=unit, target=target
    )


def ceilings_of(device: torch.device) -> tuple[Ceilings, dict[str, Cell]]:
    """Copying and multiplying at their best, on this device and in this run."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copies = cold([lambda: target.copy_(source)] * 4)
    a = torch.randn(8192, 8192, device=device).bfloat16()
    products = cold([lambda: torch.mm(a, a)] * 4)
    rates = [2 * source.numel() / one for one in copies]
    flops = [2 * 8192**3 / one for one in products]
    ceilings = Ceilings(sorted(rates)[len(rates) // 2], sorted(flops)[len(flops) // 2])
    return ceilings, {
        "this GPU/a copy of 1 GiB/rate": cell([one / 1e3 for one in rates], "GB/s"),
        "this GPU/a product of 8192/rate": cell([one / 1e6 for one in flops], "TFLOP/s"),
    }


def timed(point: Point, ceilings: Ceilings) -> dict[str, Cell]:
    """Every variant at one point, inputs rotated through more memory than the cache holds.

    What is added is zero, so that rows written in place stay what they are.
    """
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    wanted = rotations(point.steered, cache)
    sets = [inputs(point, seed) for seed in range(min(wanted, max(2, MOST_BYTES // point.steered)))]
    pv = torch.ops.pvcore
    torch._dynamo.reset()  # compiled for this shape alone, and never given up on
    compiled = torch.compile(steer_and_project, fullgraph=True, dynamic=False)
    variants: dict[str, Callable[[dict[str, Tensor]], object]] = {
        "project": lambda x: pv.project_out(x["h"], x["v"], x["scores"]),
        "steer and project": lambda x: pv.steer_project_(
            x["h"], x["v"], x["delta"], x["row"], x["scores"]
        ),
        "mm": lambda x: torch.mm(x["h"], x["v"].mT),
        "mm and addmm": lambda x: (
            torch.mm(x["h"], x["v"].mT),
            torch.addmm(x["h"], x["c"], x["v"], out=x["h"]),
        ),
        "compiled by torch": lambda x: compiled(x["h"], x["v"], x["delta"], x["row"], x["scores"]),
        "copy of the rows": lambda x: x["h"].clone(),
    }
    for x in sets:
        x["delta"].zero_()
        x["c"] = torch.zeros_like(x["c"], dtype=x["h"].dtype)
    found: dict[str, Cell] = {}
    for name, variant in variants.items():
        floors = {
            "project": (point.read, point.flops),
            "steer and project": (point.steered, point.flops),
        }
        target = floor_us(*floors[name], ceilings) if name in floors else None
        times = cold([partial(variant, x) for x in sets])
        found[f"{point.d} wide: {name}/{point}, {binds(point, ceilings)} bind/time"] = cell(
            times, target=target
        )
    return found


def steer_and_project(h: Tensor, v: Tensor, delta: Tensor, row: Tensor, scores: Tensor) -> None:
    """What the op does, as a compiler may be given it; scores are rounded as `mm` rounds them."""
    scores.copy_(torch.mm(h, v.mT.to(h.dtype)))
    moved = (h + delta.index_select(0, row.clamp(min=0))).to(h.dtype)
    h.copy_(torch.where((row >= 0)[:, None], moved, h))


def deferred(ceilings: Ceilings) -> dict[str, Cell]:
    """All layers of one token scored in one launch, beside the least its bank allows.

    Banks are rotated through more memory than the cache holds.
    """
    hs = [torch.randn(1, 3584, device="cuda").bfloat16() for _ in range(LAYERS)]
    scores = torch.empty(LAYERS, 1, 128, device="cuda")
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    found = {}
    for bank, size in ((torch.bfloat16, 2), (torch.float32, 4)):
        shape = LAYERS, 128, 3584
        moved = prod(shape) * size
        banks = [
            torch.randn(*shape, device="cuda").to(bank) for _ in range(rotations(moved, cache))
        ]
        least = moved / ceilings.copy_bytes_per_us
        from pvcore_kernels.tiled.layers import address_table, project_layers

        table = address_table(hs)
        times = cold([partial(project_layers, hs, v, scores, table) for v in banks])
        label = f"all {LAYERS} layers at once/1 rows, 128 vectors in {str(bank)[6:]}/time"
        found[label] = cell(times, target=least)
    return found


def _record(
    command: str, checks: dict[str, Check], cells: dict[str, Cell], device: torch.device
) -> Record:
    return Record(
        name=NAME,
        command=command,
        commit=record.commit(),
        date=record.today(),
        versions=record.versions(),
        device=record.device(device),
        workload={
            "ratio": "time of one call, caches cold, in a CUDA graph; wanted is the roofline",
            "rows": "bfloat16",
            "bank": "bfloat16",
        },
        checks=checks,
        cells=cells,
    )


def main(
    out: Annotated[Path | None, typer.Option(help="Folder for the record.")] = None,
) -> None:
    if not record.hand_over(measure(command="python -m benches.gpu_kernels"), out):
        raise typer.Exit(code=1)


if __name__ == "__main__":
    typer.run(main)
