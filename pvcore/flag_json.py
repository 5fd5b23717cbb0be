"""Rows of data sets as lines of JSON that hold just what the rows hold, or one error."""

import json
from collections.abc import Mapping
from math import isfinite
from typing import Any

import numpy as np

from pvcore.errors import FlagError

# What NumPy's tolist() gives back number by number and letter by letter: dates, for one, it counts.
EXACT = "biufUO"


def json_line(record: object, row: str) -> bytes:
    """A row's line, without its end. `FlagError` names the `row` and the field JSON cannot hold."""
    try:
        plain = _plain(record, "")
        text = json.dumps(plain, ensure_ascii=False, allow_nan=False)
    except _NoJson as error:
        where, what = error.args
        raise FlagError(
            f"{row}: {where or 'the row'}: got {what}, which JSON cannot hold; wanted text, finite "
            "numbers, lists and objects. Leave the field out, or flag a Parquet file of the data"
        ) from None
    try:
        return text.encode()
    except UnicodeEncodeError:  # a lone surrogate, which JSON can hold only escaped
        return json.dumps(plain, allow_nan=False).encode()


class _NoJson(Exception):
    """The field at fault, and what it holds."""


def _plain(value: Any, field: str) -> Any:
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, float):
        if isfinite(value):
            return value
    elif isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise _NoJson(field, f"{ascii(key)[:40]} as a name")
        inside = f"{field}." if field else ""
        return {key: _plain(held, f"{inside}{key}") for key, held in value.items()}
    elif isinstance(value, list | tuple):
        return [_plain(held, f"{field}[{at}]") for at, held in enumerate(value)]
    elif isinstance(value, np.ndarray | np.generic) and value.dtype.kind in EXACT:
        made = value.tolist()
        if not isinstance(made, np.generic):
            return _plain(made, field)
    raise _NoJson(field, str(value) if isinstance(value, float) else type(value).__name__)
