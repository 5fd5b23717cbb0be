"""`pvcore extract` and `pvcore steer`: from a trait to a vector, and from a vector to replies."""

from collections.abc import Mapping
from dataclasses import asdict
from math import isnan
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from pvcore.cli_models import model_of, replies_to, subject_of, vectors_at
from pvcore.cli_options import (
    AsJson,
    Batch,
    Device,
    Dtype,
    Layers,
    Length,
    Model,
    Seed,
    System,
    Temperature,
    VectorFiles,
)
from pvcore.cli_output import print_document, require_places, split_list
from pvcore.errors import FormatError, PvcoreError, SelectionError

if TYPE_CHECKING:
    from pvcore.calibration import Calibration
    from pvcore.chats import Chats
    from pvcore.extraction import Extraction
    from pvcore.interventions import Add
    from pvcore.replies import Writer
    from pvcore.selection import Selection
    from pvcore.traits import Trait
    from pvcore.vectors import PersonaVector
    from pvcore.world.demo_subject import Subject

TraitName = Annotated[str, Argument(help="A trait shipped with pvcore, or a .json file.")]
VectorOut = Annotated[Path, Option(help="The vector file to write, .safetensors.")]
JudgeSpec = Annotated[
    str | None,
    Option(
        help="api:MODEL, local:MODEL, human:FILE.csv, package.module:name or path/to/file.py:name; "
        "the world has its own."
    ),
]
JudgeUrl = Annotated[str | None, Option(help="Address of the server of an api: judge.")]
WriterSpec = Annotated[
    str | None, Option(help="Name of a model on a server that writes the replies instead.")
]
WriterUrl = Annotated[str | None, Option(help="Address of the server that writes.")]
Work = Annotated[
    Path | None, Option(help="Folder that keeps the work, for a run that is killed to go on.")
]
Questions = Annotated[int | None, Option(help="Use only the first so many questions.")]
Rollouts = Annotated[int, Option(help="Replies to each question under each prompt.")]
Threshold = Annotated[float, Option(help="Score that parts kept from dropped.")]
Resamples = Annotated[int, Option(help="Resamples of the pairs that intervals are made of.")]
Variants = Annotated[
    bool, Option("--variants", help="Write the vectors over the prompt too, beside the file.")
]
Select = Annotated[
    bool, Option("--select", help="Steer at every layer and record the best in the file.")
]
Doses = Annotated[str | None, Option(help="Coefficients to select among, as in 0.5,1,2.")]
Floor = Annotated[float, Option(help="Coherence that a selected coefficient must keep.")]
Neutral = Annotated[
    Path | None, Option(help="JSON lines of chats to calibrate projections on, as messages.")
]
Others = Annotated[
    list[Path] | None, Option("--compare", help="Vector file of another trait; may be repeated.")
]
Report = Annotated[Path | None, Option(help="Write a page about the vector there, as HTML.")]
Prompts = Annotated[list[str], Argument(help="User messages, each a chat of its own.")]
Coeff = Annotated[
    float | None, Option(help="Multiplier of the raw vectors; default: what the file recorded.")
]
Incremental = Annotated[
    bool, Option("--incremental", help="At every layer add what the layer below did not.")
]


def extract(
    model: Model,
    trait: TraitName,
    out: VectorOut,
    judge: JudgeSpec = None,
    judge_url: JudgeUrl = None,
    writer: WriterSpec = None,
    writer_url: WriterUrl = None,
    work: Work = None,
    layers: Layers = None,
    questions: Questions = None,
    rollouts: Rollouts = 1,
    threshold: Threshold = 50.0,
    max_new_tokens: Length = 64,
    temperature: Temperature = 1.0,
    batch_size: Batch = 64,
    resamples: Resamples = 100,
    seed: Seed = 0,
    variants: Variants = False,
    select: Select = False,
    coefficients: Doses = None,
    floor: Floor = 60.0,
    neutral: Neutral = None,
    compare: Others = None,
    report: Report = None,
    dtype: Dtype = "auto",
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Extract the vector of a trait from contrasting system prompts, and save it."""
    options = dict(locals())
    require_places(out, report)
    options |= _given(options)
    url, place = judge_url, work
    subject = subject_of(model, judge, (trait,), dtype, device, judge_url=url, work=place)
    result = _extraction(subject, options)
    _publish(subject, result, options)


def _given(options: Mapping[str, Any]) -> dict[str, Any]:
    """What is used after all is sampled and judged, read and checked before."""
    from pvcore.selection import COEFFICIENTS, checked_doses
    from pvcore.vectors import VectorBank

    if options["questions"] is not None and options["questions"] < 1:
        raise PvcoreError(f"got --questions {options['questions']}; wanted at least 1")
    named = split_list(options["coefficients"], float)
    others = vectors_at(options["compare"] or [])
    return {
        "coefficients": checked_doses(COEFFICIENTS if named is None else named, options["floor"]),
        "compare": VectorBank(others) if others else None,
        "neutral": None if options["neutral"] is None else _chats(options["neutral"]),
    }


def _chats(path: Path) -> "Chats":
    from pvcore.formats_rollouts import decode_messages

    try:
        return decode_messages(path.read_bytes())
    except OSError as error:
        raise FormatError(
            f"got {path}, which cannot be read ({error.strerror}); wanted JSON lines of chats"
        ) from None


def _extraction(subject: "Subject", options: Mapping[str, Any]) -> "Extraction":
    from pvcore.extraction import extract as extract_vector

    examined = subject.traits[0].trait
    same = ("rollouts", "threshold", "max_new_tokens", "temperature", "batch_size", "resamples")
    return extract_vector(
        subject.model,
        examined,
        judge=subject.judge,
        layers=split_list(options["layers"], int),
        questions=examined.extraction_questions[: options["questions"]],
        writer=_writer(options),
        work=options["work"],
        seed=options["seed"],
        progress=True,
        **{name: options[name] for name in same},
    )


def _writer(options: Mapping[str, Any]) -> "Writer | None":
    if options["writer"] is None:
        return None
    from pvcore.replies_api import ApiWriter

    work: Path | None = None if options["work"] is None else options["work"].resolve()
    same = ("max_new_tokens", "temperature", "seed")
    return ApiWriter(
        options["writer"],
        base_url=options["writer_url"],
        cache=None if work is None else work.with_name(f"{work.name}-written.jsonl"),
        **{name: options[name] for name in same},
    )


def _publish(subject: "Subject", result: "Extraction", options: Mapping[str, Any]) -> None:
    """Select, calibrate, save, draw and print, as far as it is asked for."""
    out: Path = options["out"]
    examined = subject.traits[0].trait
    selection = _selection(subject, result.vector, examined, options) if options["select"] else None
    vector = result.vector if selection is None else selection.recorded()
    calibration = _calibration(subject, vector, options)
    if calibration is not None:
        vector = calibration.vectors()[vector.trait]
    vector.save(out)
    document: dict[str, Any] = {"file": str(out), **_extracted(result)}
    if options["variants"]:
        document["variants"] = []
        for variant, other in result.vectors.items():
            if variant != vector.variant:
                place = out.with_name(f"{out.stem}.{variant}{out.suffix}")
                other.save(place)
                document["variants"].append(str(place))
    if selection is not None:
        document["selection"] = dict(vector.calibration["selection"])
    if options["report"] is not None:
        _report(result, selection, calibration, options)
        document["report"] = str(options["report"])
    print_document(document, options["as_json"])


def _selection(
    subject: "Subject", vector: "PersonaVector", trait: "Trait", options: Mapping[str, Any]
) -> "Selection":
    from pvcore.selection import select

    return select(
        subject.model,
        vector,
        trait,
        judge=subject.judge,
        coefficients=options["coefficients"],
        questions=trait.evaluation_questions[: options["questions"]],
        floor=options["floor"],
        max_new_tokens=options["max_new_tokens"],
        temperature=options["temperature"],
        batch_size=options["batch_size"],
        seed=options["seed"],
        progress=True,
    )


def _calibration(
    subject: "Subject", vector: "PersonaVector", options: Mapping[str, Any]
) -> "Calibration | None":
    if options["neutral"] is None:
        return None
    from pvcore.calibration import calibrate

    return calibrate(subject.model, vector, options["neutral"], batch_size=options["batch_size"])


def _report(
    result: "Extraction",
    selection: "Selection | None",
    calibration: "Calibration | None",
    options: Mapping[str, Any],
) -> None:
    from pvcore import report
    from pvcore.extraction_report import page

    drawn = page(
        result,
        selection=selection,
        others=options["compare"],
        calibration=calibration,
    )
    report.write(drawn, options["report"])


def _extracted(result: "Extraction") -> dict[str, Any]:
    return {
        "trait": result.vector.trait,
        "kept": result.kept,
        "dropped": result.dropped,
        "reasons": dict(result.reasons),
        "judged": result.judgements.counts,
        "layers": [
            {name: _known(value) for name, value in asdict(layer).items()}
            | {"site": str(layer.site)}
            for layer in result.layers
        ],
    }


def _known(value: Any) -> Any:
    """A value as JSON can hold it: null for what is not known."""
    if isinstance(value, tuple):
        return [_known(one) for one in value]
    return None if isinstance(value, float) and isnan(value) else value


def steer(
    model: Model,
    prompts: Prompts,
    vector: VectorFiles,
    coeff: Coeff = None,
    layers: Layers = None,
    incremental: Incremental = False,
    system: System = None,
    max_new_tokens: Length = 200,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Reply with vectors added to the residual stream. Name few layers: by default it is all."""
    added = _added(vectors_at(vector), coeff, split_list(layers, int), incremental)
    hooked = model_of(model, dtype, device)
    with hooked.steer(*added):
        replies = replies_to(hooked, prompts, system, max_new_tokens, temperature, seed)
    rows = [
        {"prompt": prompt, "reply": reply} for prompt, reply in zip(prompts, replies, strict=True)
    ]
    print_document({"replies": rows}, as_json)


def _added(
    vectors: "list[PersonaVector]",
    coeff: float | None,
    layers: tuple[int, ...] | None,
    incremental: bool,
) -> "list[Add]":
    """What is asked for; without a coefficient what selection recorded in each file."""
    from pvcore.interventions import Add
    from pvcore.selection import recorded_choice

    if coeff is None:
        if layers is not None or incremental:
            raise SelectionError(
                "got layers without a coefficient; wanted both. Give --coeff, or neither to steer "
                "as the files recorded"
            )
        return [recorded_choice(vector) for vector in vectors]
    chosen = [vector.layer_incremental() for vector in vectors] if incremental else vectors
    return [Add(chosen, coeff=coeff, layers=layers)]
