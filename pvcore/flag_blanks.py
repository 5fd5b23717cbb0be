"""Blanks: what says nothing in a field of a row, as tables give every row the fields of all."""

from collections.abc import Mapping, Sequence


def is_filled(value: object) -> bool:
    """Whether a field says anything, which may be more than text.

    Objects in objects may lie deeper than calls can go, or hold themselves.
    """
    if isinstance(value, list):  # as most rows are, known at once
        return bool(value)
    waiting, seen = [value], set[int]()
    while waiting:
        one = waiting.pop()
        if not isinstance(one, Mapping):
            if _is_filled(one):
                return True
        elif id(one) not in seen:
            seen.add(id(one))
            waiting.extend(one.values())
    return False


def _is_filled(value: object) -> bool:
    if isinstance(value, str):
        return value.strip() not in ("", "[]", "{}", "null")
    if isinstance(value, list | tuple | bytes):
        return len(value) > 0
    return not is_missing(value) and value is not False and 0 not in getattr(value, "shape", ())


def is_missing(value: object) -> bool:
    """Whether it stands for no value: None, NaN, or the NA and NaT of pandas.

    All but None are known by this, that they do not equal themselves.
    """
    if value is None:
        return True
    shape: object = getattr(value, "shape", None)
    if shape or isinstance(value, str | bytes | Mapping | Sequence):
        return False
    same: object = None
    try:
        same = value == value
        return not same
    except Exception:  # NA answers with itself, which is neither true nor false
        return same is value


def is_given(value: object) -> bool:
    """Whether an optional field is there: a CSV's empty cell is an empty text."""
    if value is None or isinstance(value, str):
        return bool(value)
    if isinstance(value, Mapping | Sequence):
        return len(value) > 0
    return not is_missing(value)


def is_told(value: object) -> bool:
    """Whether a text is there, and more than blank."""
    return is_given(value.strip() if isinstance(value, str) else value)
