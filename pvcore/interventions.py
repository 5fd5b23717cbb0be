"""Interventions: what to do to the residual stream along persona vectors. Plain frozen data."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from pvcore.errors import PlanError
from pvcore.sites import Site
from pvcore.spans import Span, check_span
from pvcore.vectors import PersonaVector, VectorBank

Number = int | float
PerRow = Number | Sequence[Number] | Tensor
Setting = PerRow | Mapping[int, PerRow]
Rows = float | tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Amount:
    """A checked number per row and layer: one for all layers, or one entry per layer."""

    everywhere: Rows | None
    by_layer: tuple[tuple[int, Rows], ...] = ()

    def at(self, layer: int) -> Rows:
        if self.everywhere is not None:
            return self.everywhere
        return dict(self.by_layer)[layer]

    @property
    def row_counts(self) -> set[int]:
        """Lengths of all per-row entries; scalars have none."""
        entries = [self.everywhere, *(rows for _, rows in self.by_layer)]
        return {len(rows) for rows in entries if isinstance(rows, tuple)}

    @classmethod
    def of(cls, value: Setting, name: str) -> "Amount":
        if not isinstance(value, Mapping):
            return cls(_rows(value, name))
        if not value:
            raise PlanError(f"got an empty mapping for {name}; wanted a number for each layer")
        return cls(None, tuple((_layer(k, name), _rows(v, name)) for k, v in value.items()))


def _layer(key: object, name: str) -> int:
    if isinstance(key, bool) or not isinstance(key, int) or key < 0:
        raise PlanError(f"got layer {key!r} as a key of {name}; wanted a block number from 0")
    return key


def _rows(value: PerRow, name: str) -> Rows:
    """One float, or a tuple of one float per row; `PlanError` for anything not finite."""
    if isinstance(value, Tensor):
        if value.requires_grad:
            raise PlanError(
                f"got {name} as a tensor that requires grad; interventions do not differentiate "
                f"through {name}: pass {name}.detach(), or patch in model.trace(...)"
            )
        if value.ndim > 1:
            raise PlanError(f"got {name} of shape {list(value.shape)}; wanted one number per row")
        value = value.tolist()
    entries = list(value) if isinstance(value, Iterable) else [value]
    for entry in entries:
        if isinstance(entry, bool) or not isinstance(entry, int | float):
            raise PlanError(f"got {entry!r} in {name}; wanted numbers, one or one per row")
        if not math.isfinite(entry):
            raise PlanError(f"got {entry} in {name}; wanted finite numbers")
    if not entries:
        raise PlanError(f"got no numbers for {name}; wanted one, or one per row of the batch")
    return tuple(map(float, entries)) if isinstance(value, Iterable) else float(entries[0])


class _Aimed:
    """What all interventions share: vectors, sites and a span, checked on construction."""

    __slots__ = ()
    vectors: tuple[PersonaVector, ...]
    sites: tuple[Site, ...]
    span: Span | None

    def _aim(
        self,
        vectors: PersonaVector | Sequence[PersonaVector],
        layers: Iterable[int | Site] | None,
        span: str | None,
    ) -> None:
        bank = VectorBank(vectors, layers=layers)
        object.__setattr__(self, "vectors", tuple(bank.vectors))
        object.__setattr__(self, "sites", bank.sites)
        object.__setattr__(self, "span", None if span is None else check_span(span))

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
    `response` while generating and `all` in every other forward.
    """

    vectors: tuple[PersonaVector, ...]
    sites: tuple[Site, ...]
    span: Span | None
    coeff: Amount

    def __init__(
        self,
        vectors: PersonaVector | Sequence[PersonaVector],
        *,
        coeff: Setting,
        layers: Iterable[int | Site] | None = None,
        span: Span | str | None = None,
    ) -> None:
        self._aim(vectors, layers, span)
        object.__setattr__(self, "coeff", Amount.of(coeff, "coeff"))
        self._check_layers(self.coeff, "coeff")

    @property
    def row_counts(self) -> set[int]:
        return self.coeff.row_counts


@dataclass(frozen=True, slots=True, init=False)
class Ablate(_Aimed):
    """Send the projections on all its vectors to zero, jointly: no order among them matters."""

    vectors: tuple[PersonaVector, ...]
    sites: tuple[Site, ...]
    span: Span | None

    def __init__(
        self,
        vectors: PersonaVector | Sequence[PersonaVector],
        *,
        layers: Iterable[int | Site] | None = None,
        span: Span | str | None = None,
    ) -> None:
        self._aim(vectors, layers, span)

    @property
    def row_counts(self) -> set[int]:
        return set()


@dataclass(frozen=True, slots=True, init=False)
class Cap(_Aimed):
    """Hold the projections on its vectors within `[min, max]`, jointly (activation capping).

    Bounds are in units of the residual, `<h, v/|v|>`; each is a number, one per row, or a mapping
    from layer to either.
    """

    vectors: tuple[PersonaVector, ...]
    sites: tuple[Site, ...]
    span: Span | None
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
    ) -> None:
        self._aim(vectors, layers, span)
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
        return set().union(*(amount.row_counts for amount in bounds))


Intervention = Add | Ablate | Cap


def sites_of(interventions: Iterable[Intervention]) -> tuple[Site, ...]:
    """Every site any of the interventions acts at, in the order a forward reaches them."""
    return tuple(sorted({site for one in interventions for site in one.sites}))
