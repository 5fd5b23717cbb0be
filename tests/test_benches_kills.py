"""A scan killed anywhere ends with every row once; a scan that trusts torn files would not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benches import kills
from benches.kills import OPERATIONS, Point, Settings, Subject, attempt, points
from pvcore.flag_shards import Footer, scores_path
from pvcore.flagging import Scan

# Newer Pythons warn of any fork beside other threads; children here only scan and leave.
pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
POINTS = 32


@pytest.mark.slow
def test_no_kill_loses_doubles_or_changes_a_row() -> None:
    made = kills.measure(Settings(points=POINTS), command="x")
    assert made.workload["kill points"] == POINTS
    assert made.workload["that struck"] == POINTS
    assert int(made.workload["killed again while resumed"]) >= 4
    assert {name: one.worst for name, one in made.checks.items()} == {
        "rows lost": 0,
        "rows duplicated": 0,
        "rows altered": 0,
    }


def test_points_cover_every_call_of_every_operation() -> None:
    counts = {exact: dict.fromkeys(OPERATIONS, 5 + exact) for exact in (False, True)}
    every = points(Settings(points=600), counts)
    assert len(every) == 600
    struck = {(one.exact, one.operation, one.nth) for one in every}
    assert struck == {
        (exact, operation, nth)
        for exact in (False, True)
        for operation in OPERATIONS
        for nth in range(1, 6 + exact)
    }
    assert len({one.torn for one in every}) == 4
    assert 200 < sum(one.again is not None for one in every) < 400
    assert points(Settings(points=600), counts) == every


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return Subject(kills.QUICK, tmp_path_factory.mktemp("kills"))


def test_trusting_what_is_there_would_be_noticed(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trusting(self: Scan, shard: int) -> Footer | None:
        there = scores_path(self.folder, shard).exists()
        return made(self.mark, shard) if there else None

    def made(mark: str, shard: int) -> Footer:
        return Footer(
            fingerprint=mark, shard=shard, scored=3, rejected=1, tokens=1, digest="", share=0.5
        )

    wanted = whole(subject)
    point = Point(operation="replace", nth=4, share=1.0, torn=0.3)
    right = attempt(subject, point, wanted)
    assert (right.struck, right.lost, right.duplicated, right.altered) == (True, 0, 0, 0)
    monkeypatch.setattr(Scan, "_held", trusting)
    wrong = attempt(subject, point, wanted)
    assert wrong.struck
    assert wrong.lost == len(wanted)


def test_a_row_that_changed_would_be_noticed(subject: Subject) -> None:
    wanted = whole(subject)
    key = next(key for key, row in wanted.items() if "n_prompt_tokens" in row)
    altered: dict[str, Any] = {**wanted, key: {**wanted[key], "n_prompt_tokens": -1}}
    altered["a row more"] = altered[key]
    found = attempt(subject, Point(operation="write", nth=2, share=0.3), altered)
    assert (found.lost, found.duplicated, found.altered) == (1, 0, 1)


def whole(subject: Subject) -> dict[str, Any]:
    result = subject.folder / "whole.json"
    assert not subject.child(Path(subject.folder / "whole"), None, False, result)
    return dict(json.loads(result.read_text())["rows"])
