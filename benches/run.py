"""The command line of the measurements: `python -m benches.run overhead`."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.markdown import Markdown

from benches import (
    compiled,
    extraction,
    flagging,
    flags,
    kernels,
    kills,
    million,
    overhead,
    pooling,
    reading,
    record,
    scaling,
    tables,
    training,
)
from benches.extraction_table import extraction_summary
from benches.peers import measure as peers
from benches.record import Record

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__)

Quick = Annotated[
    bool, typer.Option("--quick", help="A tiny workload that proves the code, not a speed.")
]
Rounds = Annotated[int | None, typer.Option(min=1, help="How often every arm is timed.")]
Out = Annotated[
    Path | None,
    typer.Option(help="Folder for the record. Without it: benches/results, or none if quick."),
]


@app.command("overhead")
def run_overhead(
    quick: Quick = False,
    rounds: Rounds = None,
    model: Annotated[
        str | None,
        typer.Option(help="A name, a folder, or a config.json whose shape gets random weights."),
    ] = None,
    out: Out = None,
) -> None:
    """Monitoring and steering beside plain generation."""
    settings = overhead.QUICK if quick else overhead.Settings()
    if model is not None:
        settings = replace(settings, model=model)
    if rounds is not None:
        settings = replace(settings, rounds=rounds)
    command = _command("overhead", quick, model, rounds=settings.rounds)
    _finish(lambda: overhead.measure(settings, command=command), quick, out)


@app.command("compiled")
def run_compiled(quick: Quick = False, rounds: Rounds = None, out: Out = None) -> None:
    """Monitoring and steering in compiled generation, beside plain compiled generation."""
    settings = compiled.QUICK if quick else compiled.Settings()
    if rounds is not None:
        settings = replace(settings, generations=rounds)
    command = _command("compiled", quick, rounds=settings.generations)
    _finish(lambda: compiled.measure(settings, command=command), quick, out)


@app.command("reading")
def run_reading(quick: Quick = False, rounds: Rounds = None, out: Out = None) -> None:
    """`read` and project beside the paper's loop over conversations."""
    _in_rounds(reading, quick, rounds, out)


@app.command("peers")
def run_peers(
    quick: Quick = False,
    rounds: Rounds = None,
    only: Annotated[
        list[str] | None, typer.Option(help="A peer by name; repeat it for several.")
    ] = None,
    out: Out = None,
) -> None:
    """pvcore and its peers at the same jobs, each in a process of its own."""
    settings = peers.QUICK if quick else peers.Settings()
    if only:
        settings = replace(settings, peers=tuple(only))
    if rounds is not None:
        settings = replace(settings, rounds=rounds)
    command = _command("peers", quick, rounds=settings.rounds)
    _finish(lambda: peers.measure(settings, command=command), quick, out)


@app.command("kernels")
def run_kernels(quick: Quick = False, rounds: Rounds = None, out: Out = None) -> None:
    """The kernels' CPU path beside torch calls written by hand."""
    _in_rounds(kernels, quick, rounds, out)


@app.command("scaling")
def run_scaling(quick: Quick = False, rounds: Rounds = None, out: Out = None) -> None:
    """Cost against vectors, layers, batch, context and distinct configurations."""
    _in_rounds(scaling, quick, rounds, out)


@app.command("training")
def run_training(quick: Quick = False, rounds: Rounds = None, out: Out = None) -> None:
    """Training steps under prevention beside plain ones."""
    _in_rounds(training, quick, rounds, out)


@app.command("pooling")
def run_pooling(quick: Quick = False, rounds: Rounds = None, out: Out = None) -> None:
    """The pooling pass beside a bare forward and the paper's loop."""
    _in_rounds(pooling, quick, rounds, out)


@app.command("extraction")
def run_extraction(quick: Quick = False, out: Out = None) -> None:
    """Seven vectors of the shipped model: how they steer, and whether they repeat."""
    settings = extraction.QUICK if quick else extraction.Settings()
    torch.set_num_threads(1)
    made = extraction.measure(settings, command=_command("extraction", quick))
    console = Console()
    console.print(Markdown(extraction_summary(made)))
    if out is not None or not quick:
        extraction.write(made, out or record.RESULTS)
        console.print("wrote extraction.json")
    if not all(claim["passed"] for claim in made["claims"]) and not quick:
        raise typer.Exit(code=1)


@app.command("flagging")
def run_flagging(quick: Quick = False, rounds: Rounds = None, out: Out = None) -> None:
    """A scan of training data beside a bare forward, and beside the paper's loop."""
    _in_rounds(flagging, quick, rounds, out)


@app.command("flags")
def run_flags(quick: Quick = False, out: Out = None) -> None:
    """Projections of data sets and rows, against what training on them does."""
    settings = flags.QUICK if quick else flags.Settings()
    _finish(lambda: flags.measure(settings, command=_command("flags", quick)), quick, out)


@app.command("million")
def run_million(
    quick: Quick = False,
    rows: Annotated[int | None, typer.Option(min=1, help="Conversations to scan.")] = None,
    out: Out = None,
) -> None:
    """A scan of a million conversations: every row once, memory and open files flat."""
    settings = million.QUICK if quick else million.Settings()
    if rows is not None:
        settings = replace(settings, rows=rows)
    command = _command("million", quick, rows=settings.rows)
    _finish(lambda: million.measure(settings, command=command), quick, out)


@app.command("kills")
def run_kills(
    quick: Quick = False,
    points: Annotated[int | None, typer.Option(min=1, help="Kill points.")] = None,
    out: Out = None,
) -> None:
    """A scan killed at every write, and what is left of it when it has gone on."""
    settings = kills.QUICK if quick else kills.Settings()
    if points is not None:
        settings = replace(settings, points=points)
    command = _command("kills", quick, points=settings.points)
    _finish(lambda: kills.measure(settings, command=command), quick, out)


def _in_rounds(what: Any, quick: bool, rounds: int | None, out: Path | None) -> None:
    """Measure with a module whose only setting from outside is how often every arm is timed."""
    settings = what.QUICK if quick else what.Settings()
    if rounds is not None:
        settings = replace(settings, rounds=rounds)
    command = _command(what.NAME, quick, rounds=settings.rounds)
    _finish(lambda: what.measure(settings, command=command), quick, out)


def _command(name: str, quick: bool, model: str | None = None, **sizes: int) -> str:
    """What to type to measure the same again."""
    words = ["python -m benches.run", name, *(["--quick"] if quick else [])]
    words += [] if model is None else ["--model", model]
    return " ".join([*words, *(f"--{option} {size}" for option, size in sizes.items())])


def _finish(measure: Callable[[], Record], quick: bool, out: Path | None) -> None:
    """Measure on one thread, keep the record, show it, and fail if a check did."""
    torch.set_num_threads(1)
    made = measure()
    console = Console()
    console.print(Markdown(tables.summary(made)))
    if out is not None or not quick:
        record.write(made, out or record.RESULTS)
        console.print(f"wrote {made.name}.json")
    if not made.correct:
        raise typer.Exit(code=1)


if __name__ == "__main__":
    app()
