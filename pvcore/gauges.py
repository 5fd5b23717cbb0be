"""Gauges: what conditions of later sites ask to have read at a site before them."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from pvcore.interventions import Intervention
from pvcore.sites import Site
from pvcore.spans import Span


@dataclass(frozen=True, slots=True, kw_only=True)
class Gauge:
    """A direction that conditions of later sites ask about, and the spans they act on."""

    direction: Float[Tensor, " d_model"]
    spans: tuple[Span | None, ...]


def place_of(direction: Tensor, directions: list[Tensor]) -> int:
    """Where a direction stands in the list, at whose end it is put if it is new."""
    known = [k for k, other in enumerate(directions) if torch.equal(other, direction)]
    if not known:
        directions.append(direction)
    return known[0] if known else len(directions) - 1


def gauges_at(interventions: Iterable[Intervention], site: Site) -> list[Gauge]:
    """What interventions at other sites ask to have read at this one, each direction once."""
    directions: list[Tensor] = []
    spans: list[tuple[Span | None, ...]] = []
    for one in interventions:
        for condition in one.when:
            if condition.site != site or one.sites == (site,):
                continue
            place = place_of(condition.vector.direction(site), directions)
            spans += [()] * (len(directions) - len(spans))
            spans[place] = (*spans[place], one.span)
    return [Gauge(direction=d, spans=s) for d, s in zip(directions, spans, strict=True)]
