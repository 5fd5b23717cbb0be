"""Interventions: what to do to the residual stream along persona vectors. Plain frozen data."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from pvcore.amounts import Amount, Setting
from pvcore.conditions import Condition, check_conditions
from pvcore.errors import PlanError
from pvcore.sites import Site
from pvcore.spans import Span, check_span
from pvcore.vectors import PersonaVector, VectorBank


class _Aimed:
    """What all interventions share: vectors, sites, a span and conditions, checked when made."""

    __slots__ = ()
    vectors: tuple[PersonaVector, ...]
    sites: tuple[Site, ...]
    span: Span | None
    when: tuple[Condition, ...]

    def _aim(
        self,
        vectors: PersonaVector | Sequence[PersonaVector],
        layers: Iterable[int | Site] | None,
        span: str | None,
        when: Condition | Sequence[Condition] | None,
    ) -> None:
        bank = VectorBank(vectors, layers=layers)
        object.__setattr__(self, "vectors", tuple(bank.vectors))
        object.__setattr__(self, "sites", bank.sites)
        object.__setattr__(self, "span", None if span is None else check_span(span))
        object.__setattr__(self, "when", check_conditions(when, bank.sites))

    @property
    def _row_counts_of_conditions(self) -> set[int]:
        return set().union(*(one.threshold.row_counts for one in self.when))

    def _check_layers(self, amount: Amount, name: str) -> None:
        if amount.everywhere is not None:
            return
        wanted, got = {site.layer for site in self.sites}, {layer for layer, _ in amount.by_layer}
        if wanted != got:
            raise PlanError(
                f"got {name} for layers {sorted(got)}; this intervention acts at layers "
                f"{sorted(wanted)}: give one entry for each"
            )

    def directions(self, site: Site) -> Float[Tensor, "n_vec d_model"]:
        """The raw vectors at one site."""
        return torch.stack([vector.direction(site) for vector in self.vectors])


@dataclass(frozen=True, slots=True, init=False)
class Add(_Aimed):
    """Add `coeff` times the raw vectors: `h + coeff * v` (paper, section 3.2).

    `coeff` is a number, one per row of the batch, or a mapping from layer to either. `layers` are
    block numbers (their outputs) or sites, by default all sites of the vectors. `span` None means
    `response` while generating and `all` in every other forward. `when` is a condition, or several
    that must all hold: tokens that fail it stay as they are.
    """

    vectors: tuple[PersonaVector, ...]
    sites: tuple[Site, ...]
    span: Span | None
    when: tuple[Condition, ...]
    coeff: Amount

    def __init__(
        self,
        vectors: PersonaVector | Sequence[PersonaVector],
        *,
        coeff: Setting,
        layers: Iterable[int | Site] | None = None,
        span: Span | str | None = None,
        when: Condition | Sequence[Condition] | None = None,
    ) -> None:
        self._aim(vectors, layers, span, when)
        object.__setattr__(self, "coeff", Amount.of(coeff, "coeff"))
        self._check_layers(self.coeff, "coeff")

    @property
    def row_counts(self) -> set[int]:
        return self.coeff.row_counts | self._row_counts_of_conditions


@dataclass(frozen=True, slots=True, init=False)
class Ablate(_Aimed):
    """Send the projections on all its vectors to zero, jointly: no order among them matters.

    `layers`, `span` and `when` are those of `Add`.
    """

    vectors: tuple[PersonaVector, ...]
    sites: tuple[Site, ...]
    span: Span | None
    when: tuple[Condition, ...]

    def __init__(
        self,
        vectors: PersonaVector | Sequence[PersonaVector],
        *,
        layers: Iterable[int | Site] | None = None,
        span: Span | str | None = None,
        when: Condition | Sequence[Condition] | None = None,
    ) -> None:
        self._aim(vectors, layers, span, when)

    @property
    def row_counts(self) -> set[int]:
        return self._row_counts_of_conditions


@dataclass(frozen=True, slots=True, init=False)
class Cap(_Aimed):
    """Hold the projections on its vectors within `[min, max]`, jointly (activation capping).

    Bounds are in units of the residual, `<h, v/|v|>`; each is a number, one per row, or a mapping
    from layer to either. `layers`, `span` and `when` are those of `Add`.
    """

    vectors: tuple[PersonaVector, ...]
    sites: tuple[Site, ...]
    span: Span | None
    when: tuple[Condition, ...]
    min: Amount | None
    max: Amount | None

    def __init__(
        self,
        vectors: PersonaVector | Sequence[PersonaVector],
        *,
        min: Setting | None = None,
        max: Setting | None = None,
        layers: Iterable[int | Site] | None = None,
        span: Span | str | None = None,
        when: Condition | Sequence[Condition] | None = None,
    ) -> None:
        self._aim(vectors, layers, span, when)
        if min is None and max is None:
            raise PlanError("got a Cap without bounds; give max=, min= or both")
        for name, value in (("min", min), ("max", max)):
            amount = None if value is None else Amount.of(value, name)
            object.__setattr__(self, name, amount)
            if amount is not None:
                self._check_layers(amount, name)
        self._check_order()

    def _check_order(self) -> None:
        if self.min is None or self.max is None:
            return
        for site in self.sites:
            low, high = (torch.tensor(amount.at(site.layer)) for amount in (self.min, self.max))
            if low.ndim and high.ndim and len(low) != len(high):
                raise PlanError(f"got {len(low)} values of min and {len(high)} of max at {site}")
            if bool((low > high).any()):
                raise PlanError(f"got a Cap whose min is above its max at {site}; swap them")

    @property
    def row_counts(self) -> set[int]:
        bounds = [amount for amount in (self.min, self.max) if amount is not None]
        return self._row_counts_of_conditions.union(*(one.row_counts for one in bounds))


Intervention = Add | Ablate | Cap


def sites_of(interventions: Iterable[Intervention]) -> tuple[Site, ...]:
    """Every site the interventions act at or ask about, in the order a forward reaches them."""
    sites: set[Site] = set()
    for one in interventions:
        sites |= {*one.sites, *(c.site for c in one.when if c.site is not None)}
    return tuple(sorted(sites))
