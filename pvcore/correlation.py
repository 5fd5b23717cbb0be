"""Do projections foretell scores? Pearson's r over all replies and within a prompt level."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pvcore.numerals import Number


@dataclass(frozen=True, slots=True, kw_only=True)
class MonitoredReply:
    """A projection at the last prompt token, the score of the reply, and its prompt's level."""

    projection: Number
    score: Number
    level: int | str


@dataclass(frozen=True, slots=True, kw_only=True)
class Correlations:
    """Pearson's r over all replies, and with each level's means subtracted; NaN: undefined."""

    overall: float
    within: float


def correlations(replies: Sequence[MonitoredReply]) -> Correlations:
    """How well projections foretell scores; replies with a NaN are left out.

    The difference between levels makes `overall` high even where single replies are not foretold:
    `within` pools the replies after subtracting the means of their level.
    """
    known = [reply for reply in replies if np.isfinite([reply.projection, reply.score]).all()]
    projections = np.array([reply.projection for reply in known], dtype=np.float64)
    scores = np.array([reply.score for reply in known], dtype=np.float64)
    centred_projections, centred_scores = projections.copy(), scores.copy()
    for level in dict.fromkeys(reply.level for reply in known):
        rows = np.flatnonzero([reply.level == level for reply in known])
        centred_projections[rows] -= projections[rows].mean()
        centred_scores[rows] -= scores[rows].mean()
    return Correlations(
        overall=_pearson(projections, scores),
        within=_pearson(centred_projections, centred_scores),
    )


def _pearson(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    if len(x) < 2:
        return float("nan")
    dx, dy = x - x.mean(), y - y.mean()
    # Rounding leaves dust where all values are equal: a spread below it is no spread.
    flat = any(
        float(np.abs(d).max()) <= 1e-12 * float(np.abs(v).max() + 1) for d, v in ((dx, x), (dy, y))
    )
    return float("nan") if flat else float(dx @ dy / np.sqrt((dx @ dx) * (dy @ dy)))
