"""The scan's speed: what is timed does what it says, and a wrong scan has no speed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from benches import flagging
from benches.flagging import BARE, COLUMNS, PAPER, QUICK, Case, Settings, Task, most
from benches.random_models import Shape
from pvcore import flag_feed
from pvcore.flag_scan import Scorer

SHAPE = Shape(hidden=64, layers=3, vocabulary=2112)


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    return Task(QUICK.cases[0], tmp_path_factory.mktemp("flagging"), seed=0)


def test_the_bare_forward_runs_the_batches_of_the_scan_and_stops_where_it_does(
    task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = len(task.batches())
    monkeypatch.setattr(flag_feed, "FIRST", 4096)  # several portions, and batches within each
    ran: list[str] = []
    for layer in range(3):
        for model, name in ((task.hf, "bare"), (task.model.hf, "scan")):
            model.model.layers[layer].self_attn.register_forward_hook(
                lambda _m, _g, h, name=name, layer=layer: ran.append(
                    f"{name} {layer} {tuple(h[0].shape[:2])}"
                )
            )
    task.bare()()
    task.scan()
    bare = [line for line in ran if line.startswith("bare")]
    scan = [line.replace("scan", "bare") for line in ran if line.startswith("scan")]
    assert bare == [line for line in scan if "(1, 24)" not in line]  # the probe comes first
    assert {line.split()[1] for line in bare} == {"0", "1"}
    assert len(bare) > 2 * whole


def test_measures_each_case_against_what_it_says() -> None:
    made = flagging.measure(QUICK, command="x")
    assert made.correct
    first, second = QUICK.cases
    assert made.cells.keys() == {
        f"{case}/{what}/{column}"
        for case, what in ((first, BARE), (second, PAPER))
        for column in COLUMNS
    }
    targets = {cell.target for cell in made.cells.values()}
    assert targets == {round(1 / 0.9, 3), None}


def test_a_tap_at_the_last_block_is_checked_by_a_hook(tmp_path: Path) -> None:
    case = Case(shape=SHAPE, sites=(2,), conversations=4, against=BARE)
    deepest = Task(case, tmp_path, seed=0)
    assert all(one.passed for one in flagging.check(deepest, 4).values())
    wrong = deepest.paper(deepest.chats).double()  # after the final norm
    assert not torch.allclose(wrong, flagging.hooked(deepest, deepest.chats), rtol=0.1)


def test_a_wrong_scan_leaves_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Scorer.__call__

    def wrong(self: Scorer, samples: Any) -> Any:
        return right(self, samples) * 1.001

    monkeypatch.setattr(Scorer, "__call__", wrong)
    made = flagging.measure(QUICK, command="x")
    assert not made.correct
    assert {cell.status for cell in made.cells.values()} == {"failed"}


def test_the_bound_counts_what_is_skipped() -> None:
    qwen = Settings().cases[-1]
    assert 1.9 < most(qwen) < 2.0
    weights = sum(
        weight.numel()
        for name, weight in flagging.QwenShape(hidden=64, layers=2, vocabulary=100)
        .build(0)
        .named_parameters()
        if "layers.0" in name and "norm" not in name and "bias" not in name
    )
    block = 64 * (2 * 64 * (1 + 2 / 14) + 3 * 4864)
    assert weights == pytest.approx(block, rel=0.02)
