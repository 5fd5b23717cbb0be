"""How far training moved a model, as one figure."""

from collections.abc import Mapping, Sequence

import numpy as np

from pvcore import canvas
from pvcore.numerals import Number
from pvcore.palette import MUTED, trait_colours
from pvcore.report import ReportError


def shift_over_steps(
    steps: Sequence[int], shifts: Mapping[str, Sequence[Number]], *, site: str
) -> str:
    """The shift on each trait's vector over the steps of a training, from zero at step 0 on.

    A step 0 that was measured is drawn as it is.
    """
    canvas.require(shifts, "traits")
    x = canvas.numbers(steps, "steps")
    if (np.diff(x) <= 0).any() or x[0] < 0:
        raise ReportError(f"got steps {list(steps)}; wanted them from 0 and in order")
    origin = [0.0] if x[0] > 0 else []
    with canvas.style():
        figure = canvas.panels(1, 1, width=canvas.WIDTH, height=360)
        axes = figure.axes[0]
        axes.set(xlabel="training step", ylabel=f"shift at {canvas.label(site)}")
        axes.set_xlim(0, max(float(x[-1]), 1.0) * 1.02)
        axes.axhline(0.0, color=MUTED.light, linestyle=(0, (3, 2)), linewidth=1.4)
        ends = []
        for trait, colour in trait_colours(shifts).items():
            y = canvas.numbers(shifts[trait], f"shifts of {trait}", len(x))
            axes.plot([*origin, *x], [*origin, *y], color=colour.light, marker="o")
            ends.append((float(x[-1]), float(y[-1]), trait, colour.light))
        canvas.end_labels(axes, ends)
        return canvas.svg(figure)
