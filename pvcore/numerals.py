"""Numbers as a reader wants them: few digits, a true minus sign, a dash where there is none."""

from math import isinf, isnan

Number = int | float  # spelled out for checks at run time, which tell the two apart
MINUS = "\N{MINUS SIGN}"
TIMES = "\N{MULTIPLICATION SIGN}"
NONE = "\N{EN DASH}"


def number(value: Number | None, *, signed: bool = False, decimals: int | None = None) -> str:
    """The value with `decimals` places, or as many as three significant digits need."""
    if value is None or isnan(value):
        return NONE
    sign = MINUS if value < 0 else "+" if signed and value > 0 else ""
    size = abs(value)
    if isinf(size):
        return f"{sign}∞"
    if 0 < size < 1e-3 and decimals is None:
        return f"{sign}{size:.1e}".replace("e-", f"e{MINUS}")
    places = min(decimals_of(value, digits=3), 3) if decimals is None else decimals
    return f"{sign}{size:,.{places}f}"


def decimals_of(value: Number, *, digits: int = 4) -> int:
    """How many decimal places `digits` significant digits take; 0 for whole numbers."""
    if isinstance(value, int) or isnan(value) or isinf(value) or value == 0:
        return 0
    exponent = int(f"{abs(value):.{digits - 1}e}".partition("e")[2])
    return max(digits - 1 - exponent, 0)
