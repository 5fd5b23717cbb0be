"""A million, in small: what the watch sees, and that lost or doubled rows would be counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from benches import million
from benches.million import QUICK, Settings, Watch, against, measure, write_data


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_small_million_is_complete() -> None:
    made = measure(QUICK, command="x")
    assert made.workload["rows"] == QUICK.rows
    assert int(made.workload["tokens"]) > 20 * QUICK.rows
    assert int(made.workload["looks at memory and files"]) > 2
    counted = {name: one.worst for name, one in made.checks.items()}
    assert (counted["rows lost"], counted["rows scored twice"]) == (0, 0)


def test_the_data_has_as_many_rows_as_it_says(tmp_path: Path) -> None:
    write_data(tmp_path, Settings(rows=25, files=3))
    lines = [path.read_text().splitlines() for path in sorted(tmp_path.iterdir())]
    assert [len(one) for one in lines] == [9, 9, 7]
    texts = [line for one in lines for line in one]
    assert len(set(texts)) > 20
    assert json.loads(texts[0])["messages"][-1]["role"] == "assistant"


def test_a_leak_has_a_slope_and_a_start_has_none() -> None:
    rows = list(range(0, 1_000_000, 10_000))
    flat = Watch(rows=rows, memory=[500 << 20] * 100, files=[9] * 100)
    flat.memory[:9] = [100 << 20] * 9  # the first tenth, while caches fill
    assert flat.slope() == pytest.approx(0.0, abs=1e-9)
    assert flat.files_gained() == 0
    leak = Watch(
        rows=rows,
        memory=[(500 << 20) + 21 * at for at in rows],
        files=[9 + r // 10**5 for r in rows],
    )
    assert leak.slope() == pytest.approx(21 * 1e5 / (1 << 20))
    assert leak.files_gained() >= 4
    assert Watch(rows=[5], memory=[1], files=[1]).slope() == float("inf")


def test_rows_that_are_missing_or_doubled_are_counted() -> None:
    class Scan:
        datasets = dict.fromkeys(("a", "b"))

        def tables(self, columns: Any) -> Any:
            rows = [("a", 0), ("a", 1), ("a", 1), ("b", 2)]
            yield pa.table({"source": [s for s, _ in rows], "row": [r for _, r in rows]})

    scan: Any = Scan()
    plain = million.against.__wrapped__ if hasattr(against, "__wrapped__") else against
    assert plain(scan, Settings(rows=6, files=2)) == (3, 1)
