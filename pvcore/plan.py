"""Plans: interventions and a monitor, checked once against a model, and the JSON they live in."""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pvcore.amounts import Amount
from pvcore.blocks import Decoder
from pvcore.conditions import Above, Below, Condition
from pvcore.errors import PlanError, PvcoreError
from pvcore.files import write_whole
from pvcore.fingerprints import of_text
from pvcore.interventions import Ablate, Add, Cap, Intervention, sites_of
from pvcore.sites import Site
from pvcore.vectors import PersonaVector, VectorBank

# 2 knows conditions; plans without are written as 1, which says all there is to say of them.
FORMATS = (1, 2)
_KINDS: dict[str, type[Add] | type[Ablate] | type[Cap]] = {"add": Add, "ablate": Ablate, "cap": Cap}
_CONDITIONS: dict[str, type[Above] | type[Below]] = {"above": Above, "below": Below}
_AMOUNTS = ("coeff", "min", "max")


@dataclass(frozen=True, slots=True, init=False)
class Plan:
    """What to do to, and what to watch of, the residual stream: the same in every executor.

    Interventions act in the order given. `monitor` is a bank whose projections are reported after
    all of them.
    """

    interventions: tuple[Intervention, ...]
    monitor: VectorBank | None

    def __init__(self, *interventions: Intervention, monitor: VectorBank | None = None) -> None:
        for one in interventions:
            if not isinstance(one, Add | Ablate | Cap):
                raise PlanError(f"got {type(one).__name__}; wanted Add, Ablate or Cap")
        if monitor is not None and not isinstance(monitor, VectorBank):
            raise PlanError(f"got {type(monitor).__name__} as monitor; wanted a VectorBank")
        if not interventions and monitor is None:
            raise PlanError("got an empty plan; give it an intervention or monitor=bank")
        object.__setattr__(self, "interventions", tuple(interventions))
        object.__setattr__(self, "monitor", monitor)
        if len(self.row_counts) > 1:
            raise PlanError(
                f"got per-row numbers for {sorted(self.row_counts)} rows in one plan; all of them "
                "must be given for the same batch"
            )

    @property
    def row_counts(self) -> frozenset[int]:
        """The batch sizes its per-row numbers ask for: none, or one."""
        return frozenset().union(*(one.row_counts for one in self.interventions))

    @property
    def vectors(self) -> tuple[PersonaVector, ...]:
        """Every vector of the plan once, in order of appearance."""
        every = [vector for one in self.interventions for vector in one.vectors]
        every += [condition.vector for one in self.interventions for condition in one.when]
        every += list(self.monitor.vectors) if self.monitor else []
        return tuple({vector.content_hash: vector for vector in every}.values())

    @property
    def fingerprint(self) -> str:
        """Changes with anything that the interventions do; what is watched does not matter."""
        acting = [vector for one in self.interventions for vector in one.vectors]
        acting += [condition.vector for one in self.interventions for condition in one.when]
        return of_text(
            {
                "interventions": [_written(one) for one in self.interventions],
                "vectors": sorted({vector.content_hash for vector in acting}),
            }
        )

    def check(self, decoder: Decoder, model_id: str, *, check_model: bool = True) -> None:
        """Raise one typed error if the plan does not fit the model."""
        watched = self.monitor.sites if self.monitor else ()
        for site in (*sites_of(self.interventions), *watched):
            decoder.require(site)
        for vector in self.vectors:
            if vector.d_model != decoder.d_model:
                raise PlanError(
                    f"got vector {vector.trait!r} of width {vector.d_model}; this model's residual "
                    f"stream has width {decoder.d_model}: extract it again with this model"
                )
            if check_model and not _same_model(vector.model_id, model_id):
                raise PlanError(
                    f"got vector {vector.trait!r} made for {vector.model_id}; this model is "
                    f"{model_id}: extract it again with this model, or pass check_model=False"
                )

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON. Vectors are named by file and content hash.

        A vector that was not loaded from a file is written beside the plan, into `NAME.vectors/`.
        """
        path = Path(path)
        try:
            files = {v.content_hash: (_name(v), _vector_file(v, path)) for v in self.vectors}
        except OSError as error:
            raise PlanError(f"got {path}, beside which nothing can be written: {error}") from error
        document: dict[str, Any] = {
            "format": 2 if any(one.when for one in self.interventions) else 1,
            "vectors": {
                name: {"file": os.path.relpath(file, path.parent or "."), "sha256": content_hash}
                for content_hash, (name, file) in files.items()
            },
            "interventions": [_written(one) for one in self.interventions],
        }
        if self.monitor is not None:
            document["monitor"] = {
                "vectors": [_name(vector) for vector in self.monitor.vectors],
                "sites": [str(site) for site in self.monitor.sites],
            }
        try:
            write_whole(path, (json.dumps(document, indent=2) + "\n").encode())
        except OSError as error:
            raise PlanError(f"got {path}, which cannot be written: {error}") from error

    @classmethod
    def load(cls, path: str | Path) -> "Plan":
        """Read a plan; `PlanError` if it, or a vector file it names, is not what was saved."""
        path = Path(path)
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise PlanError(f"got {path}, which cannot be read as a plan: {error}") from error
        try:
            if document["format"] not in FORMATS:
                raise PlanError(
                    f"got plan format {document['format']!r} in {path}; wanted "
                    f"{' or '.join(map(str, FORMATS))}"
                )
            vectors = {
                name: _load_vector(path, entry) for name, entry in document["vectors"].items()
            }
            interventions = [_read(entry, vectors) for entry in document["interventions"]]
            monitor = document.get("monitor")
            bank = None if monitor is None else VectorBank(**_aim(monitor, vectors))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise PlanError(f"got {path} with a missing or malformed entry: {error!r}") from error
        return cls(*interventions, monitor=bank)


def _same_model(one: str, other: str) -> bool:
    """Whether two ids may name one model; an unknown id (empty) excludes nothing."""
    last = [name.rstrip("/").rpartition("/")[2].casefold() for name in (one, other)]
    return not one or not other or last[0] == last[1]


def _name(vector: PersonaVector) -> str:
    """A file-safe name that tells apart vectors of one trait."""
    return f"{re.sub(r'[^a-z0-9_]+', '-', vector.trait.casefold())}-{vector.content_hash[:8]}"


def _vector_file(vector: PersonaVector, path: Path) -> Path:
    if vector.source is not None and vector.source.exists():
        return vector.source
    folder = path.with_suffix(".vectors")
    folder.mkdir(exist_ok=True)
    file = folder / f"{_name(vector)}.safetensors"
    vector.save(file)
    return file


def _written(one: Intervention) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "kind": type(one).__name__.lower(),
        "vectors": [_name(vector) for vector in one.vectors],
        "sites": [str(site) for site in one.sites],
        "span": one.span,
    }
    for name in _AMOUNTS:
        amount: Amount | None = getattr(one, name, None)
        if amount is not None:
            entry[name] = _written_amount(amount)
    if one.when:
        entry["when"] = [
            {
                "kind": type(condition).__name__.lower(),
                "vector": _name(condition.vector),
                "threshold": _written_amount(condition.threshold),
                "site": None if condition.site is None else str(condition.site),
            }
            for condition in one.when
        ]
    return entry


def _written_amount(amount: Amount) -> Any:
    by_layer = {str(layer): rows for layer, rows in amount.by_layer}
    return amount.everywhere if amount.everywhere is not None else by_layer


def _read_amount(value: Any) -> Any:
    return {int(k): v for k, v in value.items()} if isinstance(value, dict) else value


def _aim(entry: Mapping[str, Any], vectors: Mapping[str, PersonaVector]) -> dict[str, Any]:
    sites = [Site.parse(text) for text in entry["sites"]]
    return {"vectors": [vectors[name] for name in entry["vectors"]], "layers": sites}


def _read(entry: Mapping[str, Any], vectors: Mapping[str, PersonaVector]) -> Intervention:
    settings = _aim(entry, vectors)
    for name in _AMOUNTS:
        if name in entry:
            settings[name] = _read_amount(entry[name])
    settings["when"] = [_read_condition(one, vectors) for one in entry.get("when", [])]
    return _KINDS[entry["kind"]](settings.pop("vectors"), span=entry["span"], **settings)


def _read_condition(entry: Mapping[str, Any], vectors: Mapping[str, PersonaVector]) -> Condition:
    site = entry["site"]
    return _CONDITIONS[entry["kind"]](
        vectors[entry["vector"]],
        _read_amount(entry["threshold"]),
        site=None if site is None else Site.parse(site),
    )


def _load_vector(path: Path, entry: Mapping[str, str]) -> PersonaVector:
    file = path.parent / entry["file"]
    try:
        vector = PersonaVector.load(file)
    except PvcoreError as error:
        raise PlanError(f"got plan {path} with an unusable vector: {error}") from error
    if vector.content_hash != entry["sha256"]:
        raise PlanError(
            f"got {file} with content {vector.content_hash[:12]}; plan {path} was saved with "
            f"{entry['sha256'][:12]}: restore that file, or save the plan again"
        )
    return vector
