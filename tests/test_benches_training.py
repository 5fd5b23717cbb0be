"""The cost of prevention: the arms do what they say, and a wrong one has no speed."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benches import training
from benches.training import CLOCKS, QUICK, ROWS, Task, apart, task_of


def test_each_arm_trains_as_it_says() -> None:
    task = task_of(QUICK)
    plain = task.gradients("plain")
    one, every = task.gradients("one"), task.gradients("all")
    assert apart(one, task.gradients("hook one")) <= 1e-6
    assert apart(every, task.gradients("hook all")) <= 1e-6
    assert min(apart(one, plain), apart(every, plain), apart(one, every)) > 1e-4
    assert task.layers("one") == task.layers("hook one") == [1]
    assert task.layers("all") == task.layers("hook all") == [0, 1]


def test_a_job_takes_its_steps_and_leaves_the_model_as_it_was() -> None:
    task = task_of(QUICK)
    before = [weight.detach().clone() for weight in task.hf.parameters()]
    for arm in ("plain", *ROWS):
        task.job(arm)()
    now = list(task.hf.parameters())
    assert 0 < apart([one.detach() for one in now], before) < 1e-6
    with torch.no_grad():
        assert not torch.isnan(task.loss(task.hf))


def test_measures_every_arm_beside_the_plain_one() -> None:
    made = training.measure(QUICK, command="x")
    assert made.correct
    assert made.cells.keys() == {
        f"training step/{row}/{column}" for row in ROWS.values() for column in CLOCKS
    }
    assert {cell.status for cell in made.cells.values()} == {"measured"}
    assert made.cells["training step/`PreventionCallback` at one layer/CPU time"].target == 1.02


@pytest.mark.parametrize(
    "broken",
    [lambda right: [one + 0.1 for one in right], lambda right: None],
    ids=["other", "idle"],
)
def test_a_wrong_arm_leaves_no_figure(
    monkeypatch: pytest.MonkeyPatch, broken: Callable[[list[Tensor]], Any]
) -> None:
    right = Task.gradients

    def gradients(self: Task, arm: str) -> list[Tensor]:
        return (
            broken(right(self, arm)) or right(self, "plain") if arm == "all" else right(self, arm)
        )

    monkeypatch.setattr(Task, "gradients", gradients)
    made = training.measure(QUICK, command="x")
    assert not made.correct
    assert {cell.status for cell in made.cells.values()} == {"failed"}
