"""The colours of pages and plots: one name, one value in the light theme and one in the dark.

A trait keeps its colour everywhere. The seven trait colours stay apart under protanopia,
deuteranopia and tritanopia.
"""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Colour:
    """One role. `light` is unique in the palette: a plot drawn with it is recoloured by name."""

    role: str
    light: str
    dark: str

    @property
    def css(self) -> str:
        """A CSS value that follows the page's theme, and is `light` outside a page."""
        return f"var(--{self.role}, {self.light})"


INK = Colour("ink", "#1b2430", "#e6eaf0")
MUTED = Colour("muted", "#667085", "#98a2b3")
GRID = Colour("grid", "#e4e7ec", "#2b3340")
SURFACE = Colour("surface", "#fffffe", "#171c24")
ACCENT = Colour("accent", "#4338ca", "#a5a0ff")
GOOD = Colour("good", "#14804a", "#4ade80")
BAD = Colour("bad", "#c0262d", "#ff7b7b")
POSITIVE = Colour("positive", "#f0741d", "#cf5d14")
NEGATIVE = Colour("negative", "#4b8ee6", "#2f72cc")

TRAITS = {
    "evil": Colour("trait-1", "#b3170e", "#f8455e"),
    "sycophancy": Colour("trait-2", "#d98200", "#f5b13d"),
    "hallucination": Colour("trait-3", "#5b47ef", "#8f7bf5"),
    "politeness": Colour("trait-4", "#178551", "#14ac7e"),
    "apathy": Colour("trait-5", "#5d6874", "#b0bbbf"),
    "humor": Colour("trait-6", "#cb7fc6", "#d576c3"),
    "optimism": Colour("trait-7", "#1698fd", "#48c7f9"),
}

ORDERED = tuple(
    Colour(f"order-{step}", light, dark)
    for step, (light, dark) in enumerate(
        [
            ("#3a2a9b", "#7c6cf0"),
            ("#6a2fae", "#9c6bee"),
            ("#9733a6", "#bb6de0"),
            ("#bf3f8f", "#d674c9"),
            ("#dc5673", "#ec7fab"),
            ("#ec7856", "#f6948c"),
            ("#ee9f3c", "#f8b072"),
            ("#d4b01f", "#f2d06b"),
        ]
    )
)

PALETTE = (
    *(INK, MUTED, GRID, SURFACE, ACCENT, GOOD, BAD, POSITIVE, NEGATIVE),
    *TRAITS.values(),
    *ORDERED,
)


def trait_colours(names: Iterable[str]) -> dict[str, Colour]:
    """A colour for each name: the known traits their own, the others those left over, in order."""
    wanted = list(dict.fromkeys(names))
    free = [colour for trait, colour in TRAITS.items() if trait not in wanted]
    spare = free or list(TRAITS.values())
    others = [name for name in wanted if name not in TRAITS]
    chosen = {name: spare[index % len(spare)] for index, name in enumerate(others)}
    return {name: TRAITS[name] if name in TRAITS else chosen[name] for name in wanted}


def ordered_colours(count: int) -> list[Colour]:
    """`count` colours from first to last of the ordered ramp; more than eight share steps."""
    last = len(ORDERED) - 1
    return [ORDERED[round(last * index / max(count - 1, 1))] for index in range(count)]


def css_variables() -> str:
    """The palette as CSS custom properties, with the dark values behind the reader's preference."""
    light = "".join(f"--{colour.role}:{colour.light};" for colour in PALETTE)
    dark = "".join(f"--{colour.role}:{colour.dark};" for colour in PALETTE)
    return f":root{{{light}}}@media(prefers-color-scheme:dark){{:root{{{dark}}}}}"
