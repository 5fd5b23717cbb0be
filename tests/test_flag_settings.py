"""Settings: what is no number is one typed error, also where nobody checks types at run time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import jaxtyping
import numpy as np
import pytest

import pvcore as pv
from tests.flag_data import bank, chats, model, table

# In a process of its own: the test suite checks types before the library can.
SCRIPT = """
from pvcore.errors import FlagError
from pvcore.flag_rows import Form
from pvcore.flag_select import Chosen, threshold_of
from pvcore.flag_settings import Settings

for call in (
    lambda: Settings(shard_rows=2.5),
    lambda: Settings(shard_rows="8"),
    lambda: Settings(max_tokens="8"),
    lambda: Settings(share="0.5"),
    lambda: Settings(seed="1"),
    lambda: Form(prompt=1, answer=2),
    lambda: Form(prompt="q", answer=None),
    lambda: threshold_of("a/b/c", "0.5", 95, None, None, None),
    lambda: threshold_of("a/b/c", None, "95", None, None, None),
    lambda: Chosen(column="a/b/c", threshold=0.0, judge={}, judge_threshold="50"),
):
    try:
        call()
    except FlagError as error:
        print(error)
    else:
        print("taken")
"""


def test_numbers_given_as_text_are_refused() -> None:
    ran = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    lines = ran.stdout.splitlines()
    said = (
        "rows 2.5",
        "rows '8'",
        "max_tokens '8'",
        "share '0.5'",
        "seed '1'",
        "prompt 1",
        "answer None",
    )
    for line, got in zip(
        lines, (*said, "threshold '0.5'", "percentile '95'", "judge_threshold '50'"), strict=True
    ):
        assert line.startswith("got ")
        assert f"{got}; wanted" in line


def test_numbers_of_numpy_are_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    rows = [{"id": np.int64(70 + at), "messages": chat} for at, chat in enumerate(chats(9))]
    plain: dict[str, Any] = {"seed": 3, "shard_rows": 4, "max_tokens": 99, "max_new_tokens": 2}
    given = {name: np.int64(value) for name, value in plain.items()}
    settings: dict[str, Any] = {"difference": "subset", "out": tmp_path / "out"}
    flags = pv.flag(model(), rows, bank(), share=np.float32(0.5), **given, **settings)
    assert [row["id"] for row in table(flags).values()] == [str(70 + at) for at in range(9)]
    again = pv.flag(model(), rows, bank(), share=0.5, **plain, **settings)
    assert again.manifest == flags.manifest
