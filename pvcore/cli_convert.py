"""`pvcore convert`: between the vector files of pvcore and of other tools."""

from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

from pvcore.cli_options import AsJson
from pvcore.cli_output import print_document, require_places, split_list
from pvcore.errors import FormatError

FORMATS = "native, paper, assistant-axis, gguf or steering-vectors"
BY_SUFFIX = {".safetensors": "native", ".gguf": "gguf", ".jsonl": "messages", ".json": "plan"}

Source = Annotated[Path, Argument(help="The file to read.")]
Out = Annotated[Path, Argument(help="The file to write.")]
To = Annotated[
    str | None, Option(help=f"{FORMATS}; or plan, messages. Default: by the ending of OUT.")
]
Given = Annotated[str | None, Option("--format", help=f"Of SOURCE: {FORMATS}; default: found out.")]
TraitName = Annotated[str | None, Option(help="Name of the trait, where SOURCE says none.")]
ModelId = Annotated[str | None, Option(help="Model the vector was made for.")]
Variant = Annotated[str | None, Option(help="response_mean, prompt_mean or prompt_last.")]
Layers = Annotated[str | None, Option(help="Keep these layers, from 0, as in 15,19.")]
Blocks = Annotated[int | None, Option(help="Blocks of the model, for --to paper.")]
Experiment = Annotated[str | None, Option(help="Which one of a capping configuration.")]


def convert(
    source: Source,
    out: Out,
    to: To = None,
    source_format: Given = None,
    trait: TraitName = None,
    model_id: ModelId = None,
    variant: Variant = None,
    layers: Layers = None,
    n_layers: Blocks = None,
    experiment: Experiment = None,
    as_json: AsJson = False,
) -> None:
    """Convert a vector file; a capping configuration to a plan; a CSV of rollouts to messages.

    Layers are renumbered by name: the paper counts from 1, everything else here from 0.
    """
    require_places(out)
    target = to or BY_SUFFIX.get(out.suffix)
    if target is None:
        raise FormatError(
            f"got {out}, whose ending names no format; wanted --to {FORMATS}, plan or messages"
        )
    if target == "plan":
        done = _capping(source, out, experiment, model_id)
    elif target == "messages":
        done = _messages(source, out)
    else:
        given = {"format": source_format, "trait": trait, "model_id": model_id, "variant": variant}
        done = _vector(source, out, target, given, split_list(layers, int), n_layers)
    print_document({"file": str(out), "format": target, **done}, as_json)


def _vector(
    source: Path,
    out: Path,
    target: str,
    given: dict[str, Any],
    layers: tuple[int, ...] | None,
    n_layers: int | None,
) -> dict[str, Any]:
    from pvcore import formats

    vector = formats.read(source, **given)
    if layers is not None:
        vector = vector.at(layers)
    formats.write(vector, out, format=target, n_layers=n_layers)
    return {
        "trait": vector.trait,
        "model_id": vector.model_id,
        "variant": vector.variant,
        "d_model": vector.d_model,
        "sites": ", ".join(map(str, vector.sites)),
        "note": vector.provenance.note,
    }


def _capping(
    source: Path, out: Path, experiment: str | None, model_id: str | None
) -> dict[str, Any]:
    from pvcore import formats

    plan = formats.read_capping(source, experiment=experiment, model_id=model_id or "")
    plan.save(out)
    return {
        "caps": len(plan.interventions),
        "vectors": ", ".join(vector.trait for vector in plan.vectors),
    }


def _messages(source: Path, out: Path) -> dict[str, Any]:
    from pvcore import formats

    rows = formats.read_rollouts(source)
    formats.write_messages([row.messages for row in rows], out)
    return {"chats": len(rows)}
