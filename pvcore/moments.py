"""Moments: running mean and variance of residuals, without keeping the residuals."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Moments:
    """Running count, mean and variance of rows, in float64; merging is exact up to rounding.

    Chan's parallel update: nothing but these three numbers per component is kept.
    """

    count: int
    mean: Float[Tensor, "*shape"]
    scatter: Float[Tensor, "*shape"]

    @classmethod
    def zeros(cls, shape: Sequence[int]) -> "Moments":
        zero = torch.zeros(tuple(shape), dtype=torch.float64)
        return cls(count=0, mean=zero, scatter=zero.clone())

    def add(self, rows: Float[Tensor, "rows ..."]) -> "Moments":
        """The moments with these rows counted in."""
        if not len(rows):
            return self
        exact = rows.to("cpu", torch.float64)
        mean = exact.mean(0)
        return self.merge(
            Moments(count=len(rows), mean=mean, scatter=(exact - mean).square().sum(0))
        )

    def merge(self, other: "Moments") -> "Moments":
        """The moments of both sets of rows together."""
        count = self.count + other.count
        if count == 0:
            return self
        gap = other.mean - self.mean
        return Moments(
            count=count,
            mean=self.mean + gap * (other.count / count),
            scatter=self.scatter
            + other.scatter
            + gap.square() * (self.count * other.count / count),
        )

    @property
    def variance(self) -> Float[Tensor, "*shape"]:
        """Population variance; NaN before the first row."""
        return self.scatter / self.count if self.count else torch.full_like(self.mean, torch.nan)
