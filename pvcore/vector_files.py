"""The native vector file: safetensors with one JSON metadata string, checked to the last byte.

This module knows the container: tensors, metadata fields, format number, checksum and the atomic
write. What the fields mean, and which values they may take, is for `pvcore.vectors` to say.
"""

import hashlib
import importlib.metadata
import json
import math
import os
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from jaxtyping import Float
from torch import Tensor

from pvcore.errors import SiteError, VectorError
from pvcore.sites import Site

FORMAT = 1
METADATA_KEY = "pvcore"
DIRECTIONS = "directions"
STATISTICS_PREFIX = "statistics."
# What each field of the metadata, and of its provenance, must be in JSON.
FIELDS = {
    "format": "a whole number",
    "trait": "text",
    "model_id": "text",
    "revision": "text or null",
    "d_model": "a whole number",
    "sites": "a list of texts",
    "variant": "text",
    "provenance": "an object",
    "calibration": "an object",
    "pvcore_version": "text",
    "content_hash": "text",
    "checksum": "text",
}
PROVENANCE_FIELDS = {
    "thresholds": "an object of numbers",
    "judge": "text",
    "kept": "a whole number or null",
    "dropped": "a whole number or null",
    "prompt_hash": "text",
    "seeds": "a list of whole numbers",
    "note": "text",
}
# Parsed JSON has exact types only, so `type` also keeps true and false out of the numbers.
JSON_KINDS: dict[str, Callable[[Any], bool]] = {
    "text": lambda value: type(value) is str,
    "text or null": lambda value: value is None or type(value) is str,
    "a whole number": lambda value: type(value) is int,
    "a whole number or null": lambda value: value is None or type(value) is int,
    "a list of texts": lambda value: type(value) is list and {*map(type, value)} <= {str},
    "a list of whole numbers": lambda value: type(value) is list and {*map(type, value)} <= {int},
    "an object": lambda value: type(value) is dict,
    "an object of numbers": lambda value: (
        type(value) is dict and {*map(type, value.values())} <= {int, float}
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class VectorRecord:
    """What a file holds: every field is there, no value has been judged yet."""

    directions: Float[Tensor, "n_sites d_model"]
    statistics: Mapping[str, Float[Tensor, " n_sites"]]
    fields: Mapping[str, Any]


def encode(record: VectorRecord) -> bytes:
    """The bytes of a file; equal records give equal bytes.

    `format` and `checksum` are filled in here, over whatever `record.fields` says of them.
    """
    tensors = {STATISTICS_PREFIX + name: tensor for name, tensor in record.statistics.items()}
    tensors[DIRECTIONS] = record.directions
    fields = {**record.fields, "format": FORMAT}
    fields["checksum"] = checksum(tensors, fields)
    return safetensors.torch.save(tensors, {METADATA_KEY: _canonical(fields)})


def decode(data: bytes) -> VectorRecord:
    """Read what `encode` wrote. Raises `VectorError` for any other bytes."""
    try:
        entries = safetensors.deserialize(data)  # type: ignore[no-untyped-call]
    except safetensors.SafetensorError as error:
        raise VectorError(
            f"got bytes that are no whole safetensors file ({error}); wanted a vector file as "
            "PersonaVector.save writes it: copy it again, or make the vector anew from "
            "its directions"
        ) from None
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    fields = _parse_fields((header.get("__metadata__") or {}).get(METADATA_KEY))
    tensors = {name: _parse_tensor(name, entry) for name, entry in entries}
    if fields["checksum"] != checksum(tensors, fields):
        raise VectorError(
            "got a checksum that does not match the contents; wanted the file as it was saved: "
            "it was damaged or edited, so copy it or extract the vector again"
        )
    return _parse_record(tensors, fields)


def read(path: str | os.PathLike[str]) -> VectorRecord:
    """Read one file. Raises `VectorError` that names it."""
    try:
        data = Path(path).read_bytes()
    except (OSError, ValueError) as error:
        raise VectorError(
            f"{path}: cannot be read ({_reason(error)}); wanted a vector file: check the path"
        ) from None
    try:
        return decode(data)
    except VectorError as error:
        raise VectorError(f"{path}: {error}") from None


def write(record: VectorRecord, path: str | os.PathLike[str]) -> None:
    """Write one file whole or not at all. Raises `VectorError` when the disk refuses."""
    target = Path(path)
    if not target.parent.is_dir():
        raise VectorError(
            f"{path}: cannot be written: got a folder {str(target.parent)!r} that is not there; "
            "wanted an existing one: create it first"
        )
    data = encode(record)
    # Same folder, so that the rename stays within one file system and is atomic.
    unfinished = target.with_name(f".{target.name}.{secrets.token_hex(8)}.tmp")
    try:
        try:
            with unfinished.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(unfinished, target)
        finally:
            unfinished.unlink(missing_ok=True)
    except (OSError, ValueError) as error:
        raise VectorError(
            f"{path}: cannot be written ({_reason(error)}); wanted a writable file path: "
            "nothing was changed there"
        ) from None


def checksum(tensors: Mapping[str, Tensor], fields: Mapping[str, Any]) -> str:
    """SHA-256 over every field but the checksum itself, and every tensor."""
    covered = {name: value for name, value in fields.items() if name != "checksum"}
    digest = hashlib.sha256(_canonical(covered).encode("ascii"))
    for name in sorted(tensors):
        digest.update(_canonical([name, list(tensors[name].shape)]).encode("ascii"))
        digest.update(float32_bytes(tensors[name]))
    return digest.hexdigest()


def float32_bytes(tensor: Float[Tensor, "..."]) -> bytes:
    """The numbers as a file holds them: row by row, little-endian."""
    return tensor.numpy().astype("<f4").tobytes()


def parse_sites(texts: list[str]) -> tuple[Site, ...]:
    """The `sites` field as sites. Raises `VectorError`."""
    try:
        return tuple(Site.parse(text) for text in texts)
    except (SiteError, ValueError) as error:  # int() refuses a layer of thousands of digits
        raise VectorError(f"sites: {error}") from None


def pvcore_version() -> str:
    """The version that a file names as its writer."""
    try:
        return importlib.metadata.version("pvcore")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _parse_fields(text: str | None) -> dict[str, Any]:
    if text is None:
        raise VectorError(
            f"got no {METADATA_KEY!r} metadata; wanted a vector file as PersonaVector.save writes "
            "it: make the vector anew from its directions"
        )
    try:
        fields: Any = json.loads(text, parse_constant=_finite, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise VectorError(
            f"got metadata that is no JSON ({error}); wanted the metadata as it was saved: "
            "copy the file or extract the vector again"
        ) from None
    if isinstance(fields, dict) and fields.get("format", FORMAT) != FORMAT:
        raise VectorError(
            f"got vector file format {fields['format']!r:.60}; wanted format {FORMAT}: read it "
            "with the pvcore that wrote it, or update pvcore"
        )
    checked = _check_fields(fields, FIELDS, "metadata")
    _check_fields(checked["provenance"], PROVENANCE_FIELDS, "provenance")
    return checked


def _check_fields(got: Any, wanted: Mapping[str, str], where: str) -> dict[str, Any]:
    """`got` itself, as an object with exactly the fields wanted, each of its kind."""
    if not isinstance(got, dict):
        raise VectorError(f"got {where} {got!r:.60}; wanted a JSON object")
    missing = [f"no {name}" for name in wanted if name not in got]
    unknown = [f"an unknown {name!r}" for name in sorted(got.keys() - wanted.keys())]
    if missing or unknown:
        raise VectorError(
            f"got {where} with {', '.join(missing + unknown)}; wanted exactly "
            f"{', '.join(wanted)}: write the file with PersonaVector.save"
        )
    for name, kind in wanted.items():
        if not JSON_KINDS[kind](got[name]):
            raise VectorError(f"got {where} field {name} {got[name]!r:.60}; wanted {kind}")
    return got


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is no finite number")
    return number


def _parse_tensor(name: str, entry: Mapping[str, Any]) -> Tensor:
    if name != DIRECTIONS and not name.startswith(STATISTICS_PREFIX):
        raise VectorError(
            f"got a tensor {name!r}; wanted {DIRECTIONS!r} and {STATISTICS_PREFIX}NAME only"
        )
    if entry["dtype"] != "F32":
        raise VectorError(f"got tensor {name!r} of dtype {entry['dtype']}; wanted F32")
    values = np.frombuffer(bytes(entry["data"]), "<f4").astype(np.float32)
    return torch.from_numpy(values.reshape(entry["shape"]))


def _parse_record(tensors: dict[str, Tensor], fields: dict[str, Any]) -> VectorRecord:
    directions = tensors.pop(DIRECTIONS, None)
    if directions is None:
        raise VectorError(f"got no tensor {DIRECTIONS!r}; wanted one of [n_sites, d_model]")
    if directions.dim() != 2:
        raise VectorError(
            f"got tensor {DIRECTIONS!r} of shape {list(directions.shape)}; "
            "wanted [n_sites, d_model]"
        )
    for name in sorted(tensors):
        if tensors[name].shape != directions.shape[:1]:
            raise VectorError(
                f"got tensor {name!r} of shape {list(tensors[name].shape)}; wanted one number for "
                f"each row of {DIRECTIONS!r} {list(directions.shape)}"
            )
    statistics = {name.removeprefix(STATISTICS_PREFIX): tensors[name] for name in sorted(tensors)}
    return VectorRecord(directions=directions, statistics=statistics, fields=fields)


def _canonical(value: object) -> str:
    return json.dumps(value, sort_keys=True, allow_nan=False)


def _reason(error: Exception) -> str:
    """What went wrong, without the path that the message already names."""
    return getattr(error, "strerror", None) or str(error)
