"""Judges by their names on the command line, and models that cannot be had."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pvcore.cli_models import judge_of, model_of, subject_of
from pvcore.errors import JudgeFailure, ModelError
from pvcore.judge import judge_all
from pvcore.judge_api import ApiJudge
from pvcore.judge_human import HumanJudge
from pvcore.judge_local import LocalJudge
from pvcore.world import WorldJudge
from pvcore.world import path as world_path
from tests.judge_server import Server, completion

PLACE: dict[str, Any] = {"url": None, "work": None, "dtype": "auto", "device": None}


def test_each_kind_of_judge_has_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    csv = tmp_path / "scores.csv"
    csv.write_text("question,answer,coherence,evil\nq,a,90,10\n", encoding="utf-8")
    human = judge_of(f"human:{csv}", (), **PLACE)
    assert isinstance(human, HumanJudge)
    assert human.trait("evil", "q", "a") == 10.0
    assert isinstance(judge_of(f"local:{world_path()}", (), **PLACE), LocalJudge)
    assert isinstance(judge_of("pvcore.world:WorldJudge", (), **PLACE), WorldJudge)
    assert isinstance(judge_of("api:gpt-4.1-mini", (), **PLACE), ApiJudge)


def test_a_judge_on_a_server_keeps_its_answers_beside_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    with Server(lambda prompt, before: completion("70")).running() as server:
        place = PLACE | {"url": server.base_url, "work": tmp_path / "work"}
        for _ in range(2):
            judge = judge_of("api:judge-1", (), **place)
            (row,) = judge_all(judge, "evil", [("q", "a")]).rows
            assert row.trait_score is not None
        assert server.n_requests == 2
    assert [path.name for path in tmp_path.iterdir()] == ["work-answers.jsonl"]


def test_a_model_of_ones_own_needs_a_judge() -> None:
    with pytest.raises(JudgeFailure, match=r"got no judge for 'x'.*api:MODEL, local:MODEL, human"):
        subject_of("x", None, ("evil",), "auto", None)
    with pytest.raises(ModelError, match="got model '/nowhere', which cannot be loaded"):
        model_of("/nowhere", "auto", None)
