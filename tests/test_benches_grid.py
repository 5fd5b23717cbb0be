"""The grid: every row right by raw hooks before it is timed, and nothing said where it is not."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from benches import gpu_grid, grid, grid_checks, lockstep, record, report
from benches.arms import Reply, Task
from benches.engines import Engine, plain_run
from benches.grid import QUICK
from benches.grid_arms import AGAIN, IDLE, PLAIN, Way, compared, runs_of, ways
from benches.grid_checks import References, Tape, check, relative
from tests.static_caches import lengths_made

CPU = torch.device("cpu")
NO_GPU_HERE = pytest.mark.skipif(torch.cuda.is_available(), reason="another version: a GPU is here")


@pytest.fixture(scope="module")
def task() -> Task:
    plain = grid.loaded(None, QUICK.shape)
    return grid.task_of(plain, grid.pv.HookedModel(grid.twin(plain), model_id=""), 2, QUICK)


@pytest.fixture(scope="module")
def references(task: Task) -> References:
    return References(task)


def test_rows_cover_vectors_layers_and_both() -> None:
    found = ways((1, 7, 128), 4)
    assert len(found) == 2 * 3 + 3
    assert found["monitor 1 vector at one layer"] == Way(vectors=1, watched=(2,))
    assert found["monitor 128 vectors at 4 layers"].watched == (0, 1, 2, 3)
    assert found["steer 4 layers"] == Way(steered=(0, 1, 2, 3))
    both = found["monitor 7 vectors at 4 layers, steer one"]
    assert (both.vectors, both.watched, both.steered) == (7, (0, 1, 2, 3), (2,))
    assert sum(way.key for way in found.values()) == 4


def test_some_vectors_stand_for_a_large_bank() -> None:
    assert compared(3) == [0, 1, 2]
    assert len(compared(512)) == 8
    assert {0, 511} <= set(compared(512))


@pytest.mark.parametrize("name", ["eager", "graph"])
def test_every_row_does_what_raw_hooks_do(references: References, name: Any) -> None:
    engine = Engine.of(name, CPU)
    rows = {row: way for row, way in ways(QUICK.vectors, 2).items() if name == "eager" or way.key}
    runs, graphs = runs_of(references.task, engine, rows), int(name == "graph")
    checks, checked = check(references, runs, rows, graphs=graphs)
    assert all(one.passed for one in checks.values()), checks
    assert checked == {PLAIN, AGAIN, IDLE, *rows}
    kinds = {what.partition(";")[0] for what in checks}
    assert kinds == {
        f"graphs more or less than {graphs}",
        "tokens unlike raw hooks'",
        "share of replies that steering left as they were",
        "error of a projection, reply",
        "error of a projection, prompt",
    }
    again, _ = check(references, runs, rows, graphs=graphs)
    assert all(one.passed for one in again.values()) == (name == "eager")
    torch.compiler.reset()


def test_compiled_idle_steps_are_timed_while_nothing_is_armed() -> None:
    runs: dict[str, Any] = dict.fromkeys([PLAIN, AGAIN, IDLE, "steer one layer"], list)
    for name, wanted in (
        ("eager", [{PLAIN, AGAIN, IDLE, "steer one layer"}]),
        ("graph", [{PLAIN, AGAIN, IDLE}, {PLAIN, "steer one layer"}]),
    ):
        engine = Engine.of(name, CPU)  # type: ignore[arg-type]
        group = grid.Group(engine=engine, batch=1, rows={}, missing={})
        assert [set(one) for one in grid._companies(group, runs)] == wanted


def moved(reply: Reply, table: str) -> Reply:
    made = getattr(reply, table)()
    return replace(reply, **{table: lambda: made + 1e-3 * made.nan_to_num().norm()})


BROKEN: Mapping[str, tuple[str, Callable[[Reply], Reply]]] = {
    "tokens": ("tokens unlike", lambda reply: replace(reply, tokens=reply.tokens + 1)),
    "short": ("tokens unlike", lambda reply: replace(reply, tokens=reply.tokens[:, :-1])),
    "steps": ("projection, reply", lambda reply: moved(reply, "scores")),
    "prompt": ("projection, prompt", lambda reply: moved(reply, "prompt")),
    "missing": ("projection, reply", lambda reply: replace(reply, scores=None)),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_wrong_row_is_found(references: References, kind: str) -> None:
    what, broken = BROKEN[kind]
    name = "monitor 9 vectors at 2 layers"
    rows = {name: ways(QUICK.vectors, 2)[name]}
    runs = runs_of(references.task, Engine.of("eager", CPU), rows)
    right = runs[name]
    runs[name] = lambda **extra: broken(right(**extra))
    checks, _ = check(references, runs, rows)
    wrong = [one for one, found in checks.items() if not found.passed]
    assert len(wrong) == 1
    assert what in wrong[0]
    assert wrong[0].endswith(f"worst: {name}")


def test_a_row_that_steers_nothing_is_found(task: Task) -> None:
    still = References(replace(task, coeff=0.0))
    rows = {"steer one layer": Way(steered=(1,))}
    checks, _ = check(still, runs_of(still.task, Engine.of("eager", CPU), rows), rows)
    wrong = [one for one, found in checks.items() if not found.passed]
    assert len(wrong) == 1
    assert wrong[0].startswith("share of replies that steering left")


def test_less_than_float32_is_held_to_logits_under_forced_tokens(task: Task) -> None:
    plain = copy.deepcopy(task.plain).bfloat16()
    model = grid.pv.HookedModel(grid.twin(plain), model_id="")
    low = References(replace(task, plain=plain, model=model))
    rows = {name: way for name, way in ways(QUICK.vectors, 2).items() if way.key or way.steered}
    runs = runs_of(low.task, Engine.of("eager", CPU), rows)
    checks, _ = check(low, runs, rows)
    assert all(one.passed for one in checks.values()), checks
    assert any(what.startswith("relative error of forced logits") for what in checks)
    steer = "steer one layer"
    for broken in (runs[PLAIN], runs["steer 2 layers"]):
        found, _ = check(low, {PLAIN: runs[PLAIN], steer: broken}, {steer: rows[steer]})
        wrong = [what for what, one in found.items() if not one.passed]
        assert any("forced logits" in what and what.endswith(steer) for what in wrong)


def test_a_tape_forces_the_tokens_it_is_given() -> None:
    tape = Tape(torch.tensor([[3, 1], [0, 2]]))
    first, second = (tape(torch.zeros(2, 1), torch.randn(2, 5)) for _ in range(2))
    assert first.argmax(1).tolist() == [3, 0]
    assert second.argmax(1).tolist() == [1, 2]
    assert [kept.shape for kept in tape.logits] == [(2, 5)] * 2
    assert relative(torch.ones(2), torch.ones(3)) == 1.0
    assert relative(torch.tensor([3.0, 0.0]), torch.tensor([3.0, 4.0])) == pytest.approx(0.8)


def test_measures_prompt_and_decoding_with_every_engine() -> None:
    made = grid.measure(QUICK, command="x")
    assert made.correct, made.checks
    measured = {label for label, cell in made.cells.items() if cell.status == "measured"}
    rows = {AGAIN, IDLE, *ways(QUICK.vectors, 2)}
    assert measured == {
        f"{engine}, batch 2/{row}/{column}"
        for engine in ("eager", "graph (traced step)")
        for row in rows
        for column in ("prefill", "decode")
    }
    rest = {label: cell for label, cell in made.cells.items() if label not in measured}
    assert {label: (one.status, one.reason) for label, one in rest.items()} == {
        "CUDA graphs/every row/decode": ("not measured", "no GPU")
    }
    groups = list(dict.fromkeys(label.split("/")[0] for label in made.cells))
    assert groups == ["eager, batch 2", "graph (traced step), batch 2", "CUDA graphs"]
    assert all(cell.unit == "ratio" for cell in made.cells.values())


def test_reports_no_speed_after_a_failed_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grid_checks, "SCORES", -1.0)
    monkeypatch.setattr(lockstep, "phases", lambda *_, **__: pytest.fail("timed anyway"))
    made = grid.measure(replace(QUICK, engines=("eager",)), command="x")
    assert not made.correct
    assert {cell.status for cell in made.cells.values()} == {"failed"}


def test_what_a_cpu_cannot_afford_says_why(task: Task) -> None:
    settings = replace(grid.Settings(), vectors=(7, 9))
    by_name = {one.engine.name: one for one in grid.groups(task, 8, settings)}
    assert not by_name["eager"].missing
    assert not by_name["compiled"].rows
    assert set(by_name["compiled"].missing.values()) == {grid.LEFT["compiled", 8]}
    graph = {one.engine.name: one for one in grid.groups(task, 256, settings)}["graph"]
    assert all(way.key for way in graph.rows.values())
    assert set(graph.missing) == {row for row, way in ways((7, 9), 2).items() if not way.key}


def test_rows_for_which_no_time_is_left_are_not_measured() -> None:
    made = grid.measure(replace(QUICK, engines=("eager",), minutes=0.0), command="x")
    cells = {label: one for label, one in made.cells.items() if not label.startswith("CUDA")}
    assert {(one.status, one.reason) for one in cells.values()} == {("not measured", grid.LATE)}
    assert len(cells) == 2 * (2 + len(ways(QUICK.vectors, 2)))


def test_measures_the_shape_of_a_config(tmp_path: Path) -> None:
    LlamaConfig(
        vocab_size=96,
        hidden_size=96,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
    ).save_pretrained(tmp_path)
    settings = replace(QUICK, model=str(tmp_path / "config.json"), engines=("eager",), key=True)
    made = grid.measure(settings, command="x")
    assert made.correct, made.checks
    assert made.workload["model"] == "llama, random weights"
    assert made.cells["eager, batch 2/steer one layer/decode"].status == "measured"
    assert made.cells["eager, batch 2/steer 3 layers/decode"].status == "not measured"


def test_plain_compiled_generation_has_a_cache_as_long_as_the_engine_s(
    task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = lengths_made(monkeypatch)
    engine = Engine.of("graph", torch.device("cpu"))
    plain = plain_run(task, task.plain, engine)()
    ours = task.model.generate_ids(list(task.prompts), engine=engine.graph, **task.settings)
    assert torch.equal(torch.stack(ours), plain.tokens)
    assert len(lengths) == 2
    assert lengths[0] == lengths[1]


@NO_GPU_HERE
def test_without_a_gpu_the_reduced_grid_says_so(tmp_path: Path) -> None:
    made = gpu_grid.measure(gpu_grid.SHAPE, 1.0, command="x")
    assert {(cell.status, cell.reason) for cell in made.cells.values()} == {
        ("not measured", "no GPU")
    }
    assert record.read(record.write(made, tmp_path)) == made
    assert gpu_grid.SHAPE.exists()


def test_the_reduced_grid_and_the_long_prompt_are_one_record_with_targets() -> None:
    vectors = {"vectors": (7, 9), "engines": ("eager",), "key": True}
    made = grid.measure(replace(QUICK, **vectors), command="x")  # type: ignore[arg-type]
    joined = gpu_grid.joined("gpu_grid_llama", made, made)
    assert joined.correct
    assert joined.name == "gpu_grid_llama"
    assert len(joined.cells) == 2 * len(made.cells)
    assert len(joined.checks) == 2 * len(made.checks)
    assert not any(cell.target for cell in joined.cells.values())
    failed = {"x": record.Check(worst=1, bound=0)}
    cells = dict.fromkeys(made.cells, record.Cell(status="failed"))
    wrong = replace(made, checks=failed, cells=cells)
    for pair in ((made, wrong), (wrong, made)):
        assert {one.status for one in gpu_grid.joined("x", *pair).cells.values()} == {"failed"}


@pytest.mark.parametrize(
    ("label", "target"),
    [
        ("CUDA graphs, batch 1/monitor 128 vectors at 28 layers/decode", 1.005),
        ("CUDA graphs, batch 32/monitor 128 vectors at 28 layers/decode", 1.003),
        ("CUDA graphs, batch 32/monitor 7 vectors at 28 layers/decode", 1.002),
        ("CUDA graphs, batch 1/steer one layer/decode", 1.001),
        ("CUDA graphs, batch 1/monitor 7 vectors at 28 layers, steer one/decode", None),
        ("CUDA graphs, batch 1/steer one layer/prefill", None),
        ("eager, batch 1/steer one layer/decode", None),
        (f"{gpu_grid.LONG_GROUP}eager, batch 1/monitor 128 vectors at 28 layers/prefill", 1.003),
        (f"{gpu_grid.LONG_GROUP}eager, batch 1/monitor 128 vectors at 28 layers/decode", None),
    ],
)
def test_what_is_wanted_of_a_gpu_stands_beside_its_figure(label: str, target: float | None) -> None:
    cell = record.Cell(status="measured", p20=1.0, p50=1.0, p80=1.0, n=3)
    assert gpu_grid.aimed(label, cell).target == target
    left = record.Cell(status="not measured", reason=grid.LATE)
    assert gpu_grid.aimed(label, left) == left


def test_every_shape_has_a_record_that_documents_show() -> None:
    llama = gpu_grid.SHAPE.with_name("llama-3.1-8b.json")
    assert llama.exists()
    names = [gpu_grid.name_of(shape) for shape in (gpu_grid.SHAPE, llama)]
    assert names == ["gpu_grid", "gpu_grid_llama"]
    assert set(names) <= set(report.KNOWN)


def test_times_are_given_by_token_where_a_gpu_may_report_them() -> None:
    engine = Engine.of("eager", CPU)
    group = grid.Group(engine=engine, batch=1, rows={}, missing={})
    lap = lockstep.Lap(wall=0.3, cpu=9.0)
    laps = lockstep.Phases(prompts={PLAIN: [lap]}, decoding={PLAIN: [lap]})
    cells = grid._absolute(group, laps, 3)
    assert {label: (cell.p50, cell.unit) for label, cell in cells.items()} == {
        "eager, batch 1/plain/prefill time": (300.0, "ms"),
        "eager, batch 1/plain/decode time a token": (100.0, "ms"),
    }
