"""Extraction: seven vectors of the shipped model, what they steer to, and whether they repeat."""

import json
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress

from benches import record
from benches.record import RESULTS, RecordError
from pvcore.cosines import cosine_matrices
from pvcore.extraction import Extraction, extract
from pvcore.files import write_whole
from pvcore.selection import Cell, Selection, select, validate
from pvcore.vectors import VectorBank
from pvcore.world.demo_subject import Subject, world_subject

NAME = "extraction"
# What is wanted of every trait, and the floor that leaves the choice some room above it.
EFFECT, COHERENCE, HALVES = 40.0, 60.0, 0.95
FLOOR = 65.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How much is run. The chosen cell is measured anew on questions that chose nothing."""

    traits: tuple[str, ...] | None = None
    extraction_questions: int = 40
    selection_questions: int = 40
    validation_questions: int = 60
    coefficients: tuple[float, ...] = (1.0, 1.5, 2.0, 2.5, 3.0, 3.5)
    max_new_tokens: int = 64
    batch_size: int = 240
    seed: int = 0


QUICK = Settings(
    traits=("evil",),
    extraction_questions=4,
    selection_questions=3,
    validation_questions=3,
    coefficients=(2.0,),
    max_new_tokens=40,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """All that was measured of one trait."""

    extraction: Extraction
    selection: Selection
    validated: Cell
    identical: bool


def measure(settings: Settings, *, command: str) -> dict[str, Any]:
    """Everything as plain data, with the claims and whether they hold."""
    subject = world_subject(settings.traits)
    with Progress(transient=True) as bar:
        names = [examined.trait.name for examined in subject.traits]
        found = {
            name: _found(subject, at, settings)
            for at, name in bar.track(list(enumerate(names)), description=NAME)
        }
    traits = [_trait(name, one) for name, one in found.items()]
    return {
        "name": NAME,
        "command": command,
        "commit": record.commit(),
        "date": record.today(),
        "versions": dict(record.versions()),
        "device": dict(record.device(torch.device("cpu"))),
        "model": subject.model.model_id,
        "judge": type(subject.judge).__name__,
        "workload": _sizes(settings) | {"coherence floor": FLOOR},
        "traits": traits,
        "cosines": _cosines(found),
        "claims": [claim for one in traits for claim in _claims(one)],
    }


def _found(subject: Subject, at: int, settings: Settings) -> Found:
    trait = subject.traits[at].trait
    first = _extracted(subject, at, settings)
    asked = trait.evaluation_questions
    split = settings.selection_questions
    sizes: dict[str, Any] = {
        "judge": subject.judge,
        "max_new_tokens": settings.max_new_tokens,
        "batch_size": settings.batch_size,
    }
    selection = select(
        subject.model,
        first.vector,
        trait,
        coefficients=settings.coefficients,
        questions=asked[:split],
        floor=FLOOR,
        seed=settings.seed,
        **sizes,
    )
    validated = validate(
        selection,
        subject.model,
        trait,
        questions=asked[split : split + settings.validation_questions],
        seed=settings.seed + 1,
        **sizes,
    )
    identical = _bytes(first) == _bytes(_extracted(subject, at, settings))
    return Found(extraction=first, selection=selection, validated=validated, identical=identical)


def _extracted(subject: Subject, at: int, settings: Settings) -> Extraction:
    trait = subject.traits[at].trait
    return extract(
        subject.model,
        trait,
        judge=subject.judge,
        questions=trait.extraction_questions[: settings.extraction_questions],
        max_new_tokens=settings.max_new_tokens,
        batch_size=settings.batch_size,
        seed=settings.seed,
    )


def _bytes(extraction: Extraction) -> dict[str, bytes]:
    """The vector files of all variants."""
    with tempfile.TemporaryDirectory() as folder:
        found = {}
        for variant, vector in extraction.vectors.items():
            vector.save(Path(folder) / variant)
            found[str(variant)] = (Path(folder) / variant).read_bytes()
        return found


def _trait(name: str, found: Found) -> dict[str, Any]:
    extraction, selection = found.extraction, found.selection
    return {
        "trait": name,
        "pairs": len(extraction.rollouts) // 2,
        "kept": extraction.kept // 2,
        "reasons": dict(extraction.reasons),
        "judged": extraction.judgements.counts,
        "layers": [asdict(layer) | {"site": str(layer.site)} for layer in extraction.layers],
        "unsteered": {"score": selection.score, "coherence": selection.coherence},
        "curves": [_cell(cell) for cell in selection.cells],
        "chosen": _cell(selection.best),
        "validated": _cell(found.validated),
        "identical": found.identical,
    }


def _cell(cell: Cell) -> dict[str, Any]:
    numbers = {
        field.name: getattr(cell, field.name) for field in fields(Cell) if field.name != "site"
    }
    return {"place": cell.place, "effect": cell.effect, **numbers}


def _cosines(found: Mapping[str, Found]) -> dict[str, Any]:
    """Cosines between the traits at each layer."""
    bank = VectorBank([one.extraction.vector for one in found.values()])
    return {
        "traits": list(bank.traits),
        "sites": list(map(str, bank.sites)),
        "values": cosine_matrices(bank).tolist(),
    }


def _claims(trait: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    name, cell = trait["trait"], trait["validated"]
    halves = min(layer["split_half_cosine"] for layer in trait["layers"])
    for what, measured, bound in (
        ("effect beyond a random vector of the same norm", cell["effect"], EFFECT),
        ("coherence while steered so", cell["coherence"], COHERENCE),
        ("split-half cosine at every layer", halves, HALVES),
        ("all three vector files the same to the byte when run again", trait["identical"], True),
    ):
        yield {
            "claim": f"{name}: {what}",
            "measured": measured,
            "bound": bound,
            "passed": measured >= bound,
        }


def _sizes(settings: Settings) -> dict[str, Any]:
    return {
        field.name.replace("_", " "): getattr(settings, field.name)
        for field in fields(settings)
        if field.name != "traits"
    }


def write(document: Mapping[str, Any], folder: Path = RESULTS) -> Path:
    """Write the document whole and return its path."""
    path = folder / f"{NAME}.json"
    text = json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(path, f"{text}\n".encode())
    except OSError as error:
        raise RecordError(f"got {path}, which cannot be written: {error}") from error
    return path
