"""Figures of records as SVG: what a way costs, and how near the kernels come to a device's roof.

Each is a function of a record and returns SVG text, or raises `Absent` with the reason why the
record cannot be drawn.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator

from benches import record
from benches.gpu_workload import LAYERS, Point
from benches.record import Cell, Record
from pvcore import canvas
from pvcore.numerals import TIMES
from pvcore.palette import ACCENT, INK, MUTED, POSITIVE, Colour, css_variables, ordered_colours

OPENING = re.compile(r"<svg\b[^>]*>")
POINT = re.compile(r"(?P<d>\d+) wide: (?P<op>[^/]+)/(?P<t>\d+) rows, (?P<k>\d+) vectors")
OPS = ("project", "steer and project")


class Absent(Exception):
    """Why there is no figure."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plot:
    """A figure, the record it is drawn from, and the words for those who do not see it."""

    source: str
    draw: Callable[[Record], str]
    says: str


def overhead(found: Record) -> str:
    """Decode time beside plain generation: a dot for each way and batch, p20 to p80 as a line."""
    by_batch = _decoding(found)
    rows = list(dict.fromkeys(row for cells in by_batch.values() for row in cells))
    colours = dict(zip(by_batch, (ACCENT, POSITIVE, MUTED, INK), strict=False))
    with canvas.style():
        figure = canvas.panels(1, 1, width=canvas.WIDTH, height=110 + 36 * len(rows))
        axes = figure.axes[0]
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_yticks(range(len(rows)), [_plain(row) for row in rows], color=INK.light)
        axes.grid(False, axis="y")
        axes.axvline(1.0, color=MUTED.light, linewidth=1.4)
        ends = [1.0]
        gap = 0.44 / max(len(by_batch), 1)
        for place, (batch, cells) in enumerate(by_batch.items()):
            shift = gap * (place - (len(by_batch) - 1) / 2)
            ends += _dots(axes, rows, cells, colours[batch], shift=shift, label=batch)
        margin = 0.06 * max(max(ends) - min(ends), 0.02)
        axes.set_xlim(min(ends) - margin, max(ends) + margin)
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:.2f}{TIMES}")
        axes.set_xlabel(f"decode time beside plain generation, 1{TIMES} is free; line: p20 to p80")
        axes.legend(
            loc="lower right",
            bbox_to_anchor=(1.0, 1.0),
            ncols=len(by_batch),
            labelcolor=INK.light,
            borderaxespad=0.2,
            handletextpad=0.2,
        )
        return _themed(canvas.svg(figure))


def _decoding(found: Record) -> dict[str, dict[str, Cell]]:
    """Measured decode figures beside plain generation, by batch and way."""
    by_batch: dict[str, dict[str, Cell]] = {}
    for label, cell in found.cells.items():
        batch, row, column = label.split("/")
        if column == "decoding" and batch.startswith("batch ") and cell.status == "measured":
            by_batch.setdefault(batch, {})[row] = cell
    if not by_batch:
        raise Absent(_reason(found))
    if len(by_batch) > 4:
        raise Absent("more batches than colours")
    return by_batch


def _dots(
    axes: Axes,
    rows: Sequence[str],
    cells: Mapping[str, Cell],
    colour: Colour,
    *,
    shift: float,
    label: str,
) -> list[float]:
    """Dots and whiskers of one batch; the figures drawn."""
    drawn: list[float] = []
    places, medians = [], []
    for row, cell in cells.items():
        assert cell.p20 is not None
        assert cell.p50 is not None
        assert cell.p80 is not None
        at = rows.index(row) + shift
        axes.plot([cell.p20, cell.p80], [at, at], color=colour.light, linewidth=1.8, alpha=0.55)
        places.append(at)
        medians.append(cell.p50)
        drawn += [cell.p20, cell.p80]
    axes.plot(medians, places, linestyle="none", marker="o", color=colour.light, label=label)
    return drawn


def roofline(found: Record) -> str:
    """Arithmetic done in a second against arithmetic a byte, below what the device can do at best.

    Drawn from a device's own record alone: a CPU's holds ratios, and no rate or time.
    """
    copy, product = (_ceiling(found, what) for what in ("a copy of 1 GiB", "a product of 8192"))
    points = _points(found)
    counts = sorted({point.t for _, point, _ in points})
    colours = dict(zip(counts, ordered_colours(len(counts)), strict=True))
    with canvas.style():
        figure = canvas.panels(1, len(OPS), width=canvas.WIDTH, height=420)
        for axes, op in zip(figure.axes, OPS, strict=True):
            mine = [(point, us) for name, point, us in points if name == op]
            for size, t in enumerate(counts):
                at = [_place(op, point, us) for point, us in mine if point.t == t]
                if at:
                    # Many rows hide few where both come near the roof: they are larger and below.
                    axes.plot(
                        *zip(*at, strict=True),
                        linestyle="none",
                        marker="o",
                        markersize=4.0 + 1.5 * size,
                        zorder=3.0 - 0.1 * size,
                        color=colours[t].light,
                        label=f"{t:,} row{'s' * (t > 1)}",
                    )
            _roof(axes, copy, product)
            axes.set_title(op)
        figure.axes[0].set_ylabel("TFLOP/s")
        figure.axes[-1].legend(
            loc="upper left", bbox_to_anchor=(1.0, 1.0), labelcolor=INK.light, handletextpad=0.2
        )
        figure.supxlabel("arithmetic intensity, FLOP a byte", color=MUTED.light, fontsize=12)
        return _themed(canvas.svg(figure))


def _ceiling(found: Record, what: str) -> float:
    cell = found.cells.get(f"this GPU/{what}/rate")
    if cell is None or cell.p50 is None:
        raise Absent(_reason(found))
    return cell.p50


def _points(found: Record) -> list[tuple[str, Point, float]]:
    """Op, shape and microseconds of every measured call of the two kernels."""
    points = []
    for label, cell in found.cells.items():
        known = POINT.match(label)
        if known and known["op"] in OPS and cell.p50 is not None:
            point = Point(int(known["t"]), int(known["k"]), int(known["d"]))
            points.append((known["op"], point, cell.p50))
    if not points:
        raise Absent(_reason(found))
    return points


def _place(op: str, point: Point, us: float) -> tuple[float, float]:
    """FLOP a byte, and TFLOP a second."""
    moved = point.read if op == OPS[0] else point.steered
    return point.flops / moved, point.flops / us / 1e6


def _roof(axes: Axes, copy: float, product: float) -> None:
    """What copying (GB/s) and multiplying (TFLOP/s) allow, drawn over what was measured."""
    axes.set_xscale("log")
    axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.set_minor_locator(NullLocator())
    low, high = axes.get_xlim()
    ridge = 1000 * product / copy
    x = np.array([low, min(max(ridge, low), high), high])
    axes.plot(x, np.minimum(x * copy / 1000, product), color=INK.light, linewidth=1.6, zorder=1)
    axes.set_xlim(low, high)
    axes.set_ylim(top=2.5 * product)
    axes.annotate(
        f"{product:.0f} TFLOP/s, {copy / 1000:.2f} TB/s",
        (high, product),
        xytext=(-2, 5),
        textcoords="offset points",
        color=MUTED.light,
        fontsize=11,
        ha="right",
    )


def _reason(found: Record) -> str:
    reasons = dict.fromkeys(cell.reason for cell in found.cells.values() if cell.reason)
    return ", ".join(["not measured", *list(reasons)[:1]])


def _plain(text: str) -> str:
    return canvas.label(text.replace("`", ""))


def _themed(svg: str) -> str:
    """The figure on a ground of its own, light or dark as the reader's system is."""
    ground = '<rect width="100%" height="100%" style="fill: var(--surface)"/>'
    return OPENING.sub(
        lambda opening: f"{opening[0]}\n <style>{css_variables()}</style>\n {ground}", svg, count=1
    )


PLOTS: Mapping[str, Plot] = {
    "overhead": Plot(
        source="overhead",
        draw=overhead,
        says="Decode time of each way beside plain generation, by batch",
    ),
    "roofline": Plot(
        source="gpu_kernels",
        draw=roofline,
        says=f"Kernels below the roofline of the device they ran on, {LAYERS} layers' shapes",
    ),
}


def drawn(name: str, results: Path) -> str:
    """The SVG of a figure from the records in a folder; `Absent` with the reason."""
    plot = PLOTS[name]
    path = results / f"{plot.source}.json"
    if not path.exists():
        raise Absent("not measured")
    return plot.draw(record.read(path))
