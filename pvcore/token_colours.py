"""Token colours: text and tokens as HTML, every token coloured by its projection."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from math import isfinite, isnan

from pvcore.errors import PvcoreError
from pvcore.numerals import Number, number

_UNREADABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff\ufffe\uffff]")


class ReportError(PvcoreError):
    """A report or figure that cannot be made from the data it was given."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """Which projection is drawn without colour, and how far from it the colour is full."""

    centre: Number = 0.0
    reach: Number = 1.0

    def __post_init__(self) -> None:
        if not (isfinite(self.centre) and isfinite(self.reach) and self.reach > 0):
            raise ReportError(
                f"got a scale of {self.centre} ± {self.reach}; "
                "wanted finite numbers and a reach above 0"
            )


def token_html(token: str, value: Number, scale: Scale) -> str:
    """One token, its colour as strong as its projection lies from the scale's centre."""
    text = text_html(token).replace("\n", "↵\n")
    if isnan(value):
        return f'<span class="unknown" data-v="no value">{text}</span>'
    share = (value - scale.centre) / scale.reach
    side = "up" if share >= 0 else "down"
    strength = f"{min(abs(share), 1.0):.2f}"
    value_text = number(value, signed=True)
    return f'<span class="{side}" style="--a:{strength}" data-v="{value_text}">{text}</span>'


def legend_html(tokens: Sequence[str], values: Sequence[Number], scale: Scale) -> str:
    """What the colours mean, and the highest token."""
    low, high = (number(scale.centre + side * scale.reach, signed=True) for side in (-1, 1))
    known = [(value, token) for value, token in zip(values, tokens, strict=True) if value == value]
    value, token = max(known, default=(0.0, ""))
    word = text_html(token.strip() or repr(token))
    peak = f"highest {number(value, signed=True)} at <code>{word}</code>"
    return (
        f'<div class="scale"><span>{low}</span><i></i><span>{high}</span>'
        f'<span class="peak">{peak if known else "no values"}</span></div>'
    )


def text_html(text: str) -> str:
    """Escaped text; characters no HTML file can hold become the replacement character."""
    return escape(readable(text))


def readable(text: str) -> str:
    """The text without the characters that no HTML file can hold."""
    return _UNREADABLE.sub("\ufffd", text)
