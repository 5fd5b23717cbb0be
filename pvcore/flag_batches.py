"""Batches, as `datasets.map` gives them in each of its formats: columns of one length, as rows."""

from collections.abc import Mapping
from typing import Any

from pvcore.errors import FlagError
from pvcore.flag_rows import KEYS
from pvcore.flag_sources import own

DO = "call datasets.map(..., batched=True), or give lists: {'prompt': [...], 'response': [...]}"


def rows_of(batch: Any, known: frozenset[str]) -> list[dict[str, Any]]:
    """The rows of a batch: a mapping of columns, or a table of pyarrow or pandas.

    Only a `known` column may hold a conversation. Raises `FlagError` for one row that is given as
    if it were a batch.
    """
    columns = _columns(batch)
    for name, column in columns.items():
        if not _is_column(column):
            raise FlagError(
                f"got {type(column).__name__} in column {name!r}, as one row has it; wanted a "
                f"batch, a list in each column: {DO}"
            )
        if name in known and len(column) and all(map(_is_message, column)):
            raise FlagError(
                f"got messages in column {name!r}, as one row has them; wanted a batch, a list of "
                f"messages for each row: {DO}"
            )
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) > 1:
        told = ", ".join(f"{count} of {name}" for name, count in lengths.items())
        raise FlagError(f"got columns of other lengths ({told}); wanted a batch of whole rows")
    return [
        own(dict(zip(columns, row, strict=True))) for row in zip(*columns.values(), strict=True)
    ]


def _columns(batch: Any) -> dict[str, Any]:
    if isinstance(batch, Mapping):
        return dict(batch)
    if hasattr(batch, "to_pydict"):  # pyarrow's
        return dict(batch.to_pydict())
    if hasattr(batch, "iterrows"):  # pandas'
        return dict(batch.to_dict("list"))
    raise FlagError(f"got {type(batch).__name__} as a batch; wanted a mapping of columns: {DO}")


def _is_column(column: Any) -> bool:
    if isinstance(column, str | bytes | Mapping):
        return False
    try:
        return len(column) >= 0
    except TypeError:  # arrays of no dimension have no length either
        return False


def _is_message(entry: Any) -> bool:
    """Whether it is one message, and not the lists of roles and texts of a whole row."""
    return isinstance(entry, Mapping) and any(isinstance(entry.get(role), str) for role, _ in KEYS)
