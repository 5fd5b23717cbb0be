"""The cost inside compiled generation: every way right, a wrong one without a speed."""

from typing import Any

import pytest
import torch

from benches import compiled, lockstep
from benches.arms import Reply
from benches.compiled import QUICK, ROWS, Ways


def test_measures_every_way_beside_plain_compiled_generation() -> None:
    made = compiled.measure(QUICK, command="x")
    assert made.correct
    assert len(made.cells) == len(ROWS)
    assert {cell.status for cell in made.cells.values()} == {"measured"}
    assert {cell.n for cell in made.cells.values()} == {QUICK.generations}


def test_a_way_that_steers_nothing_or_reports_wrongly_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ways = Ways(QUICK, 2)
    assert all(one.passed for one in ways.checks().values())
    right = dict(ways.runs)
    wrong = right["monitor"]()
    assert wrong.scores is not None
    off = wrong.scores() + 0.1

    def shifted(**_: Any) -> Reply:
        return Reply(tokens=wrong.tokens, scores=lambda: off)

    for name, broken in (("steer", right["plain"]), ("monitor", shifted), ("idle", right["steer"])):
        ways.runs = right | {name: broken}
        failed = [what for what, one in ways.checks().items() if not one.passed]
        assert failed
        assert all(what.startswith(f"batch 2, {name}: ") for what in failed)
    monkeypatch.setattr(lockstep, "take_turns", lambda *_, **__: pytest.fail("timed anyway"))
    monkeypatch.setattr(compiled, "ERROR_BOUND", -1.0)
    refused = compiled.measure(QUICK, command="x")
    assert not refused.correct
    assert {cell.status for cell in refused.cells.values()} == {"failed"}
    torch.compiler.reset()
