# ruff: noqa: RUF001 (readers get true minus signs, dashes and multiplication signs)
import math
import re
from xml.etree import ElementTree

import pytest

from pvcore.overhead_plot import OverheadRow, overhead_bars
from pvcore.palette import ACCENT, BAD
from pvcore.report import ReportError

ROWS = [
    OverheadRow(label="idle", p20=1.0, p50=1.01, p80=1.02),
    OverheadRow(label="monitor", p20=1.06, p50=1.08, p80=1.12),
    OverheadRow(label="traced", status="unsupported"),
]


def bar_widths(svg: str, colour: str) -> list[float]:
    widths = []
    for path in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}path"):
        if f"fill: {colour}" in path.attrib.get("style", ""):
            corners = re.findall(r"(-?[\d.]+) -?[\d.]+", path.attrib["d"])
            across = [float(x) for x in corners]
            widths.append(max(across) - min(across))
    return widths


def test_bars_start_at_one_and_grow_with_the_overhead() -> None:
    idle, monitor = bar_widths(overhead_bars(ROWS), ACCENT.css)
    assert monitor / idle == pytest.approx(8.0, rel=1e-3)


def test_a_bar_beyond_the_bound_is_red_and_the_bound_is_named() -> None:
    svg = overhead_bars(ROWS, bound=1.05)
    assert len(bar_widths(svg, ACCENT.css)) == len(bar_widths(svg, BAD.css)) == 1
    assert ">bound 1.05×</text>" in svg
    assert bar_widths(overhead_bars(ROWS), BAD.css) == []


def test_what_was_not_measured_says_so_and_has_no_bar() -> None:
    svg = overhead_bars([*ROWS, OverheadRow(label="forgotten")])
    assert ">unsupported</text>" in svg
    assert ">not measured</text>" in svg
    assert len(bar_widths(svg, ACCENT.css)) == 2
    assert ">unsupported</text>" in overhead_bars(ROWS[2:])


def test_a_median_without_spread_has_no_whisker() -> None:
    alone = overhead_bars([OverheadRow(label="idle", p50=1.5)])
    spread = overhead_bars([OverheadRow(label="idle", p20=1.4, p50=1.5, p80=1.6)])
    assert spread.count("line2d") > alone.count("line2d")
    assert ">1.500×</text>" in alone


def test_bad_rows_are_typed_errors() -> None:
    with pytest.raises(ReportError, match="got no overhead rows"):
        overhead_bars([])
    with pytest.raises(ReportError, match="got infinite ratios"):
        overhead_bars([OverheadRow(label="idle", p50=math.inf)])
