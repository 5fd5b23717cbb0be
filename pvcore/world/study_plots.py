"""The study's drawings: what keeps a trait out at which price, and what foretells it."""

from collections.abc import Mapping, Sequence

from pvcore import canvas
from pvcore.numerals import Number
from pvcore.palette import ACCENT, INK, MUTED, ordered_colours
from pvcore.world.study_summary import Point

_DRAWN = ("inference", "prevent", "incremental", "caft", "random")
_NAMES = {
    "inference": "at inference",
    "prevent": "prevention",
    "incremental": "prevention, all layers",
    "caft": "CAFT",
    "random": "random vector",
}


def keeping_out(points: Sequence[Point]) -> str:
    """Trait score against coherence, one panel a trait, one line a way."""
    canvas.require(points, "points")
    traits = list(dict.fromkeys(point.trait for point in points))
    colours = dict(zip(_DRAWN, ordered_colours(len(_DRAWN)), strict=True))
    with canvas.style():
        figure = canvas.panels(1, len(traits), width=canvas.WIDTH, height=380)
        for axes, trait in zip(figure.axes, traits, strict=True):
            axes.set_title(canvas.label(trait))
            axes.set(xlim=(-3, 103), xlabel="trait score", ylabel="coherence")
            for way in _DRAWN:
                rows = [one for one in points if (one.trait, one.way) == (trait, way)]
                x = canvas.numbers([one.score for one in rows], "scores")
                y = canvas.numbers([one.coherence for one in rows], "coherence")
                style = "" if way in ("random", "caft") else "-"
                axes.plot(
                    x,
                    y,
                    color=colours[way].light,
                    marker="o" if style else "s",
                    linestyle=style or "none",
                    label=_NAMES[way],
                )
        figure.axes[0].legend(loc="lower left", frameon=False, labelcolor=INK.light)
        return canvas.svg(figure)


def shift_and_trait(correlations: Mapping[str, Number]) -> str:
    """Pearson's r of shift and trait score as bars from 0 to 1."""
    canvas.require(correlations, "correlations")
    with canvas.style():
        figure = canvas.panels(1, 1, width=canvas.WIDTH, height=90 + 30 * len(correlations))
        axes = figure.axes[0]
        names = list(correlations)
        values = canvas.numbers(list(correlations.values()), "correlations")
        axes.set_yticks(range(len(names)), [canvas.label(one) for one in names], color=INK.light)
        axes.set(xlim=(0, 1.08), ylim=(len(names) - 0.4, -0.6), xlabel="r of shift and trait score")
        axes.grid(False, axis="y")
        axes.axvline(1.0, color=MUTED.light, linewidth=1.2)
        for row, value in enumerate(values):
            if value == value:
                axes.barh(row, value, height=0.56, color=ACCENT.light, alpha=0.7)
                axes.annotate(
                    f"{value:.3f}",
                    (value, row),
                    xytext=(6, 0),
                    textcoords="offset points",
                    va="center",
                )
        return canvas.svg(figure)
