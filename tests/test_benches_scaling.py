"""Scaling: each point is the job it says, and a wrong result has no speed."""

import re
from dataclasses import replace
from typing import get_args

import pytest
import torch

from benches import scaling
from benches.lockstep import Lap
from benches.peers.subject import Reply
from benches.scaling import Axis, Point, armed, error_of, point_of, slope, slope_told

AXES: tuple[Axis, ...] = get_args(Axis)


@pytest.mark.parametrize("axis", AXES)
def test_a_point_moves_along_its_axis_alone(axis: Axis) -> None:
    value = scaling.QUICK.values(axis, 2)[-1]
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
        assert point.delta is not None
        assert len(point.delta) == 16
        assert len(point.delta.unique(dim=0)) == value
        assert len(point.plan.interventions) == value
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


def test_every_axis_is_timed_and_has_a_slope_with_its_spread() -> None:
    made = scaling.measure(scaling.QUICK, command="x")
    assert made.correct, made.checks
    assert {cell.status for cell in made.cells.values()} == {"measured"}
    assert {cell.n for cell in made.cells.values()} == {scaling.QUICK.rounds}
    slopes = {key: told for key, told in made.workload.items() if key.startswith("fitted slope/")}
    assert len(slopes) == len(AXES)
    assert all(re.fullmatch(r"\S+ % \(\S+ to \S+\)", str(told)) for told in slopes.values())


def test_work_that_waits_for_the_end_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A monitor's rows may wait for many steps: the laps hold the generation to its end."""
    points = {value: point_of("vectors", value, scaling.QUICK) for value in (1, 3)}
    asked: dict[str, int] = {}

    def turns(arms: dict[str, object], **settings: object) -> dict[str, list[Lap]]:
        asked.update(arms=len(arms), generations=int(str(settings["generations"])))
        return {name: [Lap(wall=1.0, cpu=1.5 if "armed" in name else 1.0)] for name in arms}

    monkeypatch.setattr(scaling.lockstep, "take_turns", turns)
    assert scaling.timed(points, scaling.QUICK, what="x") == {1: [1.5], 3: [1.5]}
    assert asked == {"arms": 4, "generations": scaling.QUICK.rounds}


def test_layers_beyond_the_model_s_are_left_out() -> None:
    assert scaling.Settings().values("layers", 4) == (1, 2, 4)
    assert scaling.Settings().values("vectors", 4) == scaling.Settings().vectors


def test_a_slope_is_what_one_more_adds() -> None:
    told = slope_told({1: [1.01, 1.02], 3: [1.03, 1.06]})
    assert told == "+1.50 % (+1.20 to +1.80)"
    assert slope([1, 2, 4], [1.01, 1.02, 1.04]) == pytest.approx(0.01)
    assert slope([1, 10], [1.0, 1.0]) == pytest.approx(0.0)
    assert torch.is_tensor(point_of("batch", 2, scaling.QUICK).subject.ids)
