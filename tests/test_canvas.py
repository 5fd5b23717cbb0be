from itertools import pairwise

import matplotlib
import pytest

from pvcore import canvas
from pvcore.palette import ACCENT
from pvcore.report import ReportError


def test_spread_moves_labels_apart_and_leaves_distant_ones_alone() -> None:
    assert canvas.spread([0.0, 100.0], 15.0) == [0.0, 100.0]
    assert canvas.spread([50.0, 50.0], 10.0) == pytest.approx([45.0, 55.0])
    moved = canvas.spread([0.0, 1.0, 2.0, 90.0], 15.0)
    gaps = [after - before for before, after in pairwise(moved)]
    assert min(gaps) >= 15.0 - 1e-9
    assert sum(moved[:3]) == pytest.approx(3.0)  # least squares keeps the group's mean
    assert moved[3] == 90.0


def test_the_callers_matplotlib_settings_neither_matter_nor_change() -> None:
    def drawn() -> str:
        with canvas.style():
            figure = canvas.panels(1, 1, width=300, height=200)
            figure.axes[0].plot([0, 1], [2, 3], color=ACCENT.light)
            return canvas.svg(figure)

    plain = drawn()
    with matplotlib.rc_context({"lines.linewidth": 9.0, "font.size": 30.0, "svg.hashsalt": None}):
        before = dict(matplotlib.rcParams)
        assert drawn() == plain
        assert dict(matplotlib.rcParams) == before
    assert ACCENT.css in plain
    assert f"stroke: {ACCENT.light}" not in plain


def test_text_that_xml_forbids_or_matplotlib_would_parse_is_drawn_as_written() -> None:
    with canvas.style():
        figure = canvas.panels(1, 1, width=300, height=200)
        figure.axes[0].set_title(canvas.label("a\x00b\n$\\frac{1$ <b> 漢"))
        text = canvas.svg(figure)
    assert "a\ufffdb↵$\\frac{1$ &lt;b&gt; 漢" in text


def test_numbers_to_draw_are_one_finite_row_of_the_right_length() -> None:
    assert canvas.numbers([1.0, float("nan")], "scores", 2).shape == (2,)
    with pytest.raises(ReportError, match="got 1 scores; wanted 2"):
        canvas.numbers([1.0], "scores", 2)
    with pytest.raises(ReportError, match="got infinite scores"):
        canvas.numbers([1.0, float("inf")], "scores")
    with pytest.raises(ReportError, match="wanted one row of numbers"):
        canvas.numbers([], "scores")
    with pytest.raises(ReportError, match="got no curves"):
        canvas.require([], "curves")
