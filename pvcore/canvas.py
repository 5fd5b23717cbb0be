"""Matplotlib figures as themed, reproducible SVG text, without pyplot and its global state."""

import io
import re
import threading
import warnings
from collections.abc import Iterator, Sequence, Sized
from contextlib import contextmanager

import numpy as np
from matplotlib import style as matplotlib_style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from pvcore.numerals import Number
from pvcore.palette import GRID, INK, MUTED, PALETTE, SURFACE
from pvcore.report import ReportError

WIDTH = 860  # CSS pixels: the width of a report's column
POINTS_PER_INCH = 72  # an SVG user unit is a point, shown as one CSS pixel
LABEL_GAP = 15.0  # CSS pixels between the middles of two labels

_STYLE = {
    "svg.hashsalt": "pvcore",
    "svg.fonttype": "none",
    "text.parse_math": False,
    "text.color": INK.light,
    "font.size": 12.0,
    "axes.titlesize": 13.0,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10.0,
    "axes.labelcolor": MUTED.light,
    "axes.labelsize": 12.0,
    "axes.edgecolor": GRID.light,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.unicode_minus": True,
    "grid.color": GRID.light,
    "grid.linewidth": 1.0,
    "xtick.color": MUTED.light,
    "ytick.color": MUTED.light,
    "xtick.major.size": 0.0,
    "ytick.major.size": 0.0,
    "lines.linewidth": 2.2,
    "lines.markersize": 5.5,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
}
_STYLE_LOCK = threading.Lock()  # matplotlib's settings belong to the process, not to the thread
_PAINT = re.compile(r"\b(fill|stroke): ?(#[0-9a-f]{6})\b")
_FONT_FAMILY = re.compile(r"(?<=px )(?:'[^'\"]*'|[\w -]+)(?:, *(?:'[^'\"]*'|[\w -]+))*(?=[;\"])")
_VARIABLE = {colour.light: colour.css for colour in PALETTE}


@contextmanager
def style() -> Iterator[None]:
    """Matplotlib's defaults with pvcore's look; the caller's settings return on leaving."""
    with _STYLE_LOCK, matplotlib_style.context(["default", _STYLE]):
        yield


def panels(
    rows: int,
    columns: int,
    *,
    width: int,
    height: int,
    height_ratios: Sequence[float] | None = None,
) -> Figure:
    """A transparent figure, in CSS pixels, with `rows x columns` axes; a row shares its y axis."""
    figure = Figure(
        figsize=(width / POINTS_PER_INCH, height / POINTS_PER_INCH),
        facecolor="none",
        layout="constrained",
    )
    figure.subplots(rows, columns, squeeze=False, sharey="row", height_ratios=height_ratios)
    for axes in figure.axes:
        axes.set_facecolor("none")
    return figure


def svg(figure: Figure) -> str:
    """The figure as one SVG document; equal data give equal text.

    Text stays text, and the palette's colours become CSS variables, so that a page's font and
    theme reach into the figure.
    """
    sheet = io.StringIO()
    with warnings.catch_warnings():
        # The reader's browser brings the glyphs; matplotlib's own font only sizes the layout.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        undated = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(sheet, format="svg", metadata=undated)
    themed = _PAINT.sub(
        lambda paint: f"{paint[1]}: {_VARIABLE.get(paint[2], paint[2])}", sheet.getvalue()
    )
    return _FONT_FAMILY.sub("var(--font, sans-serif)", themed)


def label(text: str) -> str:
    """The text as one printable line: what XML forbids becomes a replacement character."""
    marked = text.replace("\n", "↵").replace("\t", "⇥")
    return "".join(sign if sign.isprintable() else "\N{REPLACEMENT CHARACTER}" for sign in marked)


def end_labels(axes: Axes, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Write `(x, y, text, colour)` right of line ends, moved up or down until none overlap.

    Ends at a NaN get no label. Call it when the axes have their final limits.
    """
    figure = axes.get_figure(root=True)
    assert figure is not None, "axes are made by panels()"
    low, high = axes.get_ylim()
    pixels = figure.get_size_inches()[1] * POINTS_PER_INCH * axes.get_position().height
    per_pixel = (high - low) / pixels
    shown = sorted((end for end in ends if np.isfinite(end[1])), key=lambda end: end[1])
    heights = spread([y / per_pixel for _, y, _, _ in shown], LABEL_GAP)
    for (x, y, text, colour), at in zip(shown, heights, strict=True):
        axes.annotate(
            label(text),
            (x, y),
            xytext=(8, at - y / per_pixel),
            textcoords="offset points",
            color=colour,
            va="center",
            annotation_clip=False,
            bbox={"facecolor": SURFACE.light, "alpha": 0.8, "linewidth": 0, "pad": 1},
        )


def spread(positions: Sequence[float], gap: float) -> list[float]:
    """Ascending positions moved as little as needed to lie `gap` apart (least squares)."""
    groups: list[list[float]] = []
    for index, position in enumerate(positions):
        groups.append([position - index * gap, 1.0])
        while len(groups) > 1 and groups[-2][0] > groups[-1][0]:
            mean, count = groups.pop()
            before, weight = groups[-1]
            groups[-1] = [(before * weight + mean * count) / (weight + count), weight + count]
    levels = [mean for mean, count in groups for _ in range(int(count))]
    return [level + index * gap for index, level in enumerate(levels)]


def numbers(values: Sequence[Number], what: str, length: int | None = None) -> NDArray[np.float64]:
    """One row of numbers to draw, of `length` where that is given; NaN is a gap."""
    row = np.asarray(values, dtype=np.float64)
    if row.ndim != 1 or not row.size:
        raise ReportError(f"got {what} of shape {row.shape}; wanted one row of numbers")
    if length is not None and len(row) != length:
        raise ReportError(f"got {len(row)} {what}; wanted {length}, one for each position")
    if np.isinf(row).any():
        raise ReportError(f"got infinite {what}; wanted finite numbers, or NaN for a gap")
    return row


def require(things: Sized, what: str) -> None:
    """Refuse a figure that would show nothing."""
    if not len(things):
        raise ReportError(f"got no {what}; wanted at least one: leave the figure out instead")
