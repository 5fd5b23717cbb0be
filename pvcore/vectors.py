"""Persona vectors: one direction per site for one trait, and banks of them."""

import difflib
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from pvcore import vector_files
from pvcore.directions import norms, own_directions, own_statistics, require_factor, unit_rows
from pvcore.errors import SiteError, VectorError
from pvcore.provenance import Provenance as Provenance
from pvcore.provenance import grouped, negated, plain_json, require, require_name, require_text
from pvcore.sites import Site, as_sites, resid_post

Variant = Literal["response_mean", "prompt_mean", "prompt_last"]
VARIANTS: tuple[Variant, ...] = get_args(Variant)
WANTED_VARIANT = f"one of {', '.join(VARIANTS)}"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, repr=False)
class PersonaVector:
    """One raw direction per site for one trait; `directions` is copied to float32 on the CPU.

    `statistics` are numbers about each site, such as how well the direction separates there.
    `calibration` is JSON, usually percentiles of the projection under the name of each site.
    Both describe the direction, not its length: multiplying by a positive number keeps them.
    `sites` keep their order, as a tuple; `source` is the file the vector was loaded from. Raises
    `VectorError` for what could not steer: wrong shapes, NaN, zero directions, a site twice.
    """

    trait: str
    sites: Sequence[Site]
    # Of any shape in the type, so that a wrong one meets the error that says what to do.
    directions: Float[Tensor, "..."]
    model_id: str = ""
    revision: str | None = None
    variant: Variant = "response_mean"
    provenance: Provenance = field(default_factory=Provenance)
    statistics: Mapping[str, Float[Tensor, " n_sites"]] = field(default_factory=dict)
    calibration: Mapping[str, Any] = field(default_factory=dict)
    source: Path | None = None

    def __post_init__(self) -> None:
        require_name("trait", self.trait)
        require_text("model_id", self.model_id)
        revision_fits = self.revision is None or isinstance(self.revision, str)
        require(revision_fits, "revision", self.revision, "text or None")
        require(self.variant in VARIANTS, "variant", self.variant, WANTED_VARIANT)
        is_provenance = isinstance(self.provenance, Provenance)
        require(is_provenance, "provenance", self.provenance, "a Provenance")
        sites: object = self.sites
        are_sites = isinstance(sites, Sequence) and all(isinstance(site, Site) for site in sites)
        require(are_sites, "sites", sites, "a tuple of Sites")
        try:
            sites = as_sites(self.sites)
        except SiteError as error:
            raise VectorError(f"sites of {self.trait!r}: {error}") from None
        directions = own_directions(self.trait, sites, self.directions)
        statistics = own_statistics(self.trait, sites, self.statistics)
        is_mapping = isinstance(self.calibration, Mapping)
        require(is_mapping, "calibration", self.calibration, "a mapping that JSON can hold")
        object.__setattr__(self, "sites", sites)
        object.__setattr__(self, "directions", directions)
        object.__setattr__(self, "statistics", statistics)
        object.__setattr__(self, "calibration", plain_json(self.calibration, "calibration"))

    @property
    def d_model(self) -> int:
        return self.directions.shape[1]

    @property
    def norms(self) -> Float[Tensor, " n_sites"]:
        return norms(self.directions).float()

    def direction(self, site: int | Site) -> Float[Tensor, " d_model"]:
        """The raw direction at one site; a bare layer number means its `resid_post`."""
        return self.at([site]).directions[0]

    def at(self, layers: int | Site | Iterable[int | Site]) -> "PersonaVector":
        """The vector at these sites only, in this order."""
        sites = _as_sites(layers)
        missing = [str(site) for site in sites if site not in self.sites]
        if missing:
            raise VectorError(
                f"got no direction of {self.trait!r} at {', '.join(missing)}; it has "
                f"{', '.join(map(str, self.sites))}: choose among these or extract it again"
            )
        rows = [self.sites.index(site) for site in sites]
        left_out = {str(site) for site in self.sites if site not in sites}
        return replace(
            self,
            sites=sites,
            directions=self.directions[rows],
            statistics={name: values[rows] for name, values in self.statistics.items()},
            calibration={key: v for key, v in self.calibration.items() if key not in left_out},
            source=None,
        )

    def unit(self) -> "PersonaVector":
        """The same directions at length 1, so that a coefficient counts residual units."""
        return replace(
            self,
            directions=unit_rows(self.directions),
            provenance=self.provenance.noting("scaled to norm 1"),
            source=None,
        )

    def cosine(self, other: "PersonaVector") -> Float[Tensor, " n_shared"]:
        """Cosine at each site that both vectors have, in the order of this one's sites.

        Vectors of two models of one width may be compared, as base and finetuned model are.
        """
        _require_one_width([self, other])
        shared = _shared_sites([self, other])
        ours, theirs = self.at(shared).directions, other.at(shared).directions
        dots = (ours.double() * theirs.double()).sum(dim=1)
        return (dots / (norms(ours) * norms(theirs))).float()

    def rename(self, trait: str) -> "PersonaVector":
        """The same directions under another name."""
        return replace(self, trait=trait, source=None)

    def layer_incremental(self) -> "PersonaVector":
        """`v_l - v_(l-1)` for neighbouring layers, the first kept (arXiv 2507.21509, J.3).

        Sites come out in order of depth. Adding the increments of all layers adds the whole
        vector once by the last of them.
        """
        rising = self.at(sorted(self.sites))
        first = rising.sites[0].layer
        wanted = tuple(map(resid_post, range(first, first + len(self.sites))))
        if rising.sites != wanted:
            raise VectorError(
                f"got {self.trait!r} at {', '.join(map(str, self.sites))}; wanted resid_post of "
                "neighbouring layers without a gap: choose them with .at(range(first, last + 1))"
            )
        rows = rising.directions
        steps = torch.cat([rows[:1], rows[1:] - rows[:-1]])
        remark = "layer-incremental: each layer minus the one below"
        return rising._turned(steps, self.trait, remark)

    def __add__(self, other: "PersonaVector") -> "PersonaVector":
        return self._combined(other, "+")

    def __sub__(self, other: "PersonaVector") -> "PersonaVector":
        return self._combined(other, "-")

    def __neg__(self) -> "PersonaVector":
        return self._turned(-self.directions, negated(self.trait), "multiplied by -1")

    def __mul__(self, factor: float | int) -> "PersonaVector":
        number = require_factor(self.trait, factor)
        return self._scaled(self.directions * number, number, f"multiplied by {number!r}")

    __rmul__ = __mul__

    def __truediv__(self, divisor: float | int) -> "PersonaVector":
        number = require_factor(self.trait, divisor)
        return self._scaled(self.directions / number, number, f"divided by {number!r}")

    def _turned(self, directions: Tensor, trait: str, remark: str) -> "PersonaVector":
        """A vector pointing elsewhere: what was measured along the old direction is left behind."""
        return replace(
            self,
            trait=trait,
            directions=directions,
            provenance=self.provenance.noting(remark),
            statistics={},
            calibration={},
            source=None,
        )

    def _scaled(self, directions: Tensor, factor: float, remark: str) -> "PersonaVector":
        if factor < 0:
            return self._turned(directions, self.trait, remark)
        noted = self.provenance.noting(remark)
        return replace(self, directions=directions, provenance=noted, source=None)

    def _combined(self, other: "PersonaVector", sign: Literal["+", "-"]) -> "PersonaVector":
        _require_one_width([self, other])
        if set(self.sites) != set(other.sites) or self.variant != other.variant:
            raise VectorError(
                f"got {_described(self)} {sign} {_described(other)}; wanted two vectors of the "
                "same sites and variant: choose shared sites with .at(...)"
            )
        theirs = other.at(self.sites).directions
        made_of = f"{self.content_hash[:12]} {sign} {other.content_hash[:12]}"
        return PersonaVector(
            trait=f"{self.trait} {sign} {grouped(other.trait)}",
            sites=self.sites,
            directions=self.directions + theirs if sign == "+" else self.directions - theirs,
            model_id=_one_model_id([self, other]),
            revision=self.revision if self.revision == other.revision else None,
            variant=self.variant,
            provenance=Provenance(note=f"content hashes {made_of}"),
        )

    @property
    def content_hash(self) -> str:
        """SHA-256 in hex of what acts: trait, model, sites, variant and the float32 numbers."""
        content = [self.trait, self.model_id, list(map(str, self.sites)), self.variant]
        digest = hashlib.sha256(json.dumps([*content, self.d_model]).encode("ascii"))
        digest.update(vector_files.float32_bytes(self.directions))
        return digest.hexdigest()

    def __eq__(self, other: object) -> bool:
        """Whether everything but the source is the same, number by number."""
        if not isinstance(other, PersonaVector):
            return NotImplemented
        return vector_files.encode(self._record()) == vector_files.encode(other._record())

    def __hash__(self) -> int:
        return hash(self.content_hash)

    def __repr__(self) -> str:
        sites = list(map(str, self.sites))
        shown = sites if len(sites) < 4 else [sites[0], "...", sites[-1]]
        return (
            f"PersonaVector({self.trait!r}, {len(sites)} sites: {', '.join(shown)}, "
            f"d_model={self.d_model}, model_id={self.model_id!r}, variant={self.variant!r}, "
            f"content_hash={self.content_hash[:12]!r})"
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the native file, whole or not at all; equal vectors give equal bytes."""
        vector_files.write(self._record(), path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "PersonaVector":
        """Read a native file. Raises one `VectorError` that names the file for any other."""
        record = vector_files.read(path)
        try:
            return cls._from_record(record, Path(path))
        except VectorError as error:
            raise VectorError(f"{path}: {error}") from None

    def _record(self) -> vector_files.VectorRecord:
        plain = ("trait", "model_id", "revision", "d_model", "variant", "calibration")
        values = {name: getattr(self, name) for name in (*plain, "content_hash")}
        values["sites"] = list(map(str, self.sites))
        values["provenance"] = asdict(self.provenance)
        values["pvcore_version"] = vector_files.pvcore_version()
        return vector_files.VectorRecord(
            directions=self.directions, statistics=self.statistics, fields=values
        )

    @classmethod
    def _from_record(cls, record: vector_files.VectorRecord, source: Path) -> "PersonaVector":
        values, written = record.fields, record.fields["provenance"]
        require(values["variant"] in VARIANTS, "variant", values["variant"], WANTED_VARIANT)
        vector = cls(
            directions=record.directions,
            statistics=record.statistics,
            sites=vector_files.parse_sites(values["sites"]),
            provenance=Provenance(**{**written, "seeds": tuple(written["seeds"])}),
            source=source,
            **{
                name: values[name]
                for name in ("trait", "model_id", "revision", "variant", "calibration")
            },
        )
        for name in ("d_model", "content_hash"):
            got, wanted = values[name], getattr(vector, name)
            require(
                got == wanted, name, got, f"{wanted!r}, which the tensors have: extract it again"
            )
        return vector


@dataclass(frozen=True, slots=True, init=False)
class VectorBank:
    """Vectors stacked at their shared sites, or at `layers`; a vector alone is a bank of one.

    Bare layer numbers mean `resid_post`; sites are ordered by depth. Raises `VectorError` for two
    vectors of one trait, of different widths or models, or without the sites wanted.
    """

    vectors: tuple[PersonaVector, ...]
    sites: tuple[Site, ...]
    directions: Float[Tensor, "n_sites n_vec d_model"] = field(compare=False, repr=False)

    def __init__(
        self,
        vectors: PersonaVector | Iterable[PersonaVector],
        *,
        layers: int | Site | Iterable[int | Site] | None = None,
    ) -> None:
        stacked = tuple(vectors) if isinstance(vectors, Iterable) else (vectors,)
        _require_one_width(stacked)
        _require_distinct(stacked)
        _one_model_id(stacked)
        sites = _shared_sites(stacked) if layers is None else _as_sites(layers)
        sites = tuple(sorted(sites))
        rows = [vector.at(sites).directions for vector in stacked]
        object.__setattr__(self, "vectors", stacked)
        object.__setattr__(self, "sites", sites)
        object.__setattr__(self, "directions", torch.stack(rows, dim=1))

    @property
    def traits(self) -> tuple[str, ...]:
        return tuple(vector.trait for vector in self.vectors)

    @property
    def d_model(self) -> int:
        return self.directions.shape[2]

    @property
    def model_id(self) -> str:
        """The model all vectors were made for, or "" when none of them says."""
        return _one_model_id(self.vectors)

    @property
    def norms(self) -> Float[Tensor, "n_sites n_vec"]:
        return norms(self.directions).float()

    @property
    def units(self) -> Float[Tensor, "n_sites n_vec d_model"]:
        """The directions scaled to length 1: what a projection is taken on."""
        return unit_rows(self.directions)

    def __getitem__(self, trait: str) -> PersonaVector:
        for vector in self.vectors:
            if vector.trait == trait:
                return vector
        near = difflib.get_close_matches(str(trait), self.traits, n=1)
        hint = f": did you mean {near[0]!r}?" if near else ": choose one of these"
        raise VectorError(f"got trait {trait!r}; this bank has {', '.join(self.traits)}{hint}")

    def __contains__(self, trait: object) -> bool:
        return trait in self.traits or trait in self.vectors

    def __iter__(self) -> Iterator[PersonaVector]:
        return iter(self.vectors)

    def __len__(self) -> int:
        return len(self.vectors)


def _as_sites(layers: int | Site | Iterable[int | Site]) -> tuple[Site, ...]:
    return as_sites(layers if isinstance(layers, Iterable) else [layers])


def _shared_sites(vectors: Sequence[PersonaVector]) -> tuple[Site, ...]:
    """The sites that all vectors have, in the order of the first one's."""
    shared = [s for s in vectors[0].sites if all(s in vector.sites for vector in vectors)]
    if not shared:
        raise VectorError(
            f"got {' and '.join(map(_described, vectors))} without a site in common; wanted "
            "vectors of the same sites: extract them at shared ones"
        )
    return tuple(shared)


def _require_distinct(vectors: Sequence[PersonaVector]) -> None:
    traits = [vector.trait for vector in vectors]
    twice = sorted({trait for trait in traits if traits.count(trait) > 1})
    if twice:
        raise VectorError(
            f"got two vectors named {', '.join(map(repr, twice))}; wanted one of each name: "
            "give one another with .rename(trait)"
        )


def _require_one_width(vectors: Sequence[PersonaVector]) -> None:
    are_vectors = bool(vectors) and all(isinstance(vector, PersonaVector) for vector in vectors)
    require(are_vectors, "vectors", vectors, "persona vectors: one at least, and nothing else")
    if len({vector.d_model for vector in vectors}) > 1:
        raise VectorError(
            f"got {' and '.join(map(_described, vectors))}; wanted one d_model: "
            "choose vectors of one model"
        )


def _one_model_id(vectors: Sequence[PersonaVector]) -> str:
    model_ids = {vector.model_id for vector in vectors} - {""}
    if len(model_ids) > 1:
        raise VectorError(
            f"got {' and '.join(map(_described, vectors))}; wanted vectors of one model: "
            "extract them on the same one"
        )
    return model_ids.pop() if model_ids else ""


def _described(vector: PersonaVector) -> str:
    sites = ", ".join(map(str, vector.sites))
    return (
        f"{vector.trait!r} (d_model {vector.d_model}, model {vector.model_id!r}, "
        f"{vector.variant}, {sites})"
    )
