"""Settings: what is no number is one typed error, also where nobody checks types at run time."""

from __future__ import annotations

import subprocess
import sys

# In a process of its own: the test suite checks types before the library can.
SCRIPT = """
from pvcore.errors import FlagError
from pvcore.flag_select import Chosen, threshold_of
from pvcore.flag_settings import Settings

for call in (
    lambda: Settings(shard_rows=2.5),
    lambda: Settings(shard_rows="8"),
    lambda: Settings(max_tokens="8"),
    lambda: Settings(share="0.5"),
    lambda: Settings(seed="1"),
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
    said = ("rows 2.5", "rows '8'", "max_tokens '8'", "share '0.5'", "seed '1'")
    for line, got in zip(
        lines, (*said, "threshold '0.5'", "percentile '95'", "judge_threshold '50'"), strict=True
    ):
        assert line.startswith("got ")
        assert f"{got}; wanted" in line
