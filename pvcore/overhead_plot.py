"""What reading and steering cost beside plain generation, as one figure."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from matplotlib.axes import Axes

from pvcore import canvas
from pvcore.numerals import TIMES, Number
from pvcore.palette import ACCENT, BAD, INK, MUTED

Status = Literal["measured", "unsupported", "failed", "not measured"]


@dataclass(frozen=True, slots=True, kw_only=True)
class OverheadRow:
    """A ratio to plain generation (1 is free), or the reason why there is none."""

    label: str
    p50: Number = float("nan")
    p20: Number = float("nan")
    p80: Number = float("nan")
    status: Status = "measured"


def overhead_bars(rows: Sequence[OverheadRow], *, bound: Number | None = None) -> str:
    """Median ratio to plain generation from 1 upwards, with p20 to p80 whiskers."""
    canvas.require(rows, "overhead rows")
    measured = [row for row in rows if row.status == "measured"]
    ratios = [1.0, *(ratio for row in measured for ratio in (row.p20, row.p50, row.p80))]
    drawn = canvas.numbers([*ratios, *([] if bound is None else [bound])], "ratios")
    edges = drawn[np.isfinite(drawn)]
    low, high = float(edges.min()), float(edges.max())
    margin = max(high - low, 0.02) * 0.16
    with canvas.style():
        figure = canvas.panels(1, 1, width=canvas.WIDTH, height=70 + 40 * len(rows))
        axes = figure.axes[0]
        axes.set_xlim(low - margin * 0.4, high + margin)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_yticks(
            range(len(rows)), [canvas.label(row.label) for row in rows], color=INK.light
        )
        axes.set_xlabel("ratio to plain generation")
        axes.grid(False, axis="y")
        axes.axvline(1.0, color=MUTED.light, linewidth=1.4)
        if bound is not None:
            axes.axvline(bound, color=ACCENT.light, linestyle=(0, (4, 3)), linewidth=1.4)
            axes.annotate(
                f"bound {bound:g}{TIMES}",
                (bound, -0.6),
                xytext=(5, 3),
                textcoords="offset points",
                color=ACCENT.light,
            )
        for index, row in enumerate(rows):
            _draw_overhead(axes, index, row, bound)
        return canvas.svg(figure)


def _draw_overhead(axes: Axes, index: int, row: OverheadRow, bound: Number | None) -> None:
    if row.status != "measured" or not np.isfinite(row.p50):
        reason = "not measured" if row.status == "measured" else row.status
        axes.annotate(
            reason,
            (1.0, index),
            xytext=(8, 0),
            textcoords="offset points",
            color=MUTED.light,
            style="italic",
            va="center",
        )
        return
    colour = ACCENT if bound is None or row.p50 <= bound else BAD
    axes.barh(index, row.p50 - 1.0, left=1.0, height=0.56, color=colour.light, alpha=0.7)
    right = row.p50
    if np.isfinite(row.p20) and np.isfinite(row.p80):
        axes.plot([row.p20, row.p80], [index, index], color=INK.light, linewidth=1.6)
        right = max(row.p80, row.p50)
    axes.annotate(
        f"{row.p50:.3f}{TIMES}",
        (max(right, 1.0), index),
        xytext=(8, 0),
        textcoords="offset points",
        va="center",
    )
