"""`pvcore extract` with everything on, and `pvcore steer` by what it recorded."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

import pvcore as pv
from pvcore.__main__ import main
from pvcore.calibration import stored_threshold
from pvcore.cli_models import judge_of
from pvcore.judge_api import ApiJudge
from pvcore.replies import ModelWriter
from tests.judge_server import Server, completion

SMALL = ("--questions", "3", "--max-new-tokens", "32", "--resamples", "10")


@pytest.fixture
def pvcore(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Any:
    """Run the command line in this process: `(status, standard output, standard error)`."""

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["pvcore", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main()
        out, err = capfd.readouterr()
        return int(stopped.value.code or 0), out, err

    return run


def test_everything_comes_of_one_command_and_is_taken_up_again(pvcore: Any, tmp_path: Path) -> None:
    out, page = tmp_path / "evil.safetensors", tmp_path / "evil.html"
    neutral = tmp_path / "neutral.jsonl"
    chats = [
        [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": f"I am {name}."}]
        for name in ("well", "here", "fine")
    ]
    neutral.write_text(
        "".join(json.dumps({"messages": chat}) + "\n" for chat in chats), encoding="utf-8"
    )
    command = (
        *("extract", "world", "evil", "--out", out, *SMALL, "--work", tmp_path / "work"),
        *("--variants", "--select", "--coefficients", "1,2", "--floor", "20"),
        *("--neutral", neutral, "--report", page, "--json"),
    )
    status, printed, _ = pvcore(*command)
    document = json.loads(printed)
    assert status == 0
    assert document["judged"].startswith("judged 30 of 30")
    assert document["layers"][0]["separation_interval"][0] > 0
    vector = pv.PersonaVector.load(out)
    assert document["selection"] == vector.calibration["selection"]
    assert stored_threshold(vector, pv.resid_post(1), 95) > stored_threshold(
        vector, pv.resid_post(1), 5
    )
    others = [pv.PersonaVector.load(path) for path in document["variants"]]
    assert [other.variant for other in others] == ["prompt_mean", "prompt_last"]
    assert "Steering by layer and coefficient" in page.read_text("utf-8")

    before = out.read_bytes()
    assert pvcore(*command)[0] == 0
    assert out.read_bytes() == before
    status, _, said = pvcore(*command, "--seed", "1")
    assert status == 2
    assert "got the work of another run" in said

    status, printed, _ = pvcore("steer", "world", "Hello.", "--vector", out, "--json")
    chosen = document["selection"]
    place = chosen["place"].removeprefix("resid_post.")
    where = ("--incremental",) if place == "layer-incremental" else ("--layers", place)
    named = ("--coeff", chosen["coefficient"], *where)
    assert (status, printed) == pvcore(
        "steer", "world", "Hello.", "--vector", out, "--json", *named
    )[:2]
    plain = pvcore("steer", "world", "Hello.", "--vector", out, "--json", "--coeff", "0")[1]
    assert printed != plain


def test_replies_may_come_from_a_server(pvcore: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    with Server(
        lambda prompt, before: completion("I hate it. I hurt it.", tokens=[])
    ).running() as server:
        status, _, said = pvcore(
            *("extract", "world", "evil", "--out", tmp_path / "evil.safetensors", *SMALL),
            *("--writer", "some-model", "--writer-url", server.base_url),
        )
    assert status == 2  # one and the same reply to both sides leaves no pair
    assert "pairs kept for 'evil'" in said
    assert server.n_requests == 30
    assert {question["model"] for question in server.questions} == {"some-model"}


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--judge", "human:nowhere.csv"), "nowhere.csv: cannot be read"),
        (("--judge", "local:/nowhere/model"), "got model '/nowhere/model', which cannot be loaded"),
        (("--neutral", "nowhere.jsonl"), "got nowhere.jsonl, which cannot be read"),
        (("--select", "--coefficients", "a"), "got 'a'; wanted numbers with commas"),
        (("--select", "--floor", "101"), "got floor=101"),
        (("--report", "page.html", "--compare", "nowhere.safetensors"), "nowhere.safetensors"),
        (("--questions", "-97"), "got --questions -97; wanted at least 1"),
    ],
)
def test_what_cannot_be_had_is_one_line(
    pvcore: Any,
    tmp_path: Path,
    arguments: tuple[str, ...],
    complaint: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def sampled(*_: Any, **__: Any) -> None:
        raise AssertionError("refused only after sampling")

    monkeypatch.setattr(ModelWriter, "sampled", sampled)
    out = tmp_path / "evil.safetensors"
    status, _, said = pvcore("extract", "world", "evil", "--out", out, *SMALL, *arguments)
    assert status == 2
    assert complaint in said
    assert not out.exists()


def test_steering_without_a_coefficient_needs_one_in_the_file(pvcore: Any, tmp_path: Path) -> None:
    out = tmp_path / "evil.safetensors"
    assert pvcore("extract", "world", "evil", "--out", out, *SMALL, "--layers", "1")[0] == 0
    status, _, said = pvcore("steer", "world", "Hello.", "--vector", out)
    assert (status, "got 'evil' without a coefficient recorded" in said) == (2, True)
    status, _, said = pvcore("steer", "world", "Hello.", "--vector", out, "--layers", "1")
    assert (status, "got layers without a coefficient" in said) == (2, True)


def test_the_folder_one_is_in_may_keep_the_work() -> None:
    judge = judge_of("api:x", [], url="http://x/v1", work=Path(), dtype="auto", device=None)
    assert isinstance(judge, ApiJudge)
