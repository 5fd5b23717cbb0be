"""The breakdown: each part does what it says and no more, and a wrong one has no speed."""

import pytest

from benches import breakdown, overhead
from benches.breakdown import arms, check, rows_kept, unscored
from benches.record import Check


@pytest.fixture(scope="module")
def task() -> overhead.Task:
    (found,) = overhead.tasks_of(breakdown._as_overhead(breakdown.QUICK)).values()
    return found


def test_parts_leave_out_what_they_say(task: overhead.Task) -> None:
    steps = task.new_tokens - 1
    assert rows_kept(task) == steps > 0
    with unscored(task) as seen:
        task.model.generate_ids(list(task.prompts), **task.settings)
        ((held),) = seen._records.values()
    assert held.steps == []
    assert len(arms(task)["monitor"]().scores()) == task.new_tokens  # type: ignore[misc]


def test_the_ways_are_checked(task: overhead.Task, monkeypatch: pytest.MonkeyPatch) -> None:
    found = check(task)
    assert {name for name, one in found.items() if not one.passed} == set()
    assert len(found) == len(arms(task)) + 1
    monkeypatch.setattr(breakdown, "rows_kept", lambda task: 0)
    assert not check(task)["steps whose rows are not kept"].passed


def test_every_part_has_its_figures_and_a_wrong_one_none(monkeypatch: pytest.MonkeyPatch) -> None:
    made = breakdown.measure(breakdown.QUICK, command="c")
    assert len(made.cells) == 2 * len(breakdown.PARTS)
    assert {cell.status for cell in made.cells.values()} == {"measured"}
    monkeypatch.setattr(breakdown, "check", lambda task: {"tokens": Check(worst=1, bound=0)})
    refused = breakdown.measure(breakdown.QUICK, command="c")
    assert {cell.status for cell in refused.cells.values()} == {"failed"}
