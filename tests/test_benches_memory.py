"""Memory: bytes are counted where they live, and a wrong result has none."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import pvcore as pv
from benches import memory
from benches.arms_checks import ERROR
from benches.engines import Engine
from benches.memory import MIB, QUICK, Census, beside_bank, live, task_of

CPU = torch.device("cpu")


def test_live_bytes_are_those_of_storages() -> None:
    before = sum(live().values())
    held = torch.zeros(1000)
    views = [held[:10], held.view(10, 100), held.view(50, 20).mT]
    assert sum(live().values()) - before == 4000
    assert len(views) == 3
    del held
    assert sum(live().values()) - before == 4000
    del views
    assert sum(live().values()) == before


def test_the_fullest_moment_counts_without_what_went_to_the_host() -> None:
    census = Census(every=1, device=CPU)
    kept = []
    scores = torch.zeros(1, 3)
    with census.across(None):
        for step in range(3):
            device = torch.zeros(1000)
            if step == 1:
                more = torch.zeros(500)
                kept.append(device.cpu())
                census(scores, scores)
                del more
            census(scores, scores)
        assert kept[0].untyped_storage().data_ptr() != device.untyped_storage().data_ptr()
    # One row of a thousand and, for a moment, five hundred more; the copy is the host's.
    assert census.peak() == 6000
    assert torch.zeros(1).cpu().shape == (1,)
    assert "cpu" not in vars(torch.Tensor)


def test_a_ring_does_not_grow_with_the_tokens() -> None:
    settings = replace(QUICK, vectors=64, layers=2)
    found = {}
    for tokens in (80, 160):
        task = task_of(2, replace(settings, new_tokens=tokens), CPU)
        found[tokens], checks = beside_bank(task, Engine.of("graph", CPU), 3)
        assert all(one.passed for one in checks.values()), checks
    # The bytes of scores that come with every token; the ring holds 64 of them.
    step = settings.layers * 2 * 64 * 4
    assert found[80] >= 64 * step
    assert found[160] - found[80] < 16 * step
    torch.compiler.reset()


def test_measures_every_batch_and_engine() -> None:
    made = memory.measure(QUICK, command="x")
    assert made.correct, made.checks
    assert list(made.cells) == [
        "beside the bank/batch 2/eager",
        "beside the bank/batch 2/graph (traced step)",
    ]
    eager, graph = made.cells.values()
    assert (eager.status, eager.reason) == ("not measured", memory.LEFT)
    for cell in (graph,):
        assert (cell.status, cell.unit, cell.target) == ("measured", "MiB", 64.0)
        assert cell.p50 is not None
        scores = QUICK.layers * 2 * QUICK.vectors * 4
        assert scores / MIB < cell.p50 < 1


def test_scores_that_are_lost_late_in_the_counted_reply_are_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    receive = pv.Seen.receive

    def lost(self: pv.Seen, call: Any, steps: torch.Tensor) -> None:
        receive(self, call, torch.cat([steps[:8], torch.zeros_like(steps[8:])]))

    monkeypatch.setattr(pv.Seen, "receive", lost)
    made = memory.measure(replace(QUICK, engines=("graph",)), command="x")
    wrong = [what for what, one in made.checks.items() if not one.passed]
    assert wrong == [f"batch 2, graph (traced step): {ERROR}"]
    assert {cell.status for cell in made.cells.values()} == {"failed"}


def test_no_bytes_are_told_beside_a_wrong_projection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "ERROR_BOUND", -1.0)
    made = memory.measure(replace(QUICK, engines=("graph",)), command="x")
    assert not made.correct
    assert {cell.status for cell in made.cells.values()} == {"failed"}
