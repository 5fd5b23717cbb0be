import re
from xml.etree import ElementTree

import pytest

from pvcore.report import ReportError
from pvcore.shift_plot import shift_over_steps


def test_lines_start_at_zero_and_end_where_the_last_checkpoint_stands() -> None:
    svg = shift_over_steps([10, 20], {"evil": [1.0, 4.0], "humor": [0.0, 2.0]}, site="resid_post.2")
    for text in ("training step", "shift at resid_post.2", "evil", "humor"):
        assert f">{text}</text>" in svg
    paths = ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}path")
    lines = [
        [(float(x), float(y)) for x, y in re.findall(r"(-?[\d.]+) (-?[\d.]+)", path.attrib["d"])]
        for path in paths
    ]
    evil, humor = (line for line in lines if len(line) == 3 and line[0][0] < line[1][0])
    assert evil[0] == humor[0]
    rise = [start[1] - end[1] for start, end in ((evil[0], evil[2]), (humor[0], humor[2]))]
    assert rise[0] == pytest.approx(2 * rise[1], rel=1e-4)
    assert rise[0] > 10


def test_a_step_0_that_was_measured_stands_for_itself() -> None:
    drawn = [
        shift_over_steps(steps, {"evil": shifts}, site="resid_post.2")
        for steps, shifts in (
            ([10], [4.0]),
            ([0, 10], [0.0, 4.0]),
            ([0, 10], [2.0, 4.0]),
            ([0], [1]),
        )
    ]
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize("steps", [[20, 10], [-1, 10], [10, 10]])
def test_steps_out_of_order_are_refused(steps: list[int]) -> None:
    with pytest.raises(ReportError, match="from 0 and in order"):
        shift_over_steps(steps, {"evil": [1.0, 4.0]}, site="resid_post.2")
    with pytest.raises(ReportError, match="no traits"):
        shift_over_steps(steps, {}, site="resid_post.2")
