"""The study's drawings: what keeps a trait out at which price, and what foretells it."""

from collections.abc import Sequence

from matplotlib.axes import Axes

from pvcore import canvas
from pvcore.palette import (
    ACCENT,
    BAD,
    GOOD,
    INK,
    MUTED,
    NEGATIVE,
    POSITIVE,
    Colour,
    trait_colours,
)
from pvcore.world.study_summary import Moved, Point

# The way, what it is called, its colour and marker, and whether its doses are joined.
_DRAWN = (
    ("inference", "at inference", BAD, "o", True),
    ("prevent", "prevention", ACCENT, "o", True),
    ("incremental", "prevention, all layers", NEGATIVE, "^", True),
    ("caft", "CAFT", INK, "D", False),
    ("random", "random vector", POSITIVE, "s", False),
    ("neutral", "neutral chats", GOOD, "*", False),
)


def keeping_out(points: Sequence[Point]) -> str:
    """Trait score against coherence, one panel a trait, one line a way, standard errors as bars."""
    canvas.require(points, "points")
    traits = list(dict.fromkeys(point.trait for point in points))
    with canvas.style():
        figure = canvas.panels(1, len(traits), width=canvas.WIDTH, height=430)
        for axes, trait in zip(figure.axes, traits, strict=True):
            axes.set_title(canvas.label(trait))
            axes.set(xlim=(-4, 104), xlabel="trait score")
            for way, name, colour, marker, joined in _DRAWN:
                rows = [one for one in points if (one.trait, one.way) == (trait, way)]
                _curve(axes, rows, name, marker, joined, colour)
        figure.axes[0].set_ylabel("coherence")
        handles, names = figure.axes[0].get_legend_handles_labels()
        figure.legend(
            handles, names, loc="outside lower center", ncols=3, frameon=False, labelcolor=INK.light
        )
        return canvas.svg(figure)


def _curve(
    axes: Axes, rows: Sequence[Point], name: str, marker: str, joined: bool, colour: Colour
) -> None:
    """The doses of one way; where a single seed leaves no error, no bar is drawn."""
    columns = [one for row in rows for one in (row.score, row.coherence)]
    x, y = columns[::2], columns[1::2]
    axes.errorbar(
        canvas.numbers([one.mean for one in x], "scores"),
        canvas.numbers([one.mean for one in y], "coherence"),
        xerr=canvas.numbers([one.error for one in x], "errors"),
        yerr=canvas.numbers([one.error for one in y], "errors"),
        color=colour.light,
        marker=marker,
        markersize=9 if marker == "*" else 5.5,
        linestyle="-" if joined else "none",
        elinewidth=1.0,
        label=name,
    )


def shift_and_trait(moved: Sequence[Moved]) -> str:
    """Shift along a trait's vector against its score: own sets coloured, those of others grey."""
    canvas.require(moved, "models")
    traits = list(dict.fromkeys(one.trait for one in moved))
    colours = trait_colours(traits)
    with canvas.style():
        figure = canvas.panels(1, 1, width=canvas.WIDTH, height=420)
        axes = figure.axes[0]
        axes.set(xlabel="shift along the trait's vector", ylabel="trait score", ylim=(-4, 104))
        others = [one for one in moved if not one.own]
        if others:
            _dots(axes, others, MUTED, "finetuned on another trait", alpha=0.45)
        for trait in traits:
            own = [one for one in moved if one.own and one.trait == trait]
            if own:
                _dots(axes, own, colours[trait], canvas.label(trait), alpha=0.9)
        axes.legend(loc="upper left", frameon=False, labelcolor=INK.light)
        return canvas.svg(figure)


def _dots(axes: Axes, rows: Sequence[Moved], colour: Colour, name: str, *, alpha: float) -> None:
    axes.plot(
        canvas.numbers([one.shift for one in rows], "shifts"),
        canvas.numbers([one.score for one in rows], "scores"),
        color=colour.light,
        marker="o",
        linestyle="none",
        alpha=alpha,
        label=name,
    )
