"""The drift of a conversation as a figure: means where the replies are, gaps where nothing is."""

import math
import re

import pytest

from pvcore.drift_plot import conversation_drift
from pvcore.token_colours import ReportError

REPLIES = {"evil": [[1.0, 3.0], [5.0, math.nan, 7.0]], "humor": [[0.0, 0.0], [1.0, 1.0, 1.0]]}


def heavy(svg: str) -> list[tuple[float, float, float]]:
    """Left end, right end and height of every heavy line, in the figure's own units."""
    drawn = re.findall(
        r'<path d="M ([\d.-]+) ([\d.-]+)\s+L ([\d.-]+) ([\d.-]+)\s+"[^>]*style="([^"]+)', svg
    )
    return [
        (float(left), float(right), float(low))
        for left, low, right, high, style in drawn
        if "stroke-width: 2.8" in style and low == high
    ]


def test_heavy_lines_are_the_means_of_the_replies() -> None:
    svg = conversation_drift(REPLIES, site="resid_post.2", levels={"evil": 4.0})
    lines = heavy(svg)
    assert len(lines) == 4
    heights = [height for _, _, height in lines]
    unit = heights[2] - heights[3]  # humor's means are 0 and 1; heights grow downwards
    assert [round((heights[2] - one) / unit, 3) for one in heights] == [2.0, 6.0, 0.0, 1.0]
    assert lines[0][1] == lines[1][0]
    widths = [right - left for left, right, _ in lines]
    assert widths[1] == pytest.approx(1.5 * widths[0])
    assert "resid_post.2" in svg
    assert "evil: alarm 4" in svg


def test_it_is_reproducible_and_refuses_nothing_to_draw() -> None:
    assert conversation_drift(REPLIES, site="x") == conversation_drift(REPLIES, site="x")
    with pytest.raises(ReportError, match="no traits"):
        conversation_drift({}, site="x")
    with pytest.raises(ReportError, match="no replies"):
        conversation_drift({"evil": []}, site="x")
