"""Scaling: each point is the job it says, and a wrong result has no speed."""

from dataclasses import replace
from typing import get_args

import pytest
import torch

from benches import scaling
from benches.peers.subject import Reply
from benches.scaling import Axis, Point, armed, error_of, point_of, slope

AXES: tuple[Axis, ...] = get_args(Axis)


@pytest.mark.parametrize("axis", AXES)
def test_a_point_moves_along_its_axis_alone(axis: Axis) -> None:
    value = scaling.QUICK.values(axis)[-1]
    point = point_of(axis, value, scaling.QUICK)
    size, bank = point.subject.size, point.plan.monitor
    got = {
        "batch": size.batch,
        "context": size.prompt_tokens,
        "vectors": 0 if bank is None else len(bank),
        "layers": 0 if bank is None else len(bank.sites),
    }
    usual = {"batch": 1, "context": 16, "vectors": 7, "layers": scaling.QUICK.shape.layers}
    if axis == "configurations":
        assert len(set(point.subject.coeffs.tolist())) == value
        assert point.steered
    else:
        assert got == usual | {axis: value}
    assert error_of(point) <= scaling.SCORES_MAY_DIFFER


def test_a_wrong_result_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    point = point_of("vectors", 3, scaling.QUICK)
    right = armed(point)()
    assert right.scores is not None
    table = right.scores()
    for wrong in (
        Reply(tokens=right.tokens + 1, scores=lambda: table),
        Reply(tokens=right.tokens, scores=lambda: table + 0.1),
    ):
        monkeypatch.setattr(scaling, "armed", lambda _, wrong=wrong: lambda: wrong)
        assert error_of(point) > scaling.SCORES_MAY_DIFFER
    steered = point_of("configurations", 2, scaling.QUICK)
    plain = Reply(tokens=steered.subject.generate(steered.subject.plain))
    monkeypatch.setattr(scaling, "armed", lambda _: lambda: plain)
    assert error_of(steered) == 1.0


def test_one_wrong_point_leaves_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    def error(point: Point) -> float:
        return 1.0 if point.subject.size.vectors == 3 else 0.0

    monkeypatch.setattr(scaling, "error_of", error)
    made = scaling.measure(replace(scaling.QUICK, rounds=1), command="x")
    assert not made.correct
    assert {cell.status for cell in made.cells.values()} == {"failed"}


def test_a_slope_is_what_one_more_adds() -> None:
    assert slope([1, 2, 4], [1.01, 1.02, 1.04]) == pytest.approx(0.01)
    assert slope([1, 10], [1.0, 1.0]) == 0.0
    assert torch.is_tensor(point_of("batch", 2, scaling.QUICK).subject.ids)
