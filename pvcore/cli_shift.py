"""`pvcore shift`: how far finetuning moved a model along vectors, also checkpoint by checkpoint."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from pvcore.cli_options import AsJson, Batch, Device, Dtype, Layers, System, VectorFiles
from pvcore.cli_output import print_document, require_places, split_list
from pvcore.errors import ChatError
from pvcore.files import text_lines

if TYPE_CHECKING:
    from pvcore.report import Page
    from pvcore.shift import FinetuningShift

WORLD = "world"

Base = Annotated[
    str, Argument(help="Name or folder of the model before; 'world' is the one shipped.")
]
Tuned = Annotated[
    str,
    Argument(
        help="The model after: a name, a folder, an adapter, a folder of checkpoints or both."
    ),
]
Prompts = Annotated[Path, Option(help="Text file, one user message a line.")]
Out = Annotated[Path | None, Option(help="Write a page with the course over checkpoints there.")]


def shift(
    base: Base,
    tuned: Tuned,
    prompts: Prompts,
    vector: VectorFiles,
    layers: Layers = None,
    system: System = None,
    batch_size: Batch = 16,
    out: Out = None,
    dtype: Dtype = "auto",
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Measure how far finetuning moved a model along vectors, on the last token of the prompts.

    The two models are loaded one after the other. Layers count from 0.
    """
    require_places(out)
    asked = _prompts(prompts)
    first = [] if system is None else [{"role": "system", "content": system}]
    chats = [[*first, {"role": "user", "content": text}] for text in asked]
    found = _shifts(base, tuned, chats, vector, layers, batch_size, dtype, device)
    rows = [{"checkpoint": _name(key), **one.named()} for key, one in found.items()]
    document: dict[str, Any] = {"base": base, "prompts": len(chats), "shifts": rows}
    if out is not None:
        from pvcore import report

        report.write(_page(base, tuned, found), out)
        document["file"] = str(out)
    print_document(document, as_json)


def _prompts(path: Path) -> list[str]:
    try:
        lines = text_lines(path)
    except (OSError, UnicodeDecodeError) as error:
        raise ChatError(
            f"got prompts {path}, which cannot be read ({error}); wanted a text file with one "
            "user message a line"
        ) from None
    asked = [line for line in lines if line.strip()]
    if not asked:
        raise ChatError(f"got no prompts in {path}; wanted one user message a line")
    return asked


def _shifts(
    base: str,
    tuned: str,
    chats: list[list[dict[str, str]]],
    vector: list[Path],
    layers: str | None,
    batch_size: int,
    dtype: str,
    device: str | None,
) -> "dict[int | str, FinetuningShift]":
    """By the step of each checkpoint, then by its own name the model that the folder itself is."""
    import torch
    from transformers.utils import logging

    from pvcore.shift import checkpoints, finetuning_shift, holds_model, shift_trajectory
    from pvcore.vectors import PersonaVector, VectorBank
    from pvcore.world.demo_subject import world_model

    bank = VectorBank([PersonaVector.load(one) for one in vector], layers=split_list(layers, int))
    logging.disable_progress_bar()
    place = device or ("cuda" if torch.cuda.is_available() else None)
    settings: dict[str, Any] = {"batch_size": batch_size, "dtype": dtype, "device_map": place}
    before = world_model() if base == WORLD else base
    course = checkpoints(tuned)
    found: dict[int | str, FinetuningShift] = {}
    if course:
        found |= dict(shift_trajectory(before, tuned, bank, chats, **settings).items())
    if not course or holds_model(tuned):
        # What a trainer saved at the end may be another model than its last checkpoint.
        found[tuned] = finetuning_shift(before, tuned, bank, chats, **settings)
    return found


def _name(key: int | str) -> str:
    return f"checkpoint-{key}" if isinstance(key, int) else key


def _page(base: str, tuned: str, found: "Mapping[int | str, FinetuningShift]") -> "Page":
    from pvcore.report import Figure, Page, Section, Table
    from pvcore.shift_plot import shift_over_steps

    shifts = list(found.values())
    names = list(shifts[0].named())
    rows: list[list[Any]] = [[_name(key), *one.named().values()] for key, one in found.items()]
    blocks: list[Any] = [Table(columns=["checkpoint", *names], rows=rows)]
    steps = [key for key in found if isinstance(key, int)]
    if steps:
        for place, site in enumerate(shifts[0].sites):
            lines = {t: [float(found[key][t][place]) for key in steps] for t in shifts[0].shifts}
            blocks.append(Figure(svg=shift_over_steps(steps, lines, site=str(site))))
    return Page(
        title="Finetuning shift",
        lead=f"How far {tuned} stands from {base}, in units of the residual.",
        sections=[
            Section(
                title="Shift along each vector",
                text=f"Mean over the last tokens of {shifts[0].prompts} prompts, projected on "
                "unit vectors. The shift of a training on harmless data is the zero to compare "
                "with.",
                blocks=blocks,
            )
        ],
    )
