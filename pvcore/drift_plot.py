"""How far a conversation drifts along traits: every token, and the mean of every reply."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes

from pvcore import canvas
from pvcore.numerals import Number, number
from pvcore.palette import ACCENT, GRID, Colour, trait_colours
from pvcore.report import ReportError


def conversation_drift(
    replies: Mapping[str, Sequence[Sequence[Number]]],
    *,
    site: str,
    levels: Mapping[str, Number] | None = None,
) -> str:
    """Projections of a conversation's replies, for each trait one row of numbers a reply.

    Thin lines are tokens, heavy ones the means of the replies; `levels` are alarm levels.
    """
    canvas.require(replies, "traits")
    lengths = [len(row) for row in next(iter(replies.values()))]
    canvas.require(lengths, "replies")
    if any([len(row) for row in rows] != lengths for rows in replies.values()):
        raise ReportError("got replies of different lengths by trait; wanted one value a token")
    starts = [sum(lengths[:count]) for count in range(len(lengths) + 1)]
    with canvas.style():
        figure = canvas.panels(1, 1, width=canvas.WIDTH, height=360)
        axes = figure.axes[0]
        axes.set(xlabel="token of the assistant", ylabel=f"projection at {canvas.label(site)}")
        axes.set_xlim(-0.5, float(starts[-1]) - 0.5)
        for border in starts[1:-1]:
            axes.axvline(border - 0.5, color=GRID.light, linewidth=1.6)
        ends = []
        for trait, colour in trait_colours(replies).items():
            last = _trait(axes, trait, replies[trait], starts, colour)
            ends.append((float(starts[-1]) - 0.5, last, trait, colour.light))
        for trait, level in (levels or {}).items():
            axes.axhline(level, color=ACCENT.light, linestyle=(0, (4, 3)), linewidth=1.2)
            text = f"{trait}: alarm {number(level)}"
            ends.append((float(starts[-1]) - 0.5, float(level), text, ACCENT.light))
        canvas.end_labels(axes, ends)
        return canvas.svg(figure)


def _trait(
    axes: Axes, trait: str, rows: Sequence[Sequence[Number]], starts: Sequence[int], colour: Colour
) -> float:
    """Draw one trait's replies; the mean of the last that is known."""
    values = [canvas.numbers(row, f"projections of {trait}") for row in rows]
    axes.plot(np.concatenate(values), color=colour.light, linewidth=1.0, alpha=0.35)
    last = float("nan")
    for row, start in zip(values, starts, strict=False):
        known = row[np.isfinite(row)]
        if known.size:
            last = float(known.mean())
            reach = [start - 0.5, start + len(row) - 0.5]
            axes.plot(reach, [last, last], color=colour.light, linewidth=2.8)
    return last
