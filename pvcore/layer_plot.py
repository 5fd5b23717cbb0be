"""How good a vector is at each layer, with what resampling leaves open, as one figure."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from pvcore import canvas
from pvcore.numerals import Number
from pvcore.palette import MUTED, Colour, trait_colours
from pvcore.report import ReportError


def quality_by_layer(
    layers: Sequence[int],
    *,
    trait: str,
    separation: Sequence[Number],
    interval: Sequence[tuple[Number, Number]],
    split_half: Sequence[Number],
    cosine_low: Sequence[Number],
) -> str:
    """Separation with its interval above, cosines below: of two halves, and the resamples' bound.

    NaN leaves an interval or a bound out.
    """
    canvas.require(layers, "layers")
    x = canvas.numbers(layers, "layers")
    if (np.diff(x) <= 0).any():
        raise ReportError(f"got layers {list(layers)}; wanted them in rising order")
    low, high = (
        canvas.numbers([pair[end] for pair in interval], "interval ends", len(x)) for end in (0, 1)
    )
    colour = trait_colours([trait])[trait]
    with canvas.style():
        figure = canvas.panels(2, 1, width=canvas.WIDTH, height=440, height_ratios=[1.3, 1.0])
        above, below = figure.axes
        y = canvas.numbers(separation, "separations", len(x))
        _draw(above, x, y, colour, "separation")
        above.fill_between(x, low, high, color=colour.light, alpha=0.2, linewidth=0)
        above.set_ylim(bottom=0)
        above.tick_params(labelbottom=False)
        middle = float((low[-1] + high[-1]) / 2)  # NaN, and so no label, without an interval
        canvas.end_labels(above, [(float(x[-1]), middle, "95% interval", colour.light)])
        halves = canvas.numbers(split_half, "split-half cosines", len(x))
        _draw_cosines(below, x, halves, canvas.numbers(cosine_low, "bounds", len(x)), colour)
        return canvas.svg(figure)


def _draw_cosines(
    axes: Axes,
    x: NDArray[np.float64],
    halves: NDArray[np.float64],
    bound: NDArray[np.float64],
    colour: Colour,
) -> None:
    _draw(axes, x, halves, colour, "cosine")
    axes.plot(x, bound, color=MUTED.light, linestyle=(0, (3, 2)), linewidth=1.6)
    lowest = min([0.9, *(float(one) for one in (*halves, *bound) if np.isfinite(one))])
    axes.set_ylim(lowest - 0.05 * (1 - lowest) - 0.01, 1.01)
    axes.set_xlabel("layer")
    ends = [
        (float(x[-1]), float(halves[-1]), "two halves", colour.light),
        (float(x[-1]), float(bound[-1]), "97.5% of resamples", MUTED.light),
    ]
    canvas.end_labels(axes, ends)


def _draw(
    axes: Axes, x: NDArray[np.float64], y: NDArray[np.float64], colour: Colour, name: str
) -> None:
    axes.plot(x, y, color=colour.light, marker="o")
    axes.set_ylabel(name)
    axes.set_xticks(x[:: max(1, len(x) // 16)])
    pad = 0.03 * (float(np.ptp(x)) or 1.0)
    axes.set_xlim(float(x[0]) - pad, float(x[-1]) + pad)
