"""A part of the grid on a GPU: one real shape, graphed and eager, on the rows that matter most.

    python -m benches.gpu_grid [--out FOLDER] [--model CONFIG] [--minutes 3]

Decoding comes first, and then the prefill of a long prompt. Needs torch, transformers and this
checkout, and no network. Without a GPU the record says so.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from time import monotonic
from typing import Annotated

import torch
import typer

from benches import grid, record
from benches.record import ROOT, Cell, Record

NAME = "gpu_grid"
SHAPE = ROOT / "benches" / "shapes" / "qwen2.5-7b.json"
# Each row of the graphed part is compiled on its own, which takes most of the time.
SETTINGS = grid.Settings(
    vectors=(7, 128),
    batches=(1, 32),
    engines=("graph", "eager"),
    prompt_tokens=128,
    new_tokens=64,
    generations={1: 10, 32: 10},
    key=True,
)
LONG = replace(
    SETTINGS,
    vectors=(128,),
    batches=(1,),
    engines=("eager",),
    prompt_tokens=8192,
    new_tokens=2,
    generations={1: 10},
)
LONG_GROUP = "prompt of 8192 tokens, "
# Wanted at most, by the start of a row's name: of decoding with CUDA graphs by batch, and of the
# prefill of a long prompt.
GRAPHED: Mapping[str, Mapping[int, float]] = {
    "monitor 128 vectors at": {1: 1.005, 32: 1.003},
    "monitor 7 vectors at": {1: 1.002, 32: 1.002},
    "steer one layer": {1: 1.001, 32: 1.001},
}
LONG_PREFILL = {"monitor 128 vectors at": 1.003}


def measure(model: Path, minutes: float, *, command: str) -> Record:
    """The reduced grid and the long prompt, or why they are missing."""
    name = name_of(model)
    if not torch.cuda.is_available():
        return missing(name, command)
    end = monotonic() + 60 * minutes
    made = grid.measure(replace(SETTINGS, model=str(model), minutes=minutes), command=command)
    left = max(end - monotonic(), 0.0) / 60
    long = grid.measure(replace(LONG, model=str(model), minutes=left), command=command)
    return joined(name, made, long)


def name_of(model: Path) -> str:
    """A record for each family: the first one's has no name of its own."""
    return NAME if model.stem == SHAPE.stem else f"{NAME}_{model.stem.partition('-')[0]}"


def joined(name: str, made: Record, long: Record) -> Record:
    """Both as one record, its targets beside its figures; none stand where a check of either
    failed.
    """
    checks = {**made.checks, **{f"{LONG_GROUP}{what}": one for what, one in long.checks.items()}}
    cells = {label: aimed(label, cell) for label, cell in made.cells.items()}
    for label, cell in long.cells.items():
        cells[f"{LONG_GROUP}{label}"] = aimed(f"{LONG_GROUP}{label}", cell)
    wrong = [what for what, one in checks.items() if not one.passed]
    if wrong:
        cells = dict.fromkeys(cells, Cell(status="failed", reason=wrong[0]))
    return replace(made, name=name, checks=checks, cells=cells)


def aimed(label: str, cell: Cell) -> Cell:
    """The cell with what is wanted of it, where something is."""
    group, row, column = label.split("/")
    targets: Mapping[str, float] = {}
    if group.startswith(LONG_GROUP) and column == grid.PREFILL:
        targets = LONG_PREFILL
    elif group.startswith("CUDA graphs, batch ") and column == grid.DECODE:
        batch = int(group.rpartition(" ")[2])
        targets = {start: by_batch[batch] for start, by_batch in GRAPHED.items()}
    found = [bound for start, bound in targets.items() if row.startswith(start)]
    # With steering on top, a row is another.
    if not found or ", steer" in row or cell.status != "measured":
        return cell
    return replace(cell, target=found[0])


def missing(name: str, command: str) -> Record:
    """A record without figures."""
    cell = Cell(status="not measured", reason="no GPU")
    return Record(
        name=name,
        command=command,
        commit=record.commit(),
        date=record.today(),
        versions=record.versions(),
        device=record.device(torch.device("cpu")),
        workload={"ratio": "time beside plain generation by the same means"},
        checks={},
        cells={f"batch {batch}/every row/decode": cell for batch in SETTINGS.batches},
    )


def main(
    out: Annotated[Path | None, typer.Option(help="Folder for the record.")] = None,
    model: Annotated[Path, typer.Option(help="A config.json.")] = SHAPE,
    minutes: Annotated[float, typer.Option(help="Begin no row after this long.")] = 3.0,
) -> None:
    words = "" if model == SHAPE else f" --model {model.name}"
    made = measure(model, minutes, command=f"python -m benches.gpu_grid{words}")
    if not record.hand_over(made, out):
        raise typer.Exit(code=1)


if __name__ == "__main__":
    typer.run(main)
