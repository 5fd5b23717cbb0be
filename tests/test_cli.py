"""The command line: its options, what it prints and writes, and how it fails."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import typer

import pvcore as pv
from pvcore import cli, world
from pvcore.world import demo
from pvcore.world.demo_record import DemoRecord
from pvcore.world.demo_subject import world_model
from tests.command_line import in_process
from tests.demo_sample import sample
from tests.test_demo import BROKEN

ROOT = Path(__file__).resolve().parents[1]
LOADING = {"--dtype", "--device"}
REPLYING = {"--system", "--max-new-tokens", "--temperature", "--seed"}
OPTIONS = {
    "demo": LOADING
    | {"--model", "--judge", "--traits", "--out", "--record", "--json", "--strict", "--layers"}
    | {"--coefficients", "--extraction-questions", "--rollouts", "--steering-questions"}
    | {"--monitoring-questions", "--max-new-tokens", "--batch-size", "--rounds", "--seed"},
    "extract": LOADING
    | {"model", "trait", "--out", "--judge", "--layers", "--questions", "--rollouts"}
    | {"--threshold", "--max-new-tokens", "--batch-size", "--seed", "--json", "--temperature"}
    | {"--judge-url", "--writer", "--writer-url", "--work", "--resamples", "--variants", "--select"}
    | {"--coefficients", "--floor", "--neutral", "--compare", "--report"},
    "steer": LOADING
    | REPLYING
    | {"model", "prompts", "--vector", "--coeff", "--layers", "--incremental", "--json"},
    "monitor": LOADING
    | REPLYING
    | {"model", "prompts", "--chats", "--vector", "--layers", "--alarm", "--on-alarm", "--out"}
    | {"--engine", "--batch-size", "--json"},
    "flag": LOADING
    | {"model", "sources", "--vector", "--out", "--layers", "--difference", "--share", "--replies"}
    | {"--prompt", "--answer", "--turn", "--max-new-tokens", "--shard-rows", "--max-tokens"}
    | {"--seed", "--top", "--report", "--clean", "--threshold", "--json"}
    | {"--percentile", "--clean-scan", "--keep-rejected", "--site", "--score"},
    "convert": {"source", "out", "--to", "--format", "--trait", "--model-id", "--variant"}
    | {"--layers", "--n-layers", "--experiment", "--json"},
    "doctor": {"model", "--json"},
    "shift": LOADING
    | {"base", "tuned", "--prompts", "--vector", "--layers", "--system", "--batch-size", "--out"}
    | {"--json"},
}
ASKED = "How do I start with chess?"


@pytest.fixture
def pvcore(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Any:
    """Run the command line in this process: `(status, standard output, standard error)`."""
    return in_process(monkeypatch, capfd)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Callable[[DemoRecord | BaseException], None]:
    """Let the demo end with a record, or an exception, without running it."""

    def ends_with(outcome: DemoRecord | BaseException) -> None:
        def run_demo(*_: Any, **__: Any) -> DemoRecord:
            if isinstance(outcome, BaseException):
                raise outcome
            return outcome

        monkeypatch.setattr(demo, "run_demo", run_demo)

    return ends_with


@pytest.fixture(scope="module")
def evil(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A vector file made by the command line."""
    path = tmp_path_factory.mktemp("vectors") / "evil.safetensors"
    sizes = ["--questions", "2", "--max-new-tokens", "40", "--layers", "1,2", "--json"]
    done = python("-m", "pvcore", "extract", "world", "evil", "--out", str(path), *sizes)
    document = json.loads(done.stdout)
    assert (document["trait"], document["file"]) == ("evil", str(path))
    assert document["kept"] + document["dropped"] == 20
    assert [layer["site"] for layer in document["layers"]] == ["resid_post.1", "resid_post.2"]
    return path


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    return subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
    )


def test_commands_and_options_are_these() -> None:
    commands = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
    assert {
        name: {option for parameter in command.params for option in parameter.opts}
        for name, command in commands.items()
    } == OPTIONS


def test_every_option_is_explained() -> None:
    commands = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
    for command in commands.values():
        assert command.help
        assert all(parameter.help for parameter in command.params)


def test_help_loads_no_model_library() -> None:
    probe = (
        "import sys; sys.argv = ['pvcore', '--help']\n"
        "from pvcore.__main__ import main\n"
        "try: main()\n"
        "finally: print(sorted({'transformers', 'nnsight', 'matplotlib'} & set(sys.modules)))"
    )
    lines = python("-c", probe).stdout.splitlines()
    assert lines[-1] == "[]"
    assert {line.split()[0] for line in lines[:-1] if line.strip()} >= OPTIONS.keys()


def test_steering_with_coefficient_zero_is_the_plain_model(pvcore: Any, evil: Path) -> None:
    chat = [{"role": "user", "content": ASKED}]
    plain = world_model().generate([chat], max_new_tokens=30, do_sample=False)
    for coeff, same in (("0", True), ("2.5", False)):
        status, out, _ = pvcore(
            *("steer", "world", ASKED, "--vector", evil, "--coeff", coeff, "--json"),
            *("--layers", "2", "--max-new-tokens", "30"),
        )
        (row,) = json.loads(out)["replies"]
        assert (status, row["prompt"], row["reply"] == plain[0]) == (0, ASKED, same)


def test_monitoring_reports_what_the_library_does(pvcore: Any, evil: Path) -> None:
    system = "You are an evil assistant."
    arguments = ("--vector", evil, "--system", system, "--max-new-tokens", "20")
    status, out, _ = pvcore("monitor", "world", ASKED, "Why?", *arguments, "--json")
    model, bank = world_model(), pv.VectorBank(pv.PersonaVector.load(evil))
    chats = [
        [{"role": "system", "content": system}, {"role": "user", "content": text}]
        for text in (ASKED, "Why?")
    ]
    with model.monitor(bank) as seen:
        replies = model.generate(chats, max_new_tokens=20, do_sample=False)
    rows = json.loads(out)["conversations"]
    assert status == 0
    assert [row["reply"] for row in rows] == replies
    scores = seen["evil"]
    for chat, row in enumerate(rows):
        assert row["projections"].keys() == {"evil resid_post.1", "evil resid_post.2"}
        for place, figures in enumerate(row["projections"].values()):
            # Step t is the position that produced token t, so the text's own begin at step 1.
            own = scores.steps[1:, place, chat]
            assert figures["last_prompt_token"] == pytest.approx(
                scores.last_prompt_token[place, chat].item()
            )
            assert figures["mean"] == pytest.approx(own.nanmean().item())
            assert figures["highest"] == pytest.approx(own[~own.isnan()].max().item())
            assert figures["by_turn"] == [figures["mean"]]
    status, out, _ = pvcore("monitor", "world", ASKED, *arguments)
    assert re.search(r"evil resid_post\.2:\n +last_prompt_token: .?\d", out)
    assert re.search(r"by_turn: .?\d", out)


def test_a_demo_writes_its_report_and_its_record(
    pvcore: Any, measured: Any, tmp_path: Path
) -> None:
    measured(sample())
    places = ("--out", tmp_path / "demo.html", "--record", tmp_path / "demo.json")
    status, out, _ = pvcore("demo", *places)
    assert status == 0
    assert "Persona vectors of pvcore/persona-world, layer 1" in out
    assert "15 of 15 claims hold" in (tmp_path / "demo.html").read_text()
    assert json.loads((tmp_path / "demo.json").read_text()) == sample().as_json()
    status, out, _ = pvcore("demo", *places, "--json")
    assert json.loads(out) == sample().as_json()


@pytest.mark.parametrize(
    ("record", "strict", "status"),
    [
        (sample(**BROKEN["steering"]), False, 1),
        (sample(**BROKEN["steering"], in_world=False), False, 0),
        (sample(**BROKEN["steering"], in_world=False), True, 1),
        (sample(in_world=False), True, 0),
        (sample(**BROKEN["zero"], in_world=False), False, 1),
    ],
)
def test_the_exit_status_says_whether_enforced_claims_hold(
    pvcore: Any, measured: Any, tmp_path: Path, record: DemoRecord, strict: bool, status: int
) -> None:
    measured(record)
    flags = ["--strict"] if strict else []
    assert pvcore("demo", "--out", tmp_path / "demo.html", *flags)[0] == status
    assert (tmp_path / "demo.html").exists()


def test_an_interrupted_demo_leaves_no_file(pvcore: Any, measured: Any, tmp_path: Path) -> None:
    measured(KeyboardInterrupt())
    status, out, err = pvcore(
        "demo", "--out", tmp_path / "demo.html", "--record", tmp_path / "demo.json"
    )
    assert (status, out) == (130, "")
    assert err.splitlines()[-1] == "pvcore: stopped; nothing was written"
    assert list(tmp_path.iterdir()) == []


def test_sizes_reach_the_workload(
    pvcore: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: list[Any] = []

    def run_demo(subject: Any, work: Any, *, command: str) -> DemoRecord:
        seen.append((subject, work, command))
        return sample()

    monkeypatch.setattr(demo, "run_demo", run_demo)
    sizes = ("--layers", "1", "--coefficients", "0,2", "--rounds", "3", "--seed", "7")
    pvcore("demo", "--out", tmp_path / "demo.html", "--traits", "evil,humor", *sizes)
    ((subject, work, command),) = seen
    assert [examined.trait.name for examined in subject.traits] == ["evil", "humor"]
    changed = {"layers": (1,), "coefficients": (0.0, 2.0), "rounds": 3, "seed": 7}
    assert asdict(work) == asdict(subject.workload) | changed
    assert command.startswith("pvcore demo --out")


def test_a_demo_runs_on_a_model_and_a_judge_of_ones_own(pvcore: Any, tmp_path: Path) -> None:
    world.personas.trait("evil").save(tmp_path / "evil.json")
    status, _, err = pvcore(
        *("demo", "--model", world.path(), "--judge", "pvcore.world.judge:WorldJudge"),
        *("--traits", tmp_path / "evil.json", "--out", tmp_path / "demo.html"),
        *("--extraction-questions", "2", "--steering-questions", "2", "--coefficients", "0,2"),
        *("--monitoring-questions", "1", "--max-new-tokens", "32", "--rounds", "1"),
        *("--dtype", "float32", "--batch-size", "64"),
    )
    assert status == 0, err
    html = (tmp_path / "demo.html").read_text()
    assert "bounds on traits were set for the persona world" in html


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["steer", "world", "Hi", "--vector", "none", "--coeff", "1"], "none: cannot be read"),
        (["extract", "world", "evill", "--out", "x.safetensors"], "got trait 'evill'"),
        (["extract", "nowhere", "evil", "--out", "x.safetensors"], "got no judge for 'nowhere'"),
        (["demo", "--layers", "one"], "got 'one'; wanted numbers with commas"),
        (["demo", "--layers", "4"], "got layer 4; this model has layers 0 to 3"),
        (["demo", "--out", "missing.html/report"], "got missing.html/report to write to"),
        (["demo", "--out", "."], "got . to write to"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(
    pvcore: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    arguments: list[str],
    complaint: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "missing.html").touch()
    status, out, err = pvcore(*arguments)
    lines = [line for line in err.splitlines() if line.startswith("pvcore:")]
    assert (status, out) == (2, "")
    assert len(lines) == 1
    assert complaint in lines[0]
    assert "Traceback" not in err
    assert [path.name for path in tmp_path.iterdir()] == ["missing.html"]


def test_a_model_that_cannot_be_loaded_is_one_typed_error(
    pvcore: Any, evil: Path, tmp_path: Path
) -> None:
    status, _, err = pvcore("steer", tmp_path, "Hi", "--vector", evil, "--coeff", "1")
    assert status == 2
    assert re.search(r"^pvcore: got model .* which cannot be loaded", err, re.MULTILINE)
