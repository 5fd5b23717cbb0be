"""Measurements: checks that can fail, ratios that mean something, records that are whole."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from typer.testing import CliRunner

from benches import arms_checks, lockstep, overhead, reading, record, rounds, run
from benches.arms import Reply, Task
from benches.bare_hooks import newest_rows, steering
from benches.random_models import random_qwen2, random_vectors, twin
from benches.record import Cell, Check, Record, RecordError
from benches.rounds import Lap

SETTINGS = overhead.QUICK
ARMS = {"again", "idle", "unarmed", "monitor", "read", "steer", "both"} | {
    f"hook {what}" for what in ("monitor", "read", "steer", "both")
}
PAIRED = "beside bare hooks, batch 1"


def sample(**changes: Any) -> Record:
    cells = {
        "batch 1/steer/CPU time": Cell(
            status="measured", p20=1.01, p50=1.02, p80=1.03, n=40, target=1.02
        ),
        "batch 1/traced/CPU time": Cell(status="unsupported", reason="no tracing here"),
    }
    known: dict[str, Any] = {
        "name": "overhead",
        "command": "python -m benches.run overhead",
        "commit": "0123456789abcdef",
        "date": "2026-11-24",
        "versions": {"torch": "2.13.0"},
        "device": {"kind": "cpu", "cores": 2, "threads": 1},
        "workload": {"ratio": "time beside plain", "hidden": 256},
        "checks": {"tokens": Check(worst=0, bound=0)},
        "cells": cells,
    }
    return Record(**(known | changes))


class TestRecord:
    def test_comes_back_as_it_was_written(self, tmp_path: Path) -> None:
        path = record.write(sample(), tmp_path / "results")
        assert path.name == "overhead.json"
        assert record.read(path) == sample()
        assert [one.name for one in path.parent.iterdir()] == ["overhead.json"]

    def test_an_interval_is_written_where_there_is_one(self, tmp_path: Path) -> None:
        sure = Cell(status="measured", p20=1.0, p50=1.1, p80=1.2, n=9, low=1.05, high=1.15)
        label = "batch 1/steer/CPU time"
        made = sample(cells={**sample().cells, label: sure})
        assert record.read(record.write(made, tmp_path)) == made
        written = json.loads(record.text_of(made))["cells"]
        assert (written[label]["low"], written[label]["high"]) == (1.05, 1.15)
        assert not {"low", "high"} & set(written["batch 1/traced/CPU time"])

    def test_refuses_a_file_with_anything_missing_or_unknown(self, tmp_path: Path) -> None:
        whole = json.loads(record.text_of(sample()))
        label = next(iter(whole["cells"]))
        damaged = [{k: v for k, v in whole.items() if k != key} for key in whole]
        damaged += [whole | {"host": "x"}, whole | {"cells": []}, whole | {"date": 3}]
        for key in whole["cells"][label]:
            entry = {k: v for k, v in whole["cells"][label].items() if k != key}
            damaged.append(whole | {"cells": {label: entry}})
        damaged.append(whole | {"checks": {"tokens": 0}})
        path = tmp_path / "overhead.json"
        for document in damaged:
            path.write_text(json.dumps(document))
            with pytest.raises(RecordError, match=r"overhead\.json"):
                record.read(path)
        path.write_text(json.dumps(whole))
        assert record.read(path) == sample()

    @pytest.mark.parametrize("text", ["", "{", "[]", "nul"])
    def test_refuses_what_is_no_json_object(self, tmp_path: Path, text: str) -> None:
        path = tmp_path / "overhead.json"
        path.write_text(text)
        with pytest.raises(RecordError, match=r"got overhead\.json, which"):
            record.read(path)

    def test_leaves_nothing_where_it_cannot_be_written(self, tmp_path: Path) -> None:
        (tmp_path / "results").write_text("a file")
        with pytest.raises(RecordError, match="cannot be written"):
            record.write(sample(), tmp_path / "results")
        assert (tmp_path / "results").read_text() == "a file"

    def test_holds_no_speed_when_a_check_failed(self) -> None:
        with pytest.raises(RecordError, match="although a check failed"):
            sample(checks={"tokens": Check(worst=1, bound=0)})

    @pytest.mark.parametrize("label", ["steer", "batch 1/steer", "a//b", "a/b/c/d"])
    def test_refuses_labels_that_have_no_place_in_a_table(self, label: str) -> None:
        with pytest.raises(RecordError, match="group/row/column"):
            sample(cells={label: Cell(status="failed")})

    @pytest.mark.parametrize(
        "cell",
        [
            {"status": "fine"},
            {"status": "failed", "p50": 1.0},
            {"status": "not measured", "n": 3},
            {"status": "measured", "p50": 1.0, "n": 3},
            {"status": "measured", "p20": 1.0, "p50": 1.0, "p80": 1.0},
            {"status": "measured", "p20": 1.1, "p50": 1.0, "p80": 1.2, "n": 3},
            {"status": "measured", "p20": 0.0, "p50": 1.0, "p80": 1.2, "n": 3},
            {"status": "measured", "p20": 1.0, "p50": 1.0, "p80": float("nan"), "n": 3},
            {"status": "measured", "p20": 1.0, "p50": "1", "p80": 1.2, "n": 3},
            {"status": "measured", "p20": 1.0, "p50": 1.1, "p80": 1.2, "n": 9, "low": 1.0},
            {"status": "measured", "p20": 1.0, "p50": 1.1, "p80": 1.2, "n": 9}
            | {"low": 1.12, "high": 1.2},
            {"status": "failed", "low": 1.0, "high": 1.0},
        ],
    )
    def test_refuses_a_cell_that_says_two_things(self, cell: dict[str, Any]) -> None:
        with pytest.raises(RecordError):
            Cell(**cell)

    def test_names_what_it_ran_on_but_not_the_machine(self) -> None:
        assert set(record.versions()) == {"python", *record.PACKAGES}
        assert record.device(torch.device("cpu"))["threads"] == torch.get_num_threads() == 1

    def test_names_the_commit_and_whether_the_tree_differs(self, tmp_path: Path) -> None:
        assert record.commit(tmp_path) == "unknown"
        identity = ["-c", "user.name=a", "-c", "user.email=a@b.example"]

        def git(*words: str) -> None:
            subprocess.run(["git", *identity, *words], cwd=tmp_path, check=True)

        git("init", "-q")
        (tmp_path / "code.py").write_text("x = 1\n")
        git("add", "code.py")
        git("commit", "-q", "-m", "first")
        clean = record.commit(tmp_path)
        assert len(clean) == 40
        (tmp_path / "untracked.json").write_text("{}")
        assert record.commit(tmp_path) == clean
        (tmp_path / "code.py").write_text("x = 2\n")
        assert record.commit(tmp_path) == f"{clean}+dirty"


class TestRounds:
    def test_a_ratio_is_taken_within_its_round(self) -> None:
        # Medians over all rounds would say 2.0 / 2.0; no round was slower than 1.5 times.
        below = [Lap(wall=w, cpu=w) for w in (1.0, 2.0, 4.0)]
        above = [Lap(wall=w, cpu=2 * w) for w in (1.5, 3.0, 6.0)]
        assert rounds.paired(above, below, clock="wall") == Cell(
            status="measured", p20=1.5, p50=1.5, p80=1.5, n=3
        )
        assert rounds.paired(above, below, clock="cpu", target=1.2).p50 == 3.0

    def test_the_spread_is_that_of_the_middle_three_fifths(self) -> None:
        assert rounds.spread([float(value) for value in range(1, 12)]) == (3.0, 6.0, 9.0)
        assert rounds.spread([1.25]) == (1.25, 1.25, 1.25)

    @pytest.mark.parametrize(
        ("count", "low", "high"),
        # Published tables of ranks for the median; 5 values can't hold it with such confidence.
        [(5, None, None), (6, 1, 6), (10, 2, 9), (20, 6, 15), (30, 10, 21)],
    )
    def test_the_interval_of_a_median_is_between_two_of_its_values(
        self, count: int, low: float | None, high: float | None
    ) -> None:
        values = [float(value) for value in range(count, 0, -1)]
        assert rounds.interval(values) == (low, high)
        made = rounds.measured(values, target=1.5)
        assert (made.low, made.high, made.target, made.n) == (low, high, 1.5, count)

    def test_every_job_runs_once_a_round_in_an_order_drawn_anew(self) -> None:
        ran: list[str] = []
        jobs: dict[str, rounds.Job] = {n: (lambda n=n: ran.append(n)) for n in "abcd"}
        laps = rounds.interleave(jobs, rounds=8)
        assert {name: len(one) for name, one in laps.items()} == dict.fromkeys("abcd", 8)
        orders = ["".join(ran[at : at + 4]) for at in range(4, len(ran), 4)]
        assert ran[:4] == list("abcd")
        assert all(sorted(order) == list("abcd") for order in orders)
        assert len(set(orders)) > 4

    def test_laps_measure_the_job_and_wait_for_the_device(self) -> None:
        calls: list[str] = []
        laps = rounds.interleave(
            {"job": lambda: calls.append("job")}, rounds=2, finish=lambda: calls.append("finish")
        )
        assert calls == ["job"] + ["finish", "job", "finish"] * 2
        assert all(lap.wall > 0 and lap.cpu > 0 and lap.step is None for lap in laps["job"])

    def test_a_job_may_time_its_own_steps(self) -> None:
        laps = rounds.interleave({"slow": lambda: 3.0, "fast": lambda: 2.0}, rounds=2)
        assert rounds.paired(laps["slow"], laps["fast"], clock="step").p50 == 1.5


@pytest.fixture(scope="module")
def task() -> Task:
    return overhead.tasks_of(SETTINGS)[2]


class TestArms:
    def test_the_twins_share_their_weights_and_nothing_else(self, task: Task) -> None:
        theirs, ours = (dict(hf.named_parameters()) for hf in (task.plain, task.model.hf))
        assert theirs.keys() == ours.keys()
        assert all(theirs[name] is ours[name] for name in theirs)
        assert not {id(m) for m in task.plain.modules()} & {id(m) for m in task.model.hf.modules()}

    def test_leave_no_hook_on_the_model_that_pvcore_never_met(self, task: Task) -> None:
        for arm in task.arms().values():
            arm()
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in task.plain.modules())
        assert any(m._forward_hooks for m in task.model.hf.modules())

    def test_the_checks_pass_and_cover_every_arm(self, task: Task) -> None:
        checks = arms_checks.check(task, task.arms())
        assert all(one.passed for one in checks.values()), checks
        assert {name.partition(":")[0] for name in checks} == ARMS - {"hook steer"}

    @pytest.mark.parametrize(
        ("arm", "broken"),
        [
            ("idle", lambda reply: replace(reply, tokens=reply.tokens + 1)),
            ("monitor", lambda reply: replace(reply, tokens=reply.tokens[:, :-1])),
            ("monitor", lambda reply: shifted(reply, 1e-3)),
            ("monitor", lambda reply: shifted(reply, float("nan"))),
            ("read", lambda reply: replace(reply, scores=None)),
            ("both", lambda reply: replace(reply, scores=None)),
            ("both", lambda reply: replace(reply, tokens=reply.tokens.roll(1, 0))),
            ("hook both", lambda reply: shifted(reply, 1e-3)),
        ],
    )
    def test_the_checks_fail_for_a_broken_arm(
        self, task: Task, arm: str, broken: Callable[[Reply], Reply]
    ) -> None:
        arms = task.arms()
        right = arms[arm]
        arms[arm] = lambda **extra: broken(right(**extra))
        wrong = {name for name, one in arms_checks.check(task, arms).items() if not one.passed}
        assert wrong
        assert {name.partition(":")[0] for name in wrong} == {arm}

    def test_the_checks_fail_for_logits_that_moved_without_moving_a_token(self, task: Task) -> None:
        arms = task.arms()
        tiny = 1e-6 * torch.ones(task.model.d_model)

        def moved(**extra: Any) -> Reply:
            with steering(task.blocks[0], tiny):
                return task.unhooked(task.plain, extra)

        assert torch.equal(moved().tokens, arms["plain"]().tokens)
        assert not arms_checks.check(task, arms | {"idle": moved})[
            "idle: tokens and logits unlike plain's"
        ].passed

    def test_the_checks_fail_when_steering_changes_nothing(self, task: Task) -> None:
        idle = replace(task, coeff=0.0)
        wrong = [n for n, one in arms_checks.check(idle, idle.arms()).items() if not one.passed]
        assert wrong == ["steer: replies it left as they were"]

    def test_a_bare_hook_leaves_the_prompt_alone(self, task: Task) -> None:
        deltas = task.delta
        block = task.blocks[task.layer]
        given = {"attention_mask": task.given["attention_mask"], "use_cache": False}
        with torch.no_grad(), newest_rows([block]) as before:
            hidden = task.plain.model(task.given["input_ids"], **given).last_hidden_state
        with torch.no_grad(), steering(block, deltas), newest_rows([block]) as after:
            moved = task.plain.model(task.given["input_ids"], **given).last_hidden_state
        torch.testing.assert_close(after[0], before[0] + deltas)
        assert torch.equal(hidden[:, :-1], moved[:, :-1])
        assert not torch.equal(hidden[:, -1], moved[:, -1])


def shifted(reply: Reply, by: float) -> Reply:
    assert reply.scores is not None
    scores = reply.scores()
    return replace(reply, scores=lambda: scores + by * scores.norm())


class TestOverhead:
    def test_measures_every_arm_in_three_ways(self) -> None:
        made = overhead.measure(SETTINGS, command="python -m benches.run overhead --quick")
        assert made.correct
        assert len(made.cells) == len(SETTINGS.batches) * (len(ARMS) + len(overhead.PAIRS)) * 3
        assert {cell.status for cell in made.cells.values()} == {"measured"}
        assert {(label.split("/")[-1], cell.n) for label, cell in made.cells.items()} == {
            (overhead.STEP, SETTINGS.generations),
            (overhead.WHOLE, SETTINGS.rounds),
            (overhead.WALL, SETTINGS.rounds),
        }
        wanted = {label: cell.target for label, cell in made.cells.items() if cell.target}
        assert {label.split("/")[0] for label in wanted} == {"batch 1", PAIRED}
        assert sorted(wanted.values()) == [1.0] * 3 + [1.01] * 3 + [1.02] * 3 + [1.03] * 3
        assert set(overhead.ROWS) == ARMS

    def test_ways_are_held_beside_bare_hooks_lap_by_lap(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        laps = {
            name: [Lap(wall=n * k, cpu=n * k) for k in (1.0, 10.0)]
            for n, name in enumerate(["plain", *overhead.ROWS], 1)
        }
        monkeypatch.setattr(lockstep, "take_turns", lambda *_, **__: laps)
        monkeypatch.setattr(rounds, "interleave", lambda *_, **__: laps)
        cells = overhead._timed(1, overhead.tasks_of(SETTINGS)[1], SETTINGS)
        name = overhead.ROWS["monitor"].format(vectors=7, layers=SETTINGS.shape.layers)
        found = cells[f"{PAIRED}/{name}/decoding"]
        places = list(overhead.ROWS)
        share = (places.index("monitor") + 2) / (places.index("hook monitor") + 2)
        assert found.p50 == pytest.approx(share, abs=1e-4)
        assert found.target == 1.0

    def test_a_gpu_is_not_waited_for_after_every_token(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked: list[Any] = []

        def alternate(arms: Any, **given: Any) -> lockstep.Phases:
            asked.append(given["finish"])
            return lockstep.Phases(prompts={}, decoding={name: [] for name in arms})

        monkeypatch.setattr(lockstep, "alternate", alternate)
        monkeypatch.setattr(lockstep, "take_turns", lambda *_, **__: pytest.fail("by tokens"))
        found = overhead._steps(1, {"plain": list}, SETTINGS, on_gpu=True)
        assert found == {"plain": []}
        assert asked == [torch.cuda.synchronize]

    def test_reports_no_speed_after_a_failed_check(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def failing(*_: object) -> dict[str, Check]:
            return {"idle: tokens": Check(worst=3, bound=0), "fine": Check(worst=0, bound=0)}

        monkeypatch.setattr(overhead, "check", failing)
        for module, name in ((rounds, "interleave"), (lockstep, "take_turns")):
            monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("timed anyway"))
        made = overhead.measure(SETTINGS, command="")
        assert not made.correct
        assert {(cell.status, cell.p50, cell.n) for cell in made.cells.values()} == {
            ("failed", None, 0)
        }
        assert {cell.reason for cell in made.cells.values()} == {"batch 1, idle: tokens"}

    def test_measures_a_model_from_a_folder(self, tmp_path: Path) -> None:
        random_qwen2(SETTINGS.shape, seed=3).save_pretrained(tmp_path)
        settings = replace(SETTINGS, model=str(tmp_path), batches=(1,))
        (only,) = overhead.tasks_of(settings).values()
        random = overhead.tasks_of(SETTINGS)[1]
        given, other = (t.plain.get_input_embeddings().weight for t in (only, random))
        assert not torch.equal(given, other)
        assert all(one.passed for one in arms_checks.check(only, only.arms()).values())

    def test_measures_the_shape_of_a_config(self, tmp_path: Path) -> None:
        config = LlamaConfig(
            vocab_size=128,
            hidden_size=96,
            intermediate_size=128,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
        config.save_pretrained(tmp_path)
        settings = replace(SETTINGS, model=str(tmp_path / "config.json"), batches=(2,))
        made = overhead.measure(settings, command="x")
        assert made.correct, made.checks
        assert made.workload["model"] == "llama, random weights"
        assert (made.workload["hidden"], made.workload["layers"]) == (96, 3)
        assert str(tmp_path) not in json.dumps(asdict(made))


class TestReading:
    def test_measures_the_same_numbers_in_less_time(self) -> None:
        made = reading.measure(reading.QUICK, command="python -m benches.run reading --quick")
        assert made.correct, made.checks
        assert {cell.status for cell in made.cells.values()} == {"measured"}
        assert len(made.cells) == 2 * len(reading.QUICK.cases)

    def test_both_ways_agree_with_residuals_taken_by_a_hook(self) -> None:
        (case,) = reading.QUICK.cases
        tokenizer = reading.chat_tokenizer()
        task = reading.task_of(case, tokenizer, seed=0)
        plain = random_qwen2(case.shape, seed=0)
        chat = reading.conversations(case, seed=0)[0]
        ids = tokenizer.apply_chat_template(chat, return_dict=False)
        start = len(
            tokenizer.apply_chat_template(chat[:-1], add_generation_prompt=True, return_dict=False)
        )
        end = start + len(tokenizer(chat[-1]["content"], add_special_tokens=False)["input_ids"])
        kept: list[torch.Tensor] = []
        layer = 1  # layer 20 of 28 is layer 2 of 3 in the paper's count
        plain.model.layers[layer].register_forward_hook(lambda _m, _a, out: kept.append(out[0]))
        with torch.no_grad():
            plain(torch.tensor([ids]))
        vectors = random_vectors(case.shape.hidden, [layer], seed=0)
        units = torch.stack([vector.unit().directions[0] for vector in vectors]).double()
        exact = units @ kept[0][start:end].double().mean(0)
        torch.testing.assert_close(task.paper()[0].double(), exact, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(task.ours()[0].double(), exact, rtol=1e-4, atol=1e-5)
        assert exact.abs().min() > 1e-3

    @pytest.mark.parametrize(
        "broken", [lambda table: table * 1.001, lambda table: table[1:], torch.zeros_like]
    )
    def test_the_check_fails_for_other_numbers(
        self, broken: Callable[[torch.Tensor], torch.Tensor]
    ) -> None:
        table = torch.randn(6, 7)
        task = reading.Task(paper=lambda: table, ours=lambda: broken(table))
        assert not reading.check(task)["error of a projection"].passed
        right = reading.Task(paper=lambda: table, ours=table.clone)
        assert all(one.passed for one in reading.check(right).values())

    def test_the_check_fails_where_every_conversation_looks_alike(self) -> None:
        table = torch.ones(6, 7)
        task = reading.Task(paper=lambda: table, ours=lambda: table)
        wrong = [name for name, one in reading.check(task).items() if not one.passed]
        assert wrong == ["vectors along which all conversations look alike"]

    def test_reports_no_speed_after_a_failed_check(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(reading, "check", lambda _: {"error": Check(worst=1, bound=0)})
        monkeypatch.setattr(rounds, "interleave", lambda *_, **__: pytest.fail("timed anyway"))
        made = reading.measure(reading.QUICK, command="")
        assert {cell.status for cell in made.cells.values()} == {"failed"}


class TestCommandLine:
    def test_a_quick_run_keeps_no_record_unless_told_where(self, tmp_path: Path) -> None:
        before = sorted(record.RESULTS.glob("*"))
        result = CliRunner().invoke(run.app, ["reading", "--quick", "--rounds", "1"])
        assert result.exit_code == 0, result.output
        assert "wrote" not in result.output
        assert sorted(record.RESULTS.glob("*")) == before
        words = ["reading", "--quick", "--rounds", "1", "--out", str(tmp_path)]
        assert CliRunner().invoke(run.app, words).exit_code == 0
        made = record.read(tmp_path / "reading.json")
        assert made.command == "python -m benches.run reading --quick --rounds 1"

    def test_a_failed_check_is_recorded_and_fails_the_command(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        failed = sample(checks={"tokens": Check(worst=1, bound=0)}, cells={})
        monkeypatch.setattr(overhead, "measure", lambda *_, **__: failed)
        result = CliRunner().invoke(run.app, ["overhead", "--quick", "--out", str(tmp_path)])
        assert result.exit_code == 1
        assert not record.read(tmp_path / "overhead.json").correct


def test_a_twin_is_a_model_of_its_own() -> None:
    plain = random_qwen2(SETTINGS.shape)
    other = twin(plain)
    other.model.layers[0].register_forward_hook(lambda *_: None)
    assert not plain.model.layers[0]._forward_hooks
    assert other.generation_config is not plain.generation_config
