"""Confidence intervals of correlations and of shares."""

import math
from statistics import NormalDist
from typing import NamedTuple

from pvcore.errors import StatisticsError
from pvcore.numerals import Number


class Interval(NamedTuple):
    """Both ends of a confidence interval; NaN where there is none."""

    low: float
    high: float


UNKNOWN = Interval(math.nan, math.nan)


def quantile_of_normal(confidence: float) -> float:
    """How many standard errors to either side hold `confidence` of a normal distribution."""
    if not 0 < confidence < 1:
        raise StatisticsError(f"got a confidence of {confidence}; wanted a share such as 0.95")
    return NormalDist().inv_cdf((1 + confidence) / 2)


def fisher(r: float, count: Number, confidence: float = 0.95) -> Interval:
    """Fisher's interval of a Pearson r over `count` independent points; needs 4 of them.

    Points of unequal weight may count as a fraction. A pooled r within k groups of n points in all
    has `count = n - k + 1`. It is a point at r = 1 and r = -1, where the transform has no spread.
    """
    width = quantile_of_normal(confidence)
    if math.isnan(r) or count < 4:
        return UNKNOWN
    if abs(r) >= 1:
        return Interval(r, r)
    middle, reach = math.atanh(r), width / math.sqrt(count - 3)
    return Interval(math.tanh(middle - reach), math.tanh(middle + reach))


def wilson(hits: int, count: int, confidence: float = 0.95) -> Interval:
    """Wilson's interval of a share of `hits` among `count`, which holds near 0 and 1 too."""
    z = quantile_of_normal(confidence)
    if not 0 <= hits <= count or count == 0:
        raise StatisticsError(f"got {hits} hits among {count}; wanted 0 to {count} of at least 1")
    share = hits / count
    centre = share + z * z / (2 * count)
    reach = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    low, high = (centre - reach) / scale, (centre + reach) / scale
    # Rounding leaves dust where the ends are 0 and 1.
    return Interval(0.0 if hits == 0 else low, 1.0 if hits == count else high)
