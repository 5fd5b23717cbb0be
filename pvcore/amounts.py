"""Amounts: coefficients and bounds, one number for all, or one per row, per layer or both."""

import math
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass

from torch import Tensor

from pvcore.errors import PlanError

# Coefficients are float32: a larger one would be infinite there.
LARGEST = 3.4e38
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
        if value.is_meta:
            raise PlanError(f"got {name} on the meta device; wanted a tensor that holds numbers")
        if value.ndim > 1:
            raise PlanError(f"got {name} of shape {list(value.shape)}; wanted one number per row")
        value = value.tolist()
    if isinstance(value, Set):
        raise PlanError(f"got a set for {name}, whose order is nobody's; wanted a list")
    entries = list(value) if isinstance(value, Iterable) else [value]
    for entry in entries:
        if isinstance(entry, bool) or not isinstance(entry, int | float):
            raise PlanError(f"got {entry!r} in {name}; wanted numbers, one or one per row")
        if not math.isfinite(entry) or abs(entry) > LARGEST:
            raise PlanError(f"got {entry} in {name}; wanted finite numbers that float32 can hold")
    if not entries:
        raise PlanError(f"got no numbers for {name}; wanted one, or one per row of the batch")
    return tuple(map(float, entries)) if isinstance(value, Iterable) else float(entries[0])
