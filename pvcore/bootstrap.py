"""Bootstrap without the data: weighted sums of pairs, one for each resample, as the pairs come by.

A resample of n pairs with replacement counts each pair a number of times that is close to a Poisson
variable of mean 1, independent of all others. So every pair is given such a number for each
resample when it comes by, drawn from the seed and the index of the pair alone, and nothing of it is
kept but its share in the sums: memory depends on the vectors and not on how many pairs there are.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor

COVERAGE = 0.95


@dataclass(frozen=True, slots=True, kw_only=True)
class Intervals:
    """How sure a vector is at each site.

    `low` to `high` holds the length of the resampled vector along the vector itself in 95% of
    resamples: it is linear in the data, so that noise does not lengthen it as it does a norm. In
    97.5% of resamples the cosine with the vector is at least `cosine_low`.
    """

    low: Float64[Tensor, " n_sites"]
    high: Float64[Tensor, " n_sites"]
    cosine_low: Float64[Tensor, " n_sites"]


class Resamples:
    """Running sums of `resamples` weighted copies of differences of pairs, in float64.

    Both rows of a pair share their weights, because both were kept or dropped together. `sums` is
    `[resample, site, d_model]`, `totals` the weight of all pairs in each resample.
    """

    def __init__(self, resamples: int, n_sites: int, d_model: int, *, seed: int) -> None:
        self._seed = seed
        self.sums = torch.zeros(resamples, n_sites, d_model, dtype=torch.float64)
        self.totals = torch.zeros(resamples, dtype=torch.float64)

    def add(
        self, rows: Float[Tensor, "n_sites row d_model"], pairs: list[int], positive: list[bool]
    ) -> None:
        """Count rows in, each the side of a pair; a negative side is subtracted."""
        if not len(self.totals):
            return
        weights = torch.stack([self.weights(pair) for pair in pairs], dim=1)
        signs = torch.tensor([1.0 if one else -1.0 for one in positive], dtype=torch.float64)
        self.totals += (weights * (signs > 0)).sum(1)
        flat = rows.to("cpu", torch.float64).transpose(0, 1).flatten(1)
        self.sums.flatten(1).addmm_(weights * signs, flat)

    def weights(self, pair: int) -> Float64[Tensor, " resample"]:
        """How often each resample holds a pair."""
        key = np.array([self._seed % 2**64, pair], dtype=np.uint64)
        drawn = np.random.Generator(np.random.Philox(key=key))
        return torch.from_numpy(drawn.poisson(1.0, len(self.totals)).astype(np.float64))

    def intervals(self, vector: Float64[Tensor, "n_sites d_model"]) -> Intervals:
        """What the resamples say about the vector that all pairs together give."""
        filled = self.totals > 0  # a resample of very few pairs may hold none of them
        means = self.sums[filled] / self.totals[filled][:, None, None]
        unit = vector / vector.norm(dim=-1, keepdim=True)
        along = torch.einsum("rsd,sd->rs", means, unit)
        outside = (1 - COVERAGE) / 2
        low, high = torch.quantile(
            along, torch.tensor([outside, 1 - outside], dtype=torch.float64), dim=0
        )
        cosines = along / means.norm(dim=-1)
        return Intervals(low=low, high=high, cosine_low=torch.quantile(cosines, outside, dim=0))
