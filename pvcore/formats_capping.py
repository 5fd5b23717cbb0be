"""Capping configurations of assistant-axis, as plans: each experiment is a list of upper bounds.

The file holds `{vectors: {name: {layer, vector}}, experiments: [{id, interventions: [{vector,
cap}]}]}`. Layers are blocks from 0; a cap acts on every position, in the order listed.
"""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from pvcore.errors import FormatError
from pvcore.formats_pickle import row
from pvcore.interventions import Cap, Intervention
from pvcore.plan import Plan
from pvcore.sites import Site, resid_post
from pvcore.vectors import PersonaVector, Provenance


def is_capping(value: object) -> bool:
    return isinstance(value, Mapping) and {"vectors", "experiments"} <= value.keys()


def experiment_ids(value: object) -> tuple[str, ...]:
    """The experiments of an unpickled configuration, in its order."""
    return tuple(_experiments(value))


def from_capping(value: object, *, experiment: str | None, model_id: str) -> Plan:
    """The plan of one experiment, which may be left unnamed where there is only one."""
    found = _experiments(value)
    name = next(iter(found)) if experiment is None and len(found) == 1 else experiment
    if name is None or name not in found:
        raise FormatError(
            f"got experiment {name!r}; this file has {', '.join(found)[:300] or 'none'}: name one"
        )
    caps = [_cap(value, entry, f"{name}[{at}]", model_id) for at, entry in enumerate(found[name])]
    if not caps:
        raise FormatError(f"got experiment {name!r} without interventions; wanted one at least")
    return Plan(*caps)


def to_capping(plans: Mapping[str, Plan]) -> dict[str, Any]:
    """A configuration with one experiment for each plan, under its key."""
    vectors: dict[str, dict[str, Any]] = {}
    experiments = []
    for name, plan in plans.items():
        if plan.monitor is not None:
            raise FormatError(f"got plan {name!r} with a monitor; wanted caps only: leave it out")
        listed = []
        for one in plan.interventions:
            for site in one.sites:
                key, direction, cap = _entry(name, one, site)
                vectors[key] = {"layer": site.layer, "vector": direction}
                listed.append({"vector": key, "cap": cap})
        experiments.append({"id": name, "interventions": listed})
    return {"vectors": vectors, "experiments": experiments}


def _experiments(value: object) -> dict[str, list[Any]]:
    listed = _field(value, "experiments", list, "the file")
    found: dict[str, list[Any]] = {}
    for at, entry in enumerate(listed):
        where = f"experiments[{at}]"
        name = _field(entry, "id", str, where)
        if name in found:
            raise FormatError(f"got {where} with the id {name[:60]!r} again; wanted each id once")
        found[name] = _field(entry, "interventions", list, where)
    return found


def _cap(value: object, entry: object, where: str, model_id: str) -> Cap:
    name = _field(entry, "vector", str, where)
    record = _field(_field(value, "vectors", dict, "the file"), name, dict, "vectors")
    layer = _field(record, "layer", int, f"vectors[{name[:60]!r}]")
    cap = float(_field(entry, "cap", int | float, where))
    if layer < 0 or isinstance(layer, bool) or not math.isfinite(cap):
        raise FormatError(
            f"got layer {layer} and cap {cap} in {where}; wanted a block from 0 and a finite bound"
        )
    direction = row(record.get("vector"), f"vectors[{name[:60]!r}].vector")
    vector = PersonaVector(
        trait=name.replace("/", "."),  # names of pvcore's stand in file names and columns
        sites=[resid_post(layer)],
        directions=direction.unsqueeze(0),
        model_id=model_id,
        provenance=Provenance(note="from a capping configuration of assistant-axis"),
    )
    return Cap(vector, max=cap, layers=[layer], span="all")


def _field(record: object, name: str, kind: Any, where: str) -> Any:
    """A field of a mapping, of its kind; `FormatError` names both for anything else."""
    if not isinstance(record, Mapping):
        raise FormatError(f"got {where} as {type(record).__name__}; wanted a dict")
    if name not in record:
        raise FormatError(f"got {where} without {name[:60]!r}; wanted it there")
    value = record[name]
    if not isinstance(value, kind):
        raise FormatError(
            f"got {name[:60]!r} of {where} as {type(value).__name__}; wanted "
            f"{getattr(kind, '__name__', 'a number')}"
        )
    return value


def _entry(plan: str, one: Intervention, site: Site) -> tuple[str, Tensor, float]:
    """Name, direction and bound of a cap at one site, where the format can hold it."""
    bound = one.max.at(site.layer) if isinstance(one, Cap) and one.max is not None else None
    fits = isinstance(one, Cap) and one.min is None and len(one.vectors) == 1
    fits = fits and one.span == "all" and site.kind == "resid_post" and not one.when
    if not fits or not isinstance(bound, float):
        raise FormatError(
            f"got {type(one).__name__} at {site} in plan {plan!r}; a capping configuration holds "
            'only Cap(vector, max=number, span="all") of one vector at block outputs'
        )
    (vector,) = one.vectors
    key = f"{vector.trait}.{vector.content_hash[:8]}.layer_{site.layer}"
    return key, vector.direction(site), bound
