"""The command line, thin over the functions of the library.

Heavy modules are imported by the commands that need them, so that help comes at once.
"""

import json
import shlex
import sys
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Option

from pvcore.cli_convert import convert
from pvcore.cli_doctor import doctor
from pvcore.cli_extract import extract, steer
from pvcore.cli_flag import flag
from pvcore.cli_models import WORLD, subject_of
from pvcore.cli_monitor import monitor
from pvcore.cli_options import AsJson, Device, Dtype, Seed
from pvcore.cli_output import require_places, split_list
from pvcore.cli_shift import shift

if TYPE_CHECKING:
    from pvcore.world.demo_record import DemoRecord, Workload
    from pvcore.world.demo_subject import Subject

app = typer.Typer(
    help="Read, watch and steer the residual stream of language models along persona vectors.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
INTERRUPTED = 130

OwnModel = Annotated[str, Option(help="Name or folder of a chat model of one's own.")]
Traits = Annotated[str | None, Option(help="Names or .json files, with commas; default: all.")]
JudgeSpec = Annotated[
    str | None, Option(help="package.module:name or path/to/file.py:name; the world has its own.")
]
DemoLayers = Annotated[str | None, Option(help="Layers to steer at; claims are on the last.")]
Doses = Annotated[str | None, Option(help="Coefficients, 0 first, as in 0,1,2.")]
Count = Annotated[int | None, Option(help="Default: a size that suits the model.")]
Report = Annotated[Path, Option(help="The report to write.")]
Record = Annotated[Path | None, Option(help="Write the figures there too, as JSON.")]
Strict = Annotated[bool, Option("--strict", help="Enforce the world's claims on any model.")]


@app.command()
def demo(
    model: OwnModel = WORLD,
    judge: JudgeSpec = None,
    traits: Traits = None,
    out: Report = Path("pvcore-demo.html"),
    record: Record = None,
    as_json: AsJson = False,
    strict: Strict = False,
    layers: DemoLayers = None,
    coefficients: Doses = None,
    extraction_questions: Count = None,
    rollouts: Count = None,
    steering_questions: Count = None,
    monitoring_questions: Count = None,
    max_new_tokens: Count = None,
    batch_size: Count = None,
    rounds: Count = None,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    device: Device = None,
) -> None:
    """Extract vectors, steer by dose, monitor, time it all, and write a report.

    Without --model it runs the model shipped with pvcore and needs no network. Exit status 1: a
    claim of the report failed.
    """
    options = dict(locals())  # most are sizes of the workload, by the names of its fields
    require_places(out, record)
    subject = subject_of(model, judge, split_list(traits, str), dtype, device)
    measured = _measured(subject, _workload(subject, options), strict)
    _publish(measured, out, record, as_json)
    if measured.failed:
        raise typer.Exit(1)


app.command()(extract)
app.command()(steer)
app.command()(monitor)
app.command()(flag)


def _workload(subject: "Subject", options: Mapping[str, Any]) -> "Workload":
    """The subject's workload with the sizes that were given as options of the same names."""
    sizes = {field.name: options.get(field.name) for field in fields(subject.workload)}
    sizes["layers"] = split_list(sizes["layers"], int)
    sizes["coefficients"] = split_list(sizes["coefficients"], float)
    given = {name: size for name, size in sizes.items() if size is not None}
    return replace(subject.workload, **given)


def _measured(subject: "Subject", work: "Workload", strict: bool) -> "DemoRecord":
    from pvcore.world.demo import run_demo
    from pvcore.world.demo_claims import all_enforced

    command = shlex.join(["pvcore", *sys.argv[1:]])
    try:
        record = run_demo(subject, work, command=command)
    except KeyboardInterrupt:
        typer.echo("pvcore: stopped; nothing was written", err=True)
        raise typer.Exit(INTERRUPTED) from None
    return all_enforced(record) if strict else record


def _publish(measured: "DemoRecord", out: Path, record: Path | None, as_json: bool) -> None:
    from rich.console import Console

    from pvcore import report
    from pvcore.world.demo_record import write_record
    from pvcore.world.demo_report import page
    from pvcore.world.demo_summary import summary

    report.write(page(measured), out)
    if record is not None:
        write_record(measured, record)
    if as_json:
        typer.echo(json.dumps(measured.as_json(), indent=2))
    else:
        console = Console()
        console.print(summary(measured))
        console.print(f"Report: {out}", highlight=False)


app.command()(convert)
app.command()(doctor)
app.command()(shift)
