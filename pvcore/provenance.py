"""Provenance: where a persona vector comes from, how it is named, and what its fields may hold."""

import math
import reprlib
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from pvcore.errors import VectorError

# Calibration nests two or three levels; the bound turns a circular value into an error.
MAX_DEPTH = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """How a vector was made; counts that nobody recorded are None.

    `thresholds` are the filter's, `kept` and `dropped` count rollouts, `judge` names the judge.
    Raises `VectorError` for values of another type.
    """

    thresholds: Mapping[str, float | int] = field(default_factory=dict, hash=False)
    judge: str = ""
    kept: int | None = None
    dropped: int | None = None
    prompt_hash: str = ""
    seeds: tuple[int, ...] = ()
    note: str = ""

    def __post_init__(self) -> None:
        for name in ("judge", "prompt_hash", "note"):
            require_text(name, getattr(self, name))
        for name in ("kept", "dropped"):
            count = getattr(self, name)
            is_count = count is None or (_is_whole(count) and count >= 0)
            require(is_count, name, count, "a count from 0, or None")
        is_list = isinstance(self.seeds, list | tuple) and all(map(_is_whole, self.seeds))
        require(is_list, "seeds", self.seeds, "a tuple of whole numbers")
        is_table = isinstance(self.thresholds, Mapping) and all(
            isinstance(name, str) and _is_finite(number) for name, number in self.thresholds.items()
        )
        require(is_table, "thresholds", self.thresholds, "a finite number for each name")
        numbers = {name: float(number) for name, number in self.thresholds.items()}
        object.__setattr__(self, "seeds", tuple(self.seeds))
        object.__setattr__(self, "thresholds", numbers)

    def noting(self, remark: str) -> "Provenance":
        """The same provenance with one more remark at the end of its note."""
        return replace(self, note=f"{self.note}; {remark}" if self.note else remark)


def require(fits: bool, name: str, got: object, wanted: str) -> None:
    """Raise the `VectorError` of a field whose value does not fit."""
    if not fits:
        raise VectorError(f"got {name} {reprlib.repr(got)}; wanted {wanted}")


def require_text(name: str, got: object) -> None:
    require(isinstance(got, str), name, got, "text")


def require_name(name: str, got: object) -> None:
    """A name stands in file names, columns and reports, so it must survive in all of them."""
    fits = isinstance(got, str) and bool(got.strip()) and "/" not in got
    # Cc: control characters; Cs: lone surrogates; Zl, Zp: line and paragraph separators.
    unprintable = {"Cc", "Cs", "Zl", "Zp"}
    fits = fits and not any(unicodedata.category(letter) in unprintable for letter in str(got))
    require(fits, name, got, "a name such as 'evil', without '/' or control characters")


def grouped(trait: str) -> str:
    """A trait name as an operand: in brackets where it is itself a formula."""
    return f"({trait})" if _is_formula(trait) else trait


def negated(trait: str) -> str:
    """The name of the opposite direction; a name that carries a bare minus loses it."""
    positive = trait.removeprefix("-")
    if positive != trait and positive.strip() and not _is_formula(positive):
        return positive
    return f"-{grouped(trait)}"


def plain_json(value: object, name: str, *, depth: int = 0) -> object:
    """A copy of `value` in JSON's own types; raises `VectorError` for what JSON cannot hold."""
    require(depth <= MAX_DEPTH, name, value, f"at most {MAX_DEPTH} levels")
    if isinstance(value, Mapping):
        for key in value:
            require(isinstance(key, str), f"key in {name}", key, "text")
        return {key: plain_json(value[key], f"{name}[{key!r}]", depth=depth + 1) for key in value}
    if isinstance(value, list | tuple):
        rows = enumerate(value)
        return [plain_json(entry, f"{name}[{row}]", depth=depth + 1) for row, entry in rows]
    fits = value is None or isinstance(value, str | bool) or _is_finite(value)
    require(fits, name, value, "text, a finite number, True, False, None, a list or a mapping")
    return value


def _is_formula(trait: str) -> bool:
    return trait.startswith("-") or " + " in trait or " - " in trait


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_finite(value: object) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    try:
        return is_number and math.isfinite(float(value))  # type: ignore[arg-type]
    except OverflowError:
        return False
