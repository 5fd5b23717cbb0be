"""The tuner: which tile each op is launched with on this GPU, written to the table it is read from.

    python -m benches.gpu_tune [--seconds 400]

Every candidate is checked against float64 before it is timed with cold caches in a CUDA graph. A
tile that is wrong, does not fit or is not faster leaves the entry as it was.
"""

import json
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from rich.progress import track

from benches import record
from benches.gpu_trials import LAUNCH, WIDTH, Place, candidates, error, inputs
from benches.gpu_workload import rotations
from pvcore.files import write_whole
from pvcore_kernels import launch
from pvcore_kernels.launch import Launch

# The product of many vectors is cuBLAS's above the largest of these that Triton wins.
CROSSOVERS = (32, 64, 128, 256, 512, 1024)
NARROW_GAIN = 0.98
# Microseconds of a launch on inputs that are all met for the first time.
Clock = Callable[[list[Callable[[], object]]], float]
Entry = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """The tile chosen for a place, and the time of the one that stood there before."""

    tile: Launch
    us: float
    before_us: float


def cold_clock(calls: list[Callable[[], object]]) -> float:
    """The median of a captured graph's replays, per call."""
    from benches.gpu_kernels import cold

    return median(cold(calls))


def best(
    place: Place,
    start: Launch,
    tiles: Iterable[Launch],
    *,
    device: torch.device,
    clock: Clock,
    copies: int,
    until: float = float("inf"),
) -> Choice:
    """The fastest right tile; `start` unless another is faster by more than noise."""
    sets = [inputs(place, device=device, seed=seed) for seed in range(copies)]
    before = _timed(place, start, sets, clock)
    if before is None:
        raise RuntimeError(f"got a wrong result from the tile in the table: {place}, {start}")
    chosen, least = start, before
    for tile in tiles:
        if time.monotonic() > until:
            break
        us = None if tile == start else _timed(place, tile, sets, clock)
        if us is not None and us < NARROW_GAIN * least:
            chosen, least = tile, us
    return Choice(tile=chosen, us=least, before_us=before)


def _timed(
    place: Place, tile: Launch, sets: list[dict[str, torch.Tensor]], clock: Clock
) -> float | None:
    """Microseconds of a right launch; None for a tile that is wrong or does not fit."""
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources

    with launch.trying(place.op, tile):
        try:
            if error(place, sets[0]) > 1.0:
                return None
        except (OutOfResources, CompilationError):
            return None
        return clock([partial(LAUNCH[place.op], x) for x in sets])


def tuned(
    table: Mapping[str, Any],
    *,
    device: torch.device,
    clock: Clock,
    seconds: float = 400.0,
    tiles: Callable[[Place], Iterable[Launch]] = candidates,
    copies: Callable[[Place], int] = lambda _: 2,
    d: int = WIDTH,
) -> dict[str, Any]:
    """A table with the same entries, each with the best tile found in its share of the time."""
    places = [(op, entry) for op, entries in table["ops"].items() for entry in entries]
    ops: dict[str, list[Entry]] = {op: [] for op in table["ops"]}
    share = seconds / len(places)
    for op, entry in track(places, description="tuning"):
        place = Place.of(op, entry, d=d)
        start = Launch(**{field: entry[field] for field in Launch.__dataclass_fields__})
        until = time.monotonic() + share
        choice = best(
            place,
            start,
            tiles(place),
            device=device,
            clock=clock,
            copies=copies(place),
            until=until,
        )
        where = {key: entry[key] for key in ("width", "rows", "n_vec")}
        times = {"us": round(choice.us, 3), "default_us": round(choice.before_us, 3)}
        ops[op].append(where | asdict(choice.tile) | times)
    return {"ops": ops}


def crossover(device: torch.device, clock: Clock, *, t: int = 8192, d: int = WIDTH) -> int:
    """The most vectors on which a Triton projection is no slower than cuBLAS's product."""
    most = 0
    for k in CROSSOVERS:
        place = Place(op="project", t=t, k=k, rows=torch.bfloat16, bank=torch.bfloat16, d=d)
        sets = [inputs(place, device=device, seed=seed) for seed in range(2)]
        ours = clock([partial(LAUNCH["project"], x) for x in sets])
        theirs = clock([partial(torch.mm, x["h"], x["v"].mT) for x in sets])
        if ours > theirs:
            break
        most = k
    return most


def write(table: Mapping[str, Any], name: str, folder: Path = launch.TUNED) -> Path:
    """Write a device's table whole; the tables in memory are read anew."""
    path = folder / f"{name}.json"
    write_whole(path, f"{json.dumps(table, indent=1)}\n".encode())
    launch.table.cache_clear()
    launch._find.cache_clear()
    return path


def main(
    seconds: Annotated[float, typer.Option(min=1, help="How long to search in all.")] = 400.0,
    out: Annotated[Path, typer.Option(help="Folder for the table.")] = launch.TUNED,
) -> None:
    if not torch.cuda.is_available():
        print("got no GPU, so no tile can be timed; the tables stay as they are")
        raise typer.Exit(code=1)
    device = torch.device("cuda")
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    found = tuned(
        launch.table("default"),
        device=device,
        clock=cold_clock,
        seconds=seconds,
        copies=lambda place: min(rotations(place.bytes, cache), 64),
    )
    about = {
        "note": f"Tuned with python -m benches.gpu_tune on {record.today()}.",
        "commit": record.commit(),
        "versions": record.versions(),
        "crossover": crossover(device, cold_clock),
    }
    path = write(about | found, launch.device_table(device), out)
    print(f"wrote {path.name}")


if __name__ == "__main__":
    typer.run(main)
