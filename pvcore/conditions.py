"""Conditions: on which rows and tokens an intervention acts. Plain frozen data.

A condition is a mask in projection space, worked out on the device: at the site of its
intervention it sees the projection as the intervention's step finds it, at an earlier site the one
that flows on there, after all plans that are armed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pvcore.amounts import Amount, Setting
from pvcore.errors import PlanError
from pvcore.sites import Site, as_sites
from pvcore.vectors import PersonaVector


class _Compares:
    """What both directions share: a vector, a threshold and where the projection is read."""

    __slots__ = ()
    vector: PersonaVector
    threshold: Amount
    site: Site | None

    def _compare(self, vector: PersonaVector, threshold: Setting, site: int | Site | None) -> None:
        if not isinstance(vector, PersonaVector):
            raise PlanError(
                f"got {type(vector).__name__} to compare; wanted one PersonaVector, as in "
                "when=pv.Above(evil, 4.0)"
            )
        if site is not None and isinstance(threshold, Mapping):
            raise PlanError("got a threshold by layer for a condition read at one site; give one")
        object.__setattr__(self, "vector", vector)
        object.__setattr__(self, "threshold", Amount.of(threshold, "threshold"))
        object.__setattr__(self, "site", None if site is None else as_sites([site])[0])
        if self.site is not None:
            vector.direction(self.site)

    def read_at(self, site: Site) -> Site:
        """Where the projection is read for an intervention at `site`."""
        return site if self.site is None else self.site


@dataclass(frozen=True, slots=True, init=False)
class Above(_Compares):
    """Holds where the projection on `vector`, `<h, v/|v|>`, is above `threshold`.

    `threshold` is a number, one per row of the batch, or a mapping from layer to either. `site`, a
    block number or a site, is where the projection is read: by default where the intervention
    acts, else at a site before that.
    """

    vector: PersonaVector
    threshold: Amount
    site: Site | None

    def __init__(
        self, vector: PersonaVector, threshold: Setting, *, site: int | Site | None = None
    ) -> None:
        self._compare(vector, threshold, site)


@dataclass(frozen=True, slots=True, init=False)
class Below(_Compares):
    """Holds where the projection on `vector` is below `threshold`; else like `Above`."""

    vector: PersonaVector
    threshold: Amount
    site: Site | None

    def __init__(
        self, vector: PersonaVector, threshold: Setting, *, site: int | Site | None = None
    ) -> None:
        self._compare(vector, threshold, site)


Condition = Above | Below


def check_conditions(
    when: Condition | Sequence[Condition] | None, sites: Sequence[Site]
) -> tuple[Condition, ...]:
    """The conditions of an intervention at `sites`; `PlanError` if one cannot be known there."""
    given = () if when is None else (when,) if isinstance(when, Above | Below) else tuple(when)
    for one in given:
        if not isinstance(one, Above | Below):
            raise PlanError(f"got {type(one).__name__} as a condition; wanted pv.Above or pv.Below")
        for site in sites:
            if one.read_at(site) > site:
                raise PlanError(
                    f"got a condition on {one.vector.trait!r} at {one.site} for an intervention at "
                    f"{site}, which comes first; read it at {site} or before"
                )
            one.vector.direction(one.read_at(site))
        _check_layers(one, sites)
    return given


def _check_layers(one: Condition, sites: Sequence[Site]) -> None:
    if one.threshold.everywhere is not None:
        return
    wanted, got = {site.layer for site in sites}, {layer for layer, _ in one.threshold.by_layer}
    if wanted != got:
        raise PlanError(
            f"got a threshold for layers {sorted(got)}; its intervention acts at layers "
            f"{sorted(wanted)}: give one entry for each"
        )
