"""The cost inside compiled generation: every way right, a wrong one without a speed."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import pvcore as pv
from benches import compiled, engines, lockstep
from benches.arms import Reply
from benches.compiled import COLUMNS, QUICK, QUIET, ROWS, Ways
from benches.random_models import twin
from tests.static_caches import lengths_made


@pytest.fixture
def ways() -> Iterator[Ways]:
    yield Ways(QUICK, 2)
    torch.compiler.reset()


def test_measures_every_way_beside_plain_compiled_generation() -> None:
    made = compiled.measure(QUICK, command="x")
    assert made.correct
    assert len(made.cells) == len(QUIET) + len(ROWS) * len(COLUMNS)
    assert {cell.status for cell in made.cells.values()} == {"measured"}
    assert {cell.n for cell in made.cells.values()} == {QUICK.larger}
    assert "a static cache of 64 columns" in str(made.workload["ratio"])
    assert "transformers' own of 20" in str(made.workload["ratio"])


def test_plain_s_own_cache_is_as_long_as_transformers_makes_it(
    ways: Ways, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = lengths_made(monkeypatch)
    ways.runs["own"]()
    assert lengths == [QUICK.prompt_tokens + QUICK.new_tokens - 1]


def test_the_idle_step_has_the_taps_in_it(ways: Ways) -> None:
    assert torch.equal(ways.runs["idle"]().tokens, ways.runs["plain"]().tokens)
    other = pv.HookedModel(twin(ways.task.plain), model_id="")
    add = pv.Add(ways.task.vectors[0], coeff=1.0)
    # Were no tap traced, a plan armed anywhere would not matter to the step.
    with pytest.raises(torch._dynamo.exc.Unsupported), other.steer(add):
        ways.runs["idle"]()


def test_ways_that_share_compiled_code_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "step_of", lambda hf: hf.__call__)
    failed = [what for what, one in Ways(QUICK, 2).checks().items() if not one.passed]
    assert "batch 2, idle: graphs more or less than one" in failed
    monkeypatch.setattr(engines, "step_of", lambda hf: torch.compiler.disable(hf.__call__))
    failed = [what for what, one in Ways(QUICK, 2).checks().items() if not one.passed]
    assert "batch 2, plain: graphs more or less than one" in failed


def test_a_way_that_steers_nothing_or_reports_wrongly_is_found(
    ways: Ways, monkeypatch: pytest.MonkeyPatch
) -> None:
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
