"""The cost of pooling: every way gives the same vectors, and a wrong one has no speed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benches import paper_loop, pooling
from benches.pooling import COLUMNS, FASTER, QUICK, ROWS, Task, task_of
from benches.pooling_memory import peak
from benches.reading import chat_tokenizer


def quick() -> Task:
    return task_of(QUICK.cases[0], chat_tokenizer(), seed=0)


def test_the_bare_forward_runs_the_batches_of_the_pass() -> None:
    task = quick()
    seen: dict[str, list[tuple[int, ...]]] = {"bare": [], "pass": []}
    task.plain.model.layers[0].register_forward_pre_hook(
        lambda _block, args: seen["bare"].append(tuple(args[0].shape))
    )
    task.model.hf.model.layers[0].register_forward_pre_hook(
        lambda _block, args: seen["pass"].append(tuple(args[0].shape))
    )
    task.bare()
    task.passed()
    assert seen["bare"] == seen["pass"]
    assert sum(rows for rows, *_ in seen["bare"]) == len(task.chats)


def test_the_published_loop_does_so_much_more_arithmetic() -> None:
    task = quick()
    config = task.plain.config
    body = sum(w.numel() for layer in task.plain.model.layers for w in layer.parameters())
    body += task.plain.model.norm.weight.numel()
    more = 1 + config.vocab_size * config.hidden_size / body
    assert more / 2 < task.flop_bound() <= more


def test_measures_every_way_beside_the_bare_forward_and_the_loop(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pooling, "_peak", lambda _settings, conversations: 100 + conversations)
    made = pooling.measure(QUICK, command="x")
    assert made.correct
    (case,) = QUICK.cases
    labels = [f"{case}/{row}" for row in ROWS.values()]
    labels.append(f"published loop beside ours, {case}/{FASTER}")
    assert set(made.cells) == {f"{label}/{column}" for label in labels for column in COLUMNS} | {
        "peak memory/8 conversations beside 4/resident"
    }
    assert {cell.status for cell in made.cells.values()} == {"measured"}
    assert made.cells["peak memory/8 conversations beside 4/resident"].p50 == 1.0385
    pool = made.cells[f"{case}/{ROWS['pool']}/CPU time"]
    assert pool.target == pytest.approx(1 / 0.9, abs=1e-4)


def test_memory_is_that_of_a_process_of_its_own() -> None:
    alone = pooling._peak(QUICK, 4)
    assert 100_000 < alone < 4_000_000  # KiB: torch and transformers are in it
    held = bytearray(600 << 20)
    held[:: 1 << 12] = b"x" * (len(held) >> 12)  # in memory, page by page
    assert pooling._peak(QUICK, 4) < alone + 200_000  # what this process holds is not counted
    assert peak() > 600 << 10


def test_a_wrong_vector_leaves_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    right = paper_loop.vectors

    def wrong(*given: Any) -> dict[str, torch.Tensor]:
        return {name: 1.01 * vector for name, vector in right(*given).items()}

    monkeypatch.setattr(paper_loop, "vectors", wrong)
    made = pooling.measure(QUICK, command="x")
    assert not made.correct
    assert {cell.status for cell in made.cells.values()} == {"failed"}
