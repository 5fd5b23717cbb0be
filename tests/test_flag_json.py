"""Lines of JSON: what a row holds comes back from its line, or an error names the field."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest

import pvcore as pv
from pvcore.errors import FlagError
from pvcore.flag_json import json_line
from tests.flag_data import as_pair, bank, chats, model


@pytest.mark.parametrize(
    ("held", "wanted"),
    [
        (np.arange(2000), list(range(2000))),
        (np.array([[0.1, 0.25]], dtype=np.float32), [[float(np.float32(0.1)), 0.25]]),
        (np.array([{"role": "user", "n": np.int64(3)}], dtype=object), [{"role": "user", "n": 3}]),
        (np.int64(5), 5),
        (np.bool_(True), True),
        (np.array(["é", "\ud800"]), ["é", "\ud800"]),
        ((1, None, True, 2.5, 1 << 80), [1, None, True, 2.5, 1 << 80]),
        (MappingProxyType({"a": MappingProxyType({"b": "c"})}), {"a": {"b": "c"}}),
        ("a\ud800b, é", "a\ud800b, é"),
    ],
)
def test_a_value_comes_back_as_it_was(held: Any, wanted: Any) -> None:
    line = json_line({"x": held}, "rows: row 0")
    assert json.loads(line) == {"x": wanted}
    assert b"\n" not in line


def test_text_stays_readable() -> None:
    assert json_line({"x": "é, 你好"}, "") == '{"x": "é, 你好"}'.encode()


@pytest.mark.parametrize(
    ("held", "said"),
    [
        ({"x": float("nan")}, "x: got nan"),
        ({"x": {"y": [0.0, float("inf")]}}, r"x\.y\[1\]: got inf"),
        ({"x": np.array([1.0, np.nan])}, r"x\[1\]: got nan"),
        ({"x": b"\x00\xff"}, "x: got bytes"),
        ({"x": datetime.datetime(2020, 1, 1)}, "x: got datetime"),
        ({"x": np.datetime64("2020-01-01T00:00:00", "ns")}, "x: got datetime64"),
        ({"x": np.longdouble(1) / 3}, "x: got longdouble"),
        ({"x": {5: "a"}}, "x: got 5 as a name"),
        ({0: "a"}, "the row: got 0 as a name"),
        ({"x": {1, 2}}, "x: got set"),
    ],
)
def test_what_json_cannot_hold_is_one_error_that_names_row_and_field(held: Any, said: str) -> None:
    with pytest.raises(FlagError, match=f"rows: row 7: {said}.*, which JSON cannot hold"):
        json_line(held, "rows: row 7")


def test_a_cleaned_data_set_holds_what_its_rows_held_or_is_not_there(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {**as_pair(chat), "scores": np.arange(1500) + at, "n": np.int64(at), "note": "a\ud800"}
        for at, chat in enumerate(chats(5))
    ]
    flags = pv.flag(model(), rows, bank("evil"), out=tmp_path / "out")
    found = flags.filter("evil", threshold=1e9)
    (made,) = found.write_clean(tmp_path / "clean").values()
    kept = [json.loads(line) for line in made.path.read_text().splitlines()]
    assert kept == [
        {**row, "scores": [*range(at, at + 1500)], "n": at} for at, row in enumerate(rows)
    ]
    before = made.path.read_bytes()
    rows[3]["n"] = float("nan")  # of no consequence for what was scored
    with pytest.raises(FlagError, match="rows: row 3: n: got nan"):
        found.write_clean(tmp_path / "clean")
    assert made.path.read_bytes() == before
    assert [path.name for path in (tmp_path / "clean").iterdir()] == ["rows.jsonl"]
