"""Estimates: means over the rows of a data set, with an interval that a random subset allows."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from pvcore.numerals import Number

CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """The mean of one score over a data set: `n` of `of` rows have it. In units of the residual.

    `low` and `high` hold the mean over all rows with a confidence of 95 %. They are the mean itself
    where every row has the score, and NaN where fewer than two have it. `deviation` is that of the
    score among the rows that have it.

    The difference of a subset is `mean(response mean, all rows) - mean(own reply, n rows)`, not the
    mean of the n differences: what the data says is known of every row, also where a trait is rare
    and no row that has it was drawn, and only the model's own replies are sampled. The interval is
    Student's t by the deviation of the own replies' projections, for rows drawn without
    replacement. It takes rows without an own reply for rows that were not drawn.
    """

    mean: Number
    low: Number
    high: Number
    deviation: Number
    n: int
    of: int


class Running:
    """Count, mean and squared deviations of several columns, in float64; NaN is left out."""

    def __init__(self, columns: int) -> None:
        self.n = np.zeros(columns, dtype=np.int64)
        self._mean = np.zeros(columns)
        self._scatter = np.zeros(columns)
        self.rows = 0

    def add(self, values: NDArray[np.float64]) -> None:
        """Count rows `[row, column]` in (Chan's parallel update)."""
        self.rows += len(values)
        known = ~np.isnan(values)
        n = known.sum(axis=0)
        some = np.maximum(n, 1)
        mean = np.where(known, values, 0.0).sum(axis=0) / some
        scatter = np.where(known, (values - mean) ** 2, 0.0).sum(axis=0)
        total = np.maximum(self.n + n, 1)
        gap = mean - self._mean
        self._scatter += scatter + gap**2 * self.n * n / total
        self._mean += gap * n / total
        self.n += n

    def estimates(self) -> list[Estimate]:
        """One for each column."""
        return [self._estimate(column) for column in range(len(self.n))]

    def _estimate(self, column: int) -> Estimate:
        n, mean = int(self.n[column]), float(self._mean[column])
        nan = float("nan")
        deviation = float((self._scatter[column] / (n - 1)) ** 0.5) if n > 1 else nan
        reach = nan
        if n == self.rows:
            reach = 0.0
        elif n > 1:
            # Drawn without replacement: a subset of half the rows leaves half the doubt.
            left = 1 - n / self.rows
            reach = t_quantile((1 + CONFIDENCE) / 2, n - 1) * deviation * (left / n) ** 0.5
        mean = mean if n else nan
        return Estimate(
            mean=mean, low=mean - reach, high=mean + reach, deviation=deviation, n=n, of=self.rows
        )


def of_subset(response: Estimate, own: Estimate, difference: Estimate) -> Estimate:
    """The mean difference of a data set, whose own replies' mean alone was estimated.

    `response` is known of every row, `own` and `difference` of the rows drawn.
    """
    return replace(
        difference,
        mean=response.mean - own.mean,
        low=response.mean - own.high,
        high=response.mean - own.low,
    )


def t_quantile(share: float, freedom: int) -> float:
    """Student's t by the expansion of Fisher and Cornish; exact for 1 and 2 degrees of freedom."""
    z = NormalDist().inv_cdf(share)
    if freedom == 1:
        return float(np.tan(np.pi * (share - 0.5)))
    if freedom == 2:
        return float((2 * share - 1) * (2 / (1 - (2 * share - 1) ** 2)) ** 0.5)
    terms: Sequence[float] = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return float(z + sum(term / freedom**power for power, term in enumerate(terms, start=1)))
