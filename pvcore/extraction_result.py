"""What an extraction gives: vectors, the rollouts behind them, and how good they are by layer."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from pvcore.judge import Judgements
from pvcore.rollouts import Rollout, reasons_of
from pvcore.sites import Site
from pvcore.vectors import PersonaVector, Variant


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerQuality:
    """How good the vector is at one site.

    `separation` is its norm in units of the spread of replies around their side's mean.
    `split_half_cosine` compares the vectors of two halves of the kept pairs. `separation_interval`
    holds what 95% of resamples of the pairs give (measured along the vector), `cosine_low` is the
    cosine with the vector that 97.5% of them reach; NaN where nothing was resampled.
    """

    site: Site
    norm: float
    separation: float
    split_half_cosine: float
    separation_interval: tuple[float, float] = (math.nan, math.nan)
    cosine_low: float = math.nan


@dataclass(frozen=True, slots=True, kw_only=True)
class Extraction:
    """Vectors of one trait, and the rollouts they were made of.

    Rollouts are in one order of pairs, the positive replies first. A variant whose direction is
    zero somewhere, as that of the last prompt token before any block is, has no vector.
    """

    vectors: Mapping[Variant, PersonaVector]
    rollouts: tuple[Rollout, ...]
    judgements: Judgements

    @property
    def vector(self) -> PersonaVector:
        """The vector of replies: the one to steer and monitor with."""
        return self.vectors["response_mean"]

    @property
    def kept(self) -> int:
        """Rollouts that the means are taken over, half of them on each side."""
        return sum(not rollout.dropped for rollout in self.rollouts)

    @property
    def dropped(self) -> int:
        return len(self.rollouts) - self.kept

    @property
    def reasons(self) -> Mapping[str, int]:
        """How many rollouts were dropped for each reason."""
        return reasons_of(self.rollouts)

    @property
    def confidence(self) -> Float[Tensor, " n_sites"]:
        """Cosine between the vectors of two halves of the kept pairs, at each site."""
        return self.vector.statistics["split_half_cosine"]

    @property
    def layers(self) -> tuple[LayerQuality, ...]:
        """The quality of the vector at each of its sites."""
        return quality(self.vector)


def quality(vector: PersonaVector) -> tuple[LayerQuality, ...]:
    """How good an extracted vector is at each of its sites, by its own statistics."""
    held = vector.statistics
    unknown = [math.nan] * len(vector.sites)
    resampled = (
        held[name].tolist() if name in held else unknown
        for name in ("length_low", "length_high", "cosine_low")
    )
    columns = (vector.norms, held["reply_spread"], held["split_half_cosine"])
    return tuple(
        LayerQuality(
            site=site,
            norm=norm,
            separation=(separation := norm / spread if spread else math.inf),
            split_half_cosine=cosine,
            separation_interval=(separation * low, separation * high),
            cosine_low=cosine_low,
        )
        for site, norm, spread, cosine, low, high, cosine_low in zip(
            vector.sites, *(column.tolist() for column in columns), *resampled, strict=True
        )
    )
