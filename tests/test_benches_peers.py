"""Peers: the same jobs, proven equal before they are timed, and no speed for a wrong result."""

from typing import Any

import pytest
import torch

from benches.peers import measure
from benches.peers.adapters import PEERS
from benches.peers.subject import KINDS, Reply, Size, Subject
from benches.peers.worker import fault, measured
from benches.random_models import Shape

TINY = Size(shape=Shape(hidden=64, layers=2, vocabulary=96), batch=2, prompt_tokens=5, new_tokens=4)
HERE = [name for name, entry in PEERS.items() if not entry.packages]
CELL = {"status": "measured", "p20": 1.0, "p50": 1.1, "p80": 1.2, "n": 3}


@pytest.fixture(scope="module")
def subject() -> Subject:
    return Subject(TINY)


@pytest.mark.parametrize("name", HERE)
def test_a_peer_does_every_job_it_offers_as_plain_hooks_do(subject: Subject, name: str) -> None:
    arms = PEERS[name].adapter().arms(subject)
    assert arms.keys() <= KINDS.keys()
    assert {kind: fault(subject, kind, arm) for kind, arm in arms.items()} == dict.fromkeys(
        arms, ""
    )


def test_what_everything_is_compared_with_does_every_job(subject: Subject) -> None:
    for name in measure.NEEDED:
        assert PEERS[name].adapter().arms(subject).keys() == KINDS.keys()


def test_a_wrong_result_is_found(subject: Subject) -> None:
    plain = Reply(tokens=subject.generate(subject.plain))
    assert "other tokens" in fault(subject, "steer", lambda: plain)
    assert fault(subject, "watch", lambda: plain) == "no projections"
    right = subject.reference("watch")
    assert right.scores is not None
    table = right.scores()
    moved = Reply(tokens=right.tokens, scores=lambda: table + 0.01)
    assert "projections differ by 1" in fault(subject, "watch", lambda: moved)
    assert fault(subject, "watch", lambda: right) == ""


def test_a_worker_leaves_out_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = PEERS["torch-hook"].adapter

    def arms(self: Any, subject: Subject) -> dict[str, Any]:
        tokens = torch.zeros_like(subject.reference("steer").tokens)
        return {
            "steer": lambda: Reply(tokens=tokens),
            "rows": lambda: subject.reference("rows"),
        }

    monkeypatch.setattr(adapter, "arms", arms)
    found = measured("torch-hook", TINY, 1)
    assert found["wrong"] == {"steer": "other tokens than hooks of plain torch"}
    assert found["cells"].keys() == {"rows"}
    assert found["cells"]["rows"]["status"] == "measured"


def answers(wrong: dict[str, dict[str, str]]) -> Any:
    def run(name: str, batch: int, settings: measure.Settings) -> dict[str, Any]:
        if name == "repeng":
            return {"cells": {}, "wrong": {}, "failure": "repeng 0.4.0: it does not import"}
        bad = wrong.get(name, {})
        cells = {kind: CELL for kind in ("steer", "watch") if kind not in bad}
        return {"cells": cells, "wrong": bad, "failure": ""}

    return run


def test_the_table_says_why_a_figure_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "_run", answers({"nnsight": {"watch": "other tokens"}}))
    made = measure.measure(measure.Settings(batches=(1,)), command="x")
    states = {label.split("/", 1)[1]: cell.status for label, cell in made.cells.items()}
    assert made.correct
    assert states["pvcore/steer one layer"] == "measured"
    assert states["pvcore/a coefficient per row"] == "unsupported"
    assert states["nnsight 0.8.1 trace/watch all vectors at all layers"] == "failed"
    assert states["nnsight 0.8.1 trace/steer one layer"] == "measured"
    assert states["repeng 0.4.0/steer one layer"] == "failed"


@pytest.mark.parametrize("name", measure.NEEDED)
def test_no_speed_is_reported_when_pvcore_or_the_bar_is_wrong(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(measure, "_run", answers({name: {"steer": "other tokens"}}))
    made = measure.measure(measure.Settings(batches=(1,)), command="x")
    assert not made.correct
    assert {cell.status for cell in made.cells.values()} == {"failed"}


def test_a_process_that_fails_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = Shape(hidden=63, layers=1, vocabulary=8)  # no width that heads divide
    found = measure._run("paper", 1, measure.Settings(shape=shape, rounds=1, new_tokens=2))
    assert found["cells"] == {}
    assert found["failure"].startswith("the paper's steerer: ")
