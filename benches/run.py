"""The command line of the measurements: `python -m benches.run overhead`."""

import json
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.markdown import Markdown

from benches import (
    breakdown,
    compare,
    compiled,
    extraction,
    flagging,
    flags,
    grid,
    kernels,
    kills,
    loading,
    memory,
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
from benches.peers.adapters import PEERS
from benches.record import Record, RecordError

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__)

Quick = Annotated[
    bool, typer.Option("--quick", help="A tiny workload that proves the code, not a speed.")
]
Rounds = Annotated[int | None, typer.Option(min=1, help="How often every arm is timed.")]
Model = Annotated[
    str | None,
    typer.Option(help="A name, a folder, or a config.json whose shape gets random weights."),
]
Out = Annotated[
    Path | None,
    typer.Option(help="Folder for the record. Without it: benches/results, or none if quick."),
]
AsJson = Annotated[
    bool,
    typer.Option("--json", help="Print JSON on standard output and nothing else there."),
]
Base = Annotated[
    str | None,
    typer.Option(
        metavar="REVISION",
        help="Measure nothing: compare the record with the one at another git revision.",
    ),
]


@dataclass(frozen=True, slots=True)
class Wish:
    """What becomes of a measurement. `asked`: settings that a comparison has no use for."""

    quick: bool
    out: Path | None
    as_json: bool
    base: str | None
    asked: Sequence[object] = ()


@app.command("overhead")
def run_overhead(
    quick: Quick = False,
    rounds: Rounds = None,
    model: Model = None,
    out: Out = None,
    as_json: AsJson = False,
    base: Base = None,
) -> None:
    """Monitoring and steering beside plain generation."""
    settings = _settled(overhead, quick, model=model, rounds=rounds)
    command = _command("overhead", quick, model, rounds=settings.rounds)
    wish = Wish(quick, out, as_json, base, (rounds, model))
    _finish(overhead.NAME, lambda: overhead.measure(settings, command=command), wish)


@app.command("breakdown")
def run_breakdown(
    quick: Quick = False,
    rounds: Rounds = None,
    model: Model = None,
    out: Out = None,
    as_json: AsJson = False,
    base: Base = None,
) -> None:
    """Each part of a watched or steered step, beside the part before it."""
    settings = _settled(breakdown, quick, model=model, generations=rounds)
    command = _command("breakdown", quick, model, rounds=settings.generations)
    wish = Wish(quick, out, as_json, base, (rounds, model))
    _finish(breakdown.NAME, lambda: breakdown.measure(settings, command=command), wish)


@app.command("compiled")
def run_compiled(
    quick: Quick = False,
    rounds: Rounds = None,
    model: Model = None,
    out: Out = None,
    as_json: AsJson = False,
    base: Base = None,
) -> None:
    """Monitoring and steering in compiled generation, beside plain compiled generation."""
    settings = _settled(compiled, quick, model=model, generations=rounds)
    command = _command("compiled", quick, model, rounds=settings.generations)
    wish = Wish(quick, out, as_json, base, (rounds, model))
    _finish(compiled.NAME, lambda: compiled.measure(settings, command=command), wish)


@app.command("grid")
def run_grid(
    quick: Quick = False,
    model: Model = None,
    minutes: Annotated[
        float | None, typer.Option(min=0, help="Begin no row after this long.")
    ] = None,
    out: Out = None,
    as_json: AsJson = False,
    base: Base = None,
) -> None:
    """Vectors, layers, batches and engines against each other: prompt and decoding."""
    settings = _settled(grid, quick, model=model, minutes=minutes)
    command = _command("grid", quick, model)
    wish = Wish(quick, out, as_json, base, (model, minutes))
    _finish(grid.NAME, lambda: grid.measure(settings, command=command), wish)


@app.command("memory")
def run_memory(
    quick: Quick = False, out: Out = None, as_json: AsJson = False, base: Base = None
) -> None:
    """What monitoring adds to memory while 4096 tokens are made. The bytes of scores are the same
    in any model of as many layers, hence no --model.
    """
    settings = _settled(memory, quick)
    command = _command("memory", quick)
    wish = Wish(quick, out, as_json, base)
    _finish(memory.NAME, lambda: memory.measure(settings, command=command), wish)


@app.command("reading")
def run_reading(
    quick: Quick = False,
    rounds: Rounds = None,
    out: Out = None,
    as_json: AsJson = False,
    base: Base = None,
) -> None:
    """`read` and project beside the paper's loop over conversations."""
    _in_rounds(reading, rounds, Wish(quick, out, as_json, base, (rounds,)))


@app.command("peers")
def run_peers(
    quick: Quick = False,
    rounds: Rounds = None,
    only: Annotated[
        list[str] | None, typer.Option(help="A peer by name; repeat it for several.")
    ] = None,
    model: Model = None,
    out: Out = None,
    as_json: AsJson = False,
    base: Base = None,
) -> None:
    """pvcore and its peers at the same jobs, each in a process of its own."""
    settings = _settled(peers, quick, model=model, rounds=rounds)
    if only:
        if unknown := sorted(set(only) - set(PEERS)):
            raise typer.BadParameter(f"got {', '.join(unknown)}; wanted some of {', '.join(PEERS)}")
        settings = replace(settings, peers=tuple(only))
    command = _command("peers", quick, model, rounds=settings.rounds)
    command += "".join(f" --only {name}" for name in only or ())
    wish = Wish(quick, out, as_json, base, (rounds, only, model))
    _finish(peers.NAME, lambda: peers.measure(settings, command=command), wish)


@app.command("kernels")
def run_kernels(
    quick: Quick = False,
    rounds: Rounds = None,
    model: Annotated[
        str | None, typer.Option(help="A name, a folder or a config.json: its width is taken.")
    ] = None,
    out: Out = None,
    as_json: AsJson = False,
    base: Base = None,
) -> None:
    """The kernels' CPU path beside torch calls written by hand."""
    settings = _settled(kernels, quick, rounds=rounds)
    if model is not None and base is None:
        width = loading.config_of(model).get_text_config().hidden_size
        settings = replace(settings, width=int(width))
    command = _command("kernels", quick, model, rounds=settings.rounds)
    wish = Wish(quick, out, as_json, base, (rounds, model))
    _finish(kernels.NAME, lambda: kernels.measure(settings, command=command), wish)


@app.command("scaling")
def run_scaling(
    quick: Quick = False,
    rounds: Rounds = None,
    model: Model = None,
    out: Out = None,
    as_json: AsJson = False,
    base: Base = None,
) -> None:
    """Cost against vectors, layers, batch, context and distinct configurations."""
    settings = _settled(scaling, quick, model=model, rounds=rounds)
    command = _command("scaling", quick, model, rounds=settings.rounds)
    wish = Wish(quick, out, as_json, base, (rounds, model))
    _finish(scaling.NAME, lambda: scaling.measure(settings, command=command), wish)


@app.command("training")
def run_training(
    quick: Quick = False,
    rounds: Rounds = None,
    out: Out = None,
    as_json: AsJson = False,
    base: Base = None,
) -> None:
    """Training steps under prevention beside plain ones."""
    _in_rounds(training, rounds, Wish(quick, out, as_json, base, (rounds,)))


@app.command("pooling")
def run_pooling(
    quick: Quick = False,
    rounds: Rounds = None,
    out: Out = None,
    as_json: AsJson = False,
    base: Base = None,
) -> None:
    """The pooling pass beside a bare forward and the paper's loop."""
    _in_rounds(pooling, rounds, Wish(quick, out, as_json, base, (rounds,)))


@app.command("extraction")
def run_extraction(quick: Quick = False, out: Out = None, as_json: AsJson = False) -> None:
    """Seven vectors of the shipped model: how they steer, and whether they repeat. Its record is
    claims and not figures, hence no --base.
    """
    settings = _settled(extraction, quick)
    torch.set_num_threads(1)
    with redirect_stdout(sys.stderr) if as_json else nullcontext():
        made = extraction.measure(settings, command=_command("extraction", quick))
    console = Console(stderr=as_json)
    if as_json:
        typer.echo(json.dumps(made, indent=2, ensure_ascii=False))
    else:
        console.print(Markdown(extraction_summary(made)))
    if out is not None or not quick:
        extraction.write(made, out or record.RESULTS)
        console.print("wrote extraction.json")
    if not all(claim["passed"] for claim in made["claims"]) and not quick:
        raise typer.Exit(code=1)


@app.command("flagging")
def run_flagging(
    quick: Quick = False,
    rounds: Rounds = None,
    out: Out = None,
    as_json: AsJson = False,
    base: Base = None,
) -> None:
    """A scan of training data beside a bare forward, and beside the paper's loop."""
    _in_rounds(flagging, rounds, Wish(quick, out, as_json, base, (rounds,)))


@app.command("flags")
def run_flags(quick: Quick = False, out: Out = None, as_json: AsJson = False) -> None:
    """Projections of data sets and rows, against what training on them does."""
    settings = _settled(flags, quick)
    command = _command("flags", quick)
    wish = Wish(quick, out, as_json, None)
    _finish(flags.NAME, lambda: flags.measure(settings, command=command), wish)


@app.command("million")
def run_million(
    quick: Quick = False,
    rows: Annotated[int | None, typer.Option(min=1, help="Conversations to scan.")] = None,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """A scan of a million conversations: every row once, memory and open files flat."""
    settings = _settled(million, quick, rows=rows)
    command = _command("million", quick, rows=settings.rows)
    wish = Wish(quick, out, as_json, None)
    _finish(million.NAME, lambda: million.measure(settings, command=command), wish)


@app.command("kills")
def run_kills(
    quick: Quick = False,
    points: Annotated[int | None, typer.Option(min=1, help="Kill points.")] = None,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """A scan killed at every write, and what is left of it when it has gone on."""
    settings = _settled(kills, quick, points=points)
    command = _command("kills", quick, points=settings.points)
    wish = Wish(quick, out, as_json, None)
    _finish(kills.NAME, lambda: kills.measure(settings, command=command), wish)


def _settled(bench: Any, quick: bool, **asked: object) -> Any:
    """A bench's settings, but what was asked for."""
    settings = bench.QUICK if quick else bench.Settings()
    return replace(settings, **{name: one for name, one in asked.items() if one is not None})


def _in_rounds(what: Any, rounds: int | None, wish: Wish) -> None:
    """Measure with a module whose only setting from outside is how often every arm is timed."""
    settings = _settled(what, wish.quick, rounds=rounds)
    command = _command(what.NAME, wish.quick, rounds=settings.rounds)
    _finish(what.NAME, lambda: what.measure(settings, command=command), wish)


def _command(name: str, quick: bool, model: str | None = None, **sizes: int) -> str:
    """What to type to measure the same again; a file is named without its place."""
    words = ["python -m benches.run", name, *(["--quick"] if quick else [])]
    words += [] if model is None else ["--model", _without_place(model)]
    return " ".join([*words, *(f"--{option} {size}" for option, size in sizes.items())])


def _without_place(model: str) -> str:
    path = Path(model)
    if not path.exists():
        return model
    inside = path.resolve().is_relative_to(record.ROOT)
    return str(path.resolve().relative_to(record.ROOT)) if inside else path.name


def _finish(name: str, measure: Callable[[], Record], wish: Wish) -> None:
    """Measure on one thread, keep the record, show it, and fail if a check did."""
    if wish.base is not None:
        _compare(name, wish.base, wish)
        return
    torch.set_num_threads(1)
    with redirect_stdout(sys.stderr) if wish.as_json else nullcontext():
        made = measure()
    console = Console(stderr=wish.as_json)
    if wish.as_json:
        typer.echo(record.text_of(made), nl=False)
    else:
        console.print(Markdown(tables.summary(made)))
    if wish.out is not None or not wish.quick:
        record.write(made, wish.out or record.RESULTS)
        console.print(f"wrote {made.name}.json")
    if not made.correct:
        raise typer.Exit(code=1)


def _compare(name: str, base: str, wish: Wish) -> None:
    """The record that lies here beside the one at a revision."""
    if wish.quick or any(wish.asked):
        raise typer.BadParameter("--base compares two records and measures nothing: leave the rest")
    try:
        old = compare.at_revision(base, name)
        new = record.read((wish.out or record.RESULTS) / f"{name}.json")
        if wish.as_json:
            typer.echo(json.dumps(compare.as_json(old, new, base), indent=2, ensure_ascii=False))
        else:
            Console().print(Markdown(compare.summary(old, new, base)))
    except RecordError as error:
        Console(stderr=True, soft_wrap=True).print(str(error), markup=False)
        raise typer.Exit(code=1) from error


if __name__ == "__main__":
    app()
