"""Figures of flagged data: where the scores of each source lie."""

from collections.abc import Mapping, Sequence

import numpy as np

from pvcore import canvas
from pvcore.numerals import Number
from pvcore.palette import ordered_colours, trait_colours
from pvcore.report import ReportError

MOST_SOURCES = 8


def score_histogram(
    edges: Sequence[Number], counts: Mapping[str, Sequence[int]], *, trait: str, score: str
) -> str:
    """The share of each source's rows by score; one line a source.

    `counts[source][b]` rows lie between `edges[b]` and `edges[b + 1]`.
    """
    canvas.require(counts, "sources")
    if len(counts) > MOST_SOURCES:
        raise ReportError(f"got {len(counts)} sources; wanted at most {MOST_SOURCES} in one figure")
    bounds = canvas.numbers(edges, "edges")
    with canvas.style():
        figure = canvas.panels(1, 1, width=canvas.WIDTH, height=260)
        axes = figure.axes[0]
        axes.set(xlabel=canvas.label(score), ylabel="share of rows")
        axes.set_title(canvas.label(trait), color=trait_colours([trait])[trait].light)
        for (name, row), colour in zip(counts.items(), ordered_colours(len(counts)), strict=True):
            heights = canvas.numbers(row, f"counts of {name}", len(bounds) - 1)
            share = heights / max(float(heights.sum()), 1.0)
            axes.stairs(share, bounds, color=colour.light, linewidth=2.0, label=source_label(name))
            axes.stairs(share, bounds, color=colour.light, alpha=0.12, fill=True)
        axes.set_xlim(float(bounds[0]), float(bounds[-1]))
        axes.set_ylim(bottom=0)
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), title="source", handlelength=1.2)
        return canvas.svg(figure)


def source_label(name: str) -> str:
    """A source as the legend names it: of a long name both ends, which tell folder and file."""
    shown = canvas.label(name if len(name) < 40 else f"{name[:16]}…{name[-22:]}")
    # matplotlib leaves out what begins with an underscore.
    return f" {shown}" if shown.startswith("_") else shown


def histogram_edges(low: Number, high: Number, bins: int = 48) -> list[float]:
    """Equal bins from the lowest to the highest score; a little room where all are one."""
    reach = float(high) - float(low) or max(abs(float(high)), 1.0) * 1e-3
    return [float(edge) for edge in np.linspace(low, low + reach, bins + 1)]
