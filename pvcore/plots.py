"""Figures of persona-vector experiments, drawn from plain numbers and returned as SVG text.

NaN is a gap: it is left out of the drawing. Infinite numbers, lengths that disagree and figures
without anything to draw raise `ReportError`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from pvcore import canvas
from pvcore.correlation import MonitoredReply, correlations
from pvcore.intervals import Interval
from pvcore.numerals import Number, number
from pvcore.palette import (
    ACCENT,
    INK,
    MUTED,
    NEGATIVE,
    POSITIVE,
    SURFACE,
    Colour,
    ordered_colours,
    trait_colours,
)
from pvcore.report import ReportError

MAX_TOKEN_LABELS = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class DoseCurve:
    """Judge scores (0 to 100) of one trait at each coefficient; controls: a same-norm vector."""

    trait: str
    coefficients: Sequence[Number]
    scores: Sequence[Number]
    coherence: Sequence[Number]
    control_scores: Sequence[Number] = ()
    control_coherence: Sequence[Number] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class TradeOff:
    """Trait and coherence scores (0 to 100) of one layer's steering, in coefficient order."""

    layer: int
    scores: Sequence[Number]
    coherence: Sequence[Number]


def dose_response(curves: Sequence[DoseCurve]) -> str:
    """Per trait: trait score above coherence, against the coefficient, beside the control."""
    canvas.require(curves, "dose curves")
    columns = min(len(curves), 4)
    bands = -(-len(curves) // columns)
    with canvas.style():
        figure = canvas.panels(
            2 * bands,
            columns,
            width=canvas.WIDTH,
            height=50 + 300 * bands,
            height_ratios=[2.0, 1.0] * bands,
        )
        figure.set_layout_engine("constrained", h_pad=7 / canvas.POINTS_PER_INCH)
        colours = trait_colours(curve.trait for curve in curves)
        for index in range(columns * bands):
            band, column = divmod(index, columns)
            score = figure.axes[2 * band * columns + column]
            coherence = figure.axes[(2 * band + 1) * columns + column]
            if index >= len(curves):
                score.set_visible(False)
                coherence.set_visible(False)
                continue
            _draw_dose(score, coherence, curves[index], colours[curves[index].trait])
            if column == 0:
                score.set_ylabel("trait score")
                coherence.set_ylabel("coherence")
        _name_control(figure.axes[0], curves[0])
        figure.supxlabel("coefficient", color=MUTED.light, fontsize=12)
        return canvas.svg(figure)


def _draw_dose(score: Axes, coherence: Axes, curve: DoseCurve, colour: Colour) -> None:
    x = canvas.numbers(curve.coefficients, f"coefficients of {curve.trait}")
    order = np.argsort(x)
    for axes, real, control in (
        (score, curve.scores, curve.control_scores),
        (coherence, curve.coherence, curve.control_coherence),
    ):
        axes.set_ylim(-6, 106)
        axes.set_yticks([0, 50, 100])
        axes.set_xlim(_padded(x, 0.06, "coefficients"))
        if len(control):
            y = canvas.numbers(control, f"control of {curve.trait}", len(x))
            axes.plot(x[order], y[order], color=MUTED.light, linestyle=(0, (3, 2)), linewidth=1.6)
        y = canvas.numbers(real, f"scores of {curve.trait}", len(x))
        axes.plot(x[order], y[order], color=colour.light, marker="o")
    score.tick_params(labelbottom=False)
    score.set_title(canvas.label(curve.trait), color=colour.light)


def _name_control(axes: Axes, curve: DoseCurve) -> None:
    placed = zip(curve.coefficients, curve.control_scores, strict=False)
    known = [(x, y) for x, y in placed if np.isfinite(y)]
    if known:
        axes.annotate(
            "random, same norm",
            max(known),
            xytext=(0, 7),
            textcoords="offset points",
            color=MUTED.light,
            fontsize=11,
            ha="right",
        )


def trade_off(
    curves: Sequence[TradeOff], *, trait: str, target: tuple[Number, Number] = (60, 70)
) -> str:
    """Trait score against coherence, one line a layer; the `(trait, coherence)` target is shaded.

    The layer that reaches the highest trait score at the wanted coherence is drawn heavier.
    """
    canvas.require(curves, "trade-off curves")
    drawn = sorted(curves, key=lambda curve: curve.layer)
    with canvas.style():
        figure = canvas.panels(1, 1, width=canvas.WIDTH, height=420)
        axes = figure.axes[0]
        kept = np.concatenate([_coherence(curve) for curve in drawn])
        lowest = min([target[1], *kept[np.isfinite(kept)]])
        axes.set(xlim=(-3, 103), ylim=(lowest - 8, 103), xlabel="trait score", ylabel="coherence")
        axes.set_title(f"{canvas.label(trait)}: trait against coherence")
        axes.add_patch(
            Rectangle(target, 100 - target[0], 100 - target[1], color=ACCENT.light, alpha=0.10)
        )
        axes.text(target[0] + 0.8, target[1] + 1, "target", color=ACCENT.light)
        best = max(drawn, key=lambda curve: _reached(curve, target[1])).layer
        ends = []
        for curve, colour in zip(drawn, ordered_colours(len(drawn)), strict=True):
            x = canvas.numbers(curve.scores, f"scores of layer {curve.layer}")
            y = _coherence(curve)
            heavy = curve.layer == best
            axes.plot(
                x,
                y,
                color=colour.light,
                marker="o",
                linewidth=3.2 if heavy else 1.6,
                zorder=3 if heavy else 2,
            )
            drawn_points = np.flatnonzero(np.isfinite(x + y))
            if drawn_points.size:
                end = drawn_points[-1]
                ends.append((float(x[end]), float(y[end]), f"layer {curve.layer}", colour.light))
        canvas.end_labels(axes, ends)
        return canvas.svg(figure)


def _coherence(curve: TradeOff) -> NDArray[np.float64]:
    return canvas.numbers(curve.coherence, f"coherence of layer {curve.layer}", len(curve.scores))


def _reached(curve: TradeOff, coherence: Number) -> Number:
    pairs = zip(curve.scores, curve.coherence, strict=True)
    return max((score for score, kept in pairs if kept >= coherence), default=float("-inf"))


def monitoring_scatter(replies: Sequence[MonitoredReply], *, trait: str) -> str:
    """Reply score against last-prompt-token projection, coloured by level, with both r."""
    canvas.require(replies, "replies")
    projections = canvas.numbers([reply.projection for reply in replies], "projections")
    scores = canvas.numbers([reply.score for reply in replies], "scores")
    if not np.isfinite(projections + scores).any():
        raise ReportError("got only replies with NaN; wanted projections and scores to compare")
    levels = _in_order([reply.level for reply in replies])
    r = correlations(replies)
    with canvas.style():
        figure = canvas.panels(1, 1, width=canvas.WIDTH, height=440)
        axes = figure.axes[0]
        overall, within = (
            number(value, signed=True, decimals=2) for value in (r.overall, r.within)
        )
        axes.set_title(f"{canvas.label(trait)}: r {overall} overall, {within} within a level")
        spans = f"{_between(r.overall_interval)} overall, {_between(r.within_interval)} within"
        axes.set_xlabel(f"projection at the last prompt token\n95% intervals of r: {spans}")
        axes.set(ylabel="trait score of the reply", ylim=(-6, 106))
        for level, colour in zip(levels, ordered_colours(len(levels)), strict=True):
            rows = [index for index, reply in enumerate(replies) if reply.level == level]
            axes.scatter(
                projections[rows],
                scores[rows],
                s=60,
                color=colour.light,
                edgecolor=SURFACE.light,
                linewidth=1.0,
                alpha=0.85,
                label=canvas.label(str(level)),
            )
        axes.legend(
            loc="upper left",
            bbox_to_anchor=(1.0, 1.0),
            title="prompt level",
            reverse=True,
            labelcolor=MUTED.light,
            handletextpad=0.2,
        )
        return canvas.svg(figure)


def _between(interval: Interval) -> str:
    low, high = (number(end, signed=True, decimals=2) for end in interval)
    return f"{low} to {high}"


def cosine_matrix(names: Sequence[str], values: Sequence[Sequence[Number]]) -> str:
    """Cosines between named vectors: orange for alike, blue for opposed, fainter near zero."""
    canvas.require(names, "names")
    size = len(names)
    if len(values) != size:
        raise ReportError(f"got {len(values)} rows for {size} names; wanted one row per name")
    rows = [
        canvas.numbers(row, f"cosines of {name}", size)
        for name, row in zip(names, values, strict=True)
    ]
    cell = min(76, 620 // size)
    with canvas.style():
        figure = canvas.panels(1, 1, width=150 + cell * size, height=130 + cell * size)
        axes = figure.axes[0]
        axes.set(xlim=(0, size), ylim=(size, 0), aspect="equal")
        axes.grid(False)
        axes.spines["bottom"].set_visible(False)
        labels = [canvas.label(name) for name in names]
        axes.set_xticks(np.arange(size) + 0.5, labels, rotation=35, ha="left", color=INK.light)
        axes.set_yticks(np.arange(size) + 0.5, labels, color=INK.light)
        axes.xaxis.tick_top()
        for down, row in enumerate(rows):
            for across, value in enumerate(row):
                _draw_cosine(axes, across, down, float(value))
        return canvas.svg(figure)


def _draw_cosine(axes: Axes, across: int, down: int, value: float) -> None:
    gap = 0.03
    corner = (across + gap, down + gap)
    known = bool(np.isfinite(value))
    colour = (POSITIVE if value >= 0 else NEGATIVE) if known else MUTED
    alpha = min(abs(value), 1.0) * 0.85 if known else 0.08
    side = 1 - 2 * gap
    axes.add_patch(Rectangle(corner, side, side, facecolor=colour.light, alpha=alpha, linewidth=0))
    text = number(value, decimals=2)
    axes.text(across + 0.5, down + 0.5, text, ha="center", va="center", fontsize=12)


def norms_by_layer(
    norms: Mapping[str, Sequence[Number]],
    *,
    layers: Sequence[int] | None = None,
    residual: Sequence[Number] = (),
) -> str:
    """The norm of every vector at every layer; `residual`: the mean residual norm beside it."""
    canvas.require(norms, "vectors")
    count = len(next(iter(norms.values())))
    x = np.asarray(range(count) if layers is None else layers, dtype=float)
    with canvas.style():
        figure = canvas.panels(1, 1, width=canvas.WIDTH, height=400)
        axes = figure.axes[0]
        axes.set(xlabel="layer", ylabel="norm")
        axes.set_xlim(_padded(x, 0.02, "layers"))
        axes.set_xticks(x[:: max(1, len(x) // 16)])
        ends = []
        if len(residual):
            y = canvas.numbers(residual, "residual norms", len(x))
            axes.plot(x, y, color=MUTED.light, linestyle=(0, (3, 2)), linewidth=1.6)
            ends.append((float(x[-1]), float(y[-1]), "residual (mean)", MUTED.light))
        for name, colour in trait_colours(norms).items():
            y = canvas.numbers(norms[name], f"norms of {name}", len(x))
            axes.plot(x, y, color=colour.light, marker="o")
            ends.append((float(x[-1]), float(y[-1]), name, colour.light))
        axes.set_ylim(bottom=0)
        canvas.end_labels(axes, ends)
        return canvas.svg(figure)


def drift(
    tokens: Sequence[str],
    values: Mapping[str, Sequence[Number]],
    *,
    trait: str,
    cap: Number | None = None,
) -> str:
    """Projections along a reply, one line a chat; the first is the plain one and drawn grey.

    `tokens` name the positions and may be empty; `cap` is drawn as the bound it was.
    """
    canvas.require(values, "chats")
    lines = {
        name: canvas.numbers(line, f"projections of {name}", len(tokens) or None)
        for name, line in values.items()
    }
    longest = max(len(line) for line in lines.values())
    with canvas.style():
        labelled = 0 < len(tokens) <= MAX_TOKEN_LABELS
        figure = canvas.panels(1, 1, width=canvas.WIDTH, height=360 if labelled else 320)
        axes = figure.axes[0]
        axes.set_ylabel(f"projection on {canvas.label(trait)}")
        axes.set_xlim(-0.5, longest - 0.5)
        if labelled:
            axes.set_xticks(range(len(tokens)), [_short(token) for token in tokens])
            axes.tick_params(axis="x", rotation=90, labelsize=10)
            axes.grid(False, axis="x")
        else:
            axes.set_xlabel("token of the reply")
        if cap is not None:
            axes.axhline(cap, color=ACCENT.light, linestyle=(0, (4, 3)), linewidth=1.4)
        hues = [MUTED, trait_colours([trait])[trait], *ordered_colours(max(len(lines) - 2, 1))]
        ends = [] if cap is None else [(longest - 1.0, cap, f"cap {number(cap)}", ACCENT.light)]
        for (name, line), colour in zip(lines.items(), hues, strict=False):
            axes.plot(line, color=colour.light, linewidth=2.0)
            drawn = np.flatnonzero(np.isfinite(line))
            if drawn.size:
                ends.append((float(drawn[-1]), float(line[drawn[-1]]), name, colour.light))
        canvas.end_labels(axes, ends)
        return canvas.svg(figure)


def _padded(x: NDArray[np.float64], share: float, what: str) -> tuple[float, float]:
    if np.isnan(x).any():
        raise ReportError(f"got NaN among the {what}; wanted a place for every value")
    pad = share * (float(np.ptp(x)) or 1.0)
    return float(x.min()) - pad, float(x.max()) + pad


def _in_order(levels: Sequence[int | str]) -> list[int | str]:
    names = list(dict.fromkeys(levels))
    numeric = [name for name in names if isinstance(name, int)]
    return [*sorted(numeric)] if len(numeric) == len(names) else names


def _short(token: str) -> str:
    text = canvas.label(token.strip(" "))
    return text if len(text) <= 14 else text[:13] + "…"
