"""A part of the grid on a GPU: one real shape, graphed and eager, on the rows that matter most.

    python -m benches.gpu_grid [--out FOLDER] [--model CONFIG] [--minutes 4]

Needs torch, transformers and this checkout, and no network. Without a GPU the record says so.
"""

from dataclasses import replace
from pathlib import Path
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


def measure(model: Path, minutes: float, *, command: str) -> Record:
    """The reduced grid, or why it is missing."""
    if not torch.cuda.is_available():
        return missing(command)
    settings = replace(SETTINGS, model=str(model), minutes=minutes)
    return replace(grid.measure(settings, command=command), name=NAME)


def missing(command: str) -> Record:
    """A record without figures."""
    cell = Cell(status="not measured", reason="no GPU")
    return Record(
        name=NAME,
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
    minutes: Annotated[float, typer.Option(help="Begin no row after this long.")] = 4.0,
) -> None:
    made = measure(model, minutes, command="python -m benches.gpu_grid")
    if not record.hand_over(made, out):
        raise typer.Exit(code=1)


if __name__ == "__main__":
    typer.run(main)
