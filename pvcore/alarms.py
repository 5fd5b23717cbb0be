"""Alarms: projections that cross a threshold, told once for each crossing."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from pvcore.errors import PlanError
from pvcore.numerals import Number
from pvcore.sites import Site, as_sites


@dataclass(frozen=True, slots=True, kw_only=True)
class Alarm:
    """A projection that rose above its threshold at this step.

    `chat` counts the returned sequences, `step` the tokens of the reply: the position that
    produced token `step` crossed. In a transcript `message` is the reply; None while it is made.
    """

    trait: str
    site: Site
    chat: int
    step: int
    value: float
    threshold: float
    message: int | None = None


@dataclass(frozen=True, slots=True)
class Threshold:
    """An alarm level with hysteresis, in units of the residual.

    It rings when the projection rises above `high`, and again only after it has come down to
    `low` or less; without `low` that is `high` itself.
    """

    high: Number
    low: Number | None = None

    def __post_init__(self) -> None:
        for value in (self.high, self.high if self.low is None else self.low):
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise PlanError(f"got {value!r} as a threshold; wanted a number")
            if not math.isfinite(value):
                raise PlanError(f"got {value} as a threshold; wanted a finite number")
        if self.low is not None and self.low > self.high:
            raise PlanError(
                f"got a threshold that falls silent at {self.low} and rings above {self.high}; "
                "wanted low at or below high"
            )

    @property
    def floor(self) -> Number:
        """At or below this it is ready to ring again."""
        return self.high if self.low is None else self.low


Level = Threshold | Number
# By trait: one for all layers, or one for each layer that is to ring.
Alarms = Mapping[str, Level | Mapping[int | Site, Level]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """The levels of every trait of a bank as tables; infinite where nothing is to ring."""

    high: Float[Tensor, "layer n_vec"]
    floor: Float[Tensor, "layer n_vec"]


class AlarmBell:
    """Rings once when a projection crosses its threshold from below.

    `PlanError` for traits and layers that the bank does not watch.
    """

    def __init__(self, alarms: "Alarms", traits: Sequence[str], sites: Sequence[Site]) -> None:
        unknown = sorted(set(alarms) - set(traits))
        if unknown:
            raise PlanError(
                f"got an alarm for {', '.join(unknown)}; the bank watches {', '.join(traits)}"
            )
        self.traits, self._sites = tuple(traits), tuple(sites)
        self._levels = {trait: self._by_site(trait, level) for trait, level in alarms.items()}
        self._high = {trait: self._bounds(levels, "high") for trait, levels in self._levels.items()}
        self._floor = {
            trait: self._bounds(levels, "floor") for trait, levels in self._levels.items()
        }
        self._rung: dict[str, Bool[Tensor, "layer chat"]] = {}

    def __bool__(self) -> bool:
        return bool(self._levels)

    def _by_site(self, trait: str, level: object) -> list[Threshold | None]:
        if not isinstance(level, Mapping):
            return [_threshold(level)] * len(self._sites)
        chosen = {as_sites([site])[0]: _threshold(one) for site, one in level.items()}
        missing = [str(site) for site in chosen if site not in self._sites]
        if missing or not chosen:
            raise PlanError(
                f"got an alarm for {trait} at {', '.join(missing) or 'no site'}; the bank watches "
                f"{', '.join(map(str, self._sites))}"
            )
        return [chosen.get(site) for site in self._sites]

    def _bounds(self, levels: Sequence[Threshold | None], name: str) -> Float[Tensor, "layer 1"]:
        """One bound a layer; a layer without never rings."""
        bounds = [torch.inf if one is None else float(getattr(one, name)) for one in levels]
        # On the CPU, whatever the default device is.
        return torch.tensor(bounds, dtype=torch.float64, device="cpu")[:, None]

    def ring(
        self, step: int, projections: Mapping[str, Float[Tensor, "layer chat"]]
    ) -> tuple[Alarm, ...]:
        """The alarms of one step, in the order of alarms, layers and chats; NaN changes nothing."""
        alarms = []
        for trait in self._levels:
            scores = projections[trait].double()
            rung = self._rung.get(trait, torch.zeros_like(scores, dtype=torch.bool))
            ringing = (scores > self._high[trait]) & ~rung
            self._rung[trait] = (rung | ringing) & ~(scores <= self._floor[trait])
            alarms += [
                self._alarm(step, trait, layer, chat, float(projections[trait][layer, chat]))
                for layer, chat in ringing.nonzero().tolist()
            ]
        return tuple(alarms)

    def _alarm(self, step: int, trait: str, layer: int, chat: int, value: float) -> Alarm:
        threshold = self._levels[trait][layer]
        assert threshold is not None
        return Alarm(
            trait=trait,
            site=self._sites[layer],
            chat=chat,
            step=step,
            value=value,
            threshold=float(threshold.high),
        )

    def told(
        self,
        step: int,
        ringing: Bool[Tensor, "layer chat n_vec"],
        scores: Float[Tensor, "layer chat n_vec"],
    ) -> tuple[Alarm, ...]:
        """The alarms of a step that was judged elsewhere, in the order of `ring`."""
        places = [self.traits.index(trait) for trait in self._levels]
        return tuple(
            self._alarm(
                step, self.traits[places[k]], layer, chat, float(scores[layer, chat, places[k]])
            )
            for k, layer, chat in ringing.permute(2, 0, 1)[places].nonzero().tolist()
        )

    def bounds(self) -> Bounds:
        """Above and at or below what it acts, for one who judges elsewhere."""
        never = self._bounds([None] * len(self._sites), "high")
        high, floor = (
            torch.cat([table.get(trait, never) for trait in self.traits], dim=1)
            for table in (self._high, self._floor)
        )
        return Bounds(high=high, floor=floor)

    def rung(self, chats: int) -> Bool[Tensor, "layer chat n_vec"]:
        """What has rung and is not ready again, of so many chats."""
        quiet = torch.zeros(len(self._sites), chats, dtype=torch.bool, device="cpu")
        return torch.stack([self._rung.get(trait, quiet) for trait in self.traits], dim=-1)

    def replay(self, course: Mapping[str, Float[Tensor, "layer step"]]) -> tuple[Alarm, ...]:
        """The alarms of one whole reply, begun anew, as if it had just been made."""
        self._rung = {}
        crossed = [
            (course[trait].double() > high).any(0).nonzero() for trait, high in self._high.items()
        ]
        steps = next(iter(course.values())).shape[-1]
        # Before the first crossing a bell is silent, and most replies have none.
        first = min((int(one[0]) for one in crossed if len(one)), default=steps)
        alarms: list[Alarm] = []
        for step in range(first, steps):
            now = {trait: scores[:, step, None] for trait, scores in course.items()}
            alarms += self.ring(step, now)
        return tuple(alarms)


def _threshold(level: object) -> Threshold:
    return level if isinstance(level, Threshold) else Threshold(level)  # type: ignore[arg-type]
