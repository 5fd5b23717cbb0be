"""Shapes of what is given as training data: rows, data sets, paths and lists of them, told apart.

By their look, where to know a type would be to load the library that has it.
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from os import PathLike
from typing import Any, Literal

from pvcore.errors import SourceError
from pvcore.flag_rows import KEYS, KNOWN

Kind = Literal["json lines", "csv", "parquet", "rows"]

SUFFIXES: Mapping[str, Kind] = {
    ".jsonl": "json lines",
    ".ndjson": "json lines",
    ".json": "json lines",
    ".csv": "csv",
    ".parquet": "parquet",
}


def check_rows(value: Any) -> None:
    """Refuse what can be iterated and yields no rows, before each of its entries is rejected."""
    kind = type(value).__name__
    if isinstance(value, set | frozenset):
        raise SourceError(f"got a {kind} as a source, which has no order; wanted a list")
    if hasattr(value, "iterrows"):
        raise SourceError(
            f"got a {kind} as a source, which yields its columns' names; wanted mappings: give "
            "frame.to_dict('records')"
        )
    if not isinstance(value, list | tuple) or not value:
        return
    if isinstance(value[0], Mapping) and _is_message(value[0]):
        raise SourceError(
            f"got a {kind} of messages as a source; wanted rows that hold conversations: give "
            "[{'messages': chat}, ...]"
        )
    for place, one in enumerate(value):
        if _holds_sources(one) if isinstance(one, dict | Mapping) else _is_source(one):
            raise SourceError(
                f"got a {kind} of rows that holds a source at {place} ({brief(one)}); wanted rows "
                "alone, or sources alone: [rows, source], or {name: source, ...}"
            )


def _is_message(record: Mapping[Any, Any]) -> bool:
    return any(set(pair) <= set(record) for pair in KEYS)


def is_row(value: object) -> bool:
    return isinstance(value, Mapping) and not is_data(value)


def is_rows(value: object) -> bool:
    return isinstance(value, Iterable) and not isinstance(value, str | bytes | PathLike | Mapping)


def is_data(value: object) -> bool:
    """A data set or table, or several by name, as of `datasets`, pyarrow and pandas."""
    return hasattr(value, "column_names") or hasattr(value, "iterrows")


def is_list_of_sources(value: object) -> bool:
    """A list or tuple whose first entry is itself a source, or a mapping of them, and no row."""
    if not isinstance(value, list | tuple) or not value:
        return False
    first = value[0]
    if isinstance(first, Mapping):
        return _holds_sources(first)
    return isinstance(first, str | PathLike) or is_rows(first)


def _holds_sources(value: Mapping[Any, Any]) -> bool:
    """Whether a mapping among others is no row, but names sources, as a `DatasetDict` does."""
    if type(value) is not dict and is_data(value):
        return True
    return bool(value) and KNOWN.isdisjoint(value) and all(map(_is_source, value.values()))


def _is_source(value: object) -> bool:
    """What no row can be, nor a field of one: a file, a data set, a list of rows."""
    if isinstance(value, str):
        return value[-9:].casefold().endswith((*SUFFIXES, ".gz")) and os.path.isfile(value)
    if isinstance(value, list):
        return bool(value) and isinstance(value[0], Mapping) and not _is_message(value[0])
    return isinstance(value, PathLike | Iterator) or is_data(value)


def brief(told: object) -> str:
    """What an error quotes: one line that is not long."""
    return " ".join(str(told).split())[:160] or type(told).__name__
