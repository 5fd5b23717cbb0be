"""Peers: the same jobs, proven equal before they are timed, and no speed for a wrong result."""

from typing import Any

import pytest
import torch

from benches.peers import measure
from benches.peers.adapters import PEERS
from benches.peers.measure import CASES, Case
from benches.peers.subject import KINDS, READ_AT_ONCE, Reply, Size, Subject
from benches.peers.worker import fault, measured
from benches.random_models import Shape

TINY = Size(
    shape=Shape(hidden=64, layers=3, vocabulary=96),
    batch=2,
    prompt_tokens=5,
    new_tokens=4,
    samples=READ_AT_ONCE + 3,
)
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
    read = subject.reference("extract")
    assert read.means is not None
    assert fault(subject, "extract", lambda: read) == ""
    for wrong, said in (
        (Reply(tokens=read.tokens), "no means"),
        (Reply(tokens=read.tokens, means=read.means[:, :-1]), "no means"),
        (Reply(tokens=read.tokens, means=read.means + 0.01), "means differ by 1"),
    ):
        assert said in fault(subject, "extract", lambda wrong=wrong: wrong)


def test_the_means_are_those_of_each_sample_alone(subject: Subject) -> None:
    read = subject.reference("extract")
    assert read.means is not None
    texts = torch.cat(list(subject.samples))
    assert len(texts) == TINY.samples
    with torch.no_grad():
        for at in (0, READ_AT_ONCE, TINY.samples - 1):
            states = subject.plain(texts[at : at + 1], output_hidden_states=True).hidden_states
            wanted = torch.stack([one[0].double().mean(0) for one in states[1:3]])
            torch.testing.assert_close(read.means[:, at].double(), wanted, rtol=1e-4, atol=1e-5)
    assert (read.means[:, 0] - read.means[:, 1]).norm() > 0.1 * read.means[:, 0].norm()


def test_every_layer_is_steered_where_all_are(subject: Subject) -> None:
    deltas = subject.deltas("everywhere")
    assert list(deltas) == [0, 1, 2]
    one, every = subject.reference("steer"), subject.reference("everywhere")
    assert not torch.equal(one.tokens, every.tokens)
    assert fault(subject, "everywhere", lambda: one) == "other tokens than hooks of plain torch"


def test_sixteen_configurations_are_sixteen_coefficients() -> None:
    (case,) = (one for one in CASES if str(one) == "batch 16, 16 configurations")
    size = Size(shape=TINY.shape, batch=case.batch, configurations=case.configurations)
    assert len(set(Subject(size).coeffs.tolist())) == 16
    large = Size(shape=TINY.shape, batch=256, configurations=16, prompt_tokens=2)
    coeffs = Subject(large).coeffs
    assert (len(coeffs), len(set(coeffs.tolist()))) == (256, 16)


def test_a_worker_leaves_out_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = PEERS["torch-hook"].adapter

    def arms(self: Any, subject: Subject) -> dict[str, Any]:
        tokens = torch.zeros_like(subject.reference("steer").tokens)
        return {
            "steer": lambda: Reply(tokens=tokens),
            "rows": lambda: subject.reference("rows"),
        }

    monkeypatch.setattr(adapter, "arms", arms)
    found = measured("torch-hook", TINY, 1, ("steer", "rows", "watch"))
    assert found["wrong"] == {"steer": "other tokens than hooks of plain torch"}
    assert found["cells"].keys() == {"rows"}
    assert found["cells"]["rows"]["status"] == "measured"
    assert measured("torch-hook", TINY, 1, ("watch",)) == {"cells": {}, "wrong": {}}


ONE = measure.Settings(cases=(Case(batch=1, kinds=("steer", "watch", "rows", "extract")),))


def answers(wrong: dict[str, dict[str, str]]) -> Any:
    def run(name: str, case: Case, settings: measure.Settings) -> dict[str, Any]:
        if name == "repeng":
            return {"cells": {}, "wrong": {}, "failure": "repeng 0.4.0: it does not import"}
        bad = wrong.get(name, {})
        cells = {kind: CELL for kind in ("steer", "watch") if kind not in bad}
        return {"cells": cells, "wrong": bad, "failure": ""}

    return run


def test_the_table_says_why_a_figure_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "_run", answers({"nnsight": {"watch": "other tokens"}}))
    made = measure.measure(ONE, command="x")
    states = {label.split("/", 1)[1]: cell.status for label, cell in made.cells.items()}
    assert made.correct
    assert states["pvcore/steer one layer"] == "measured"
    assert states["pvcore/a coefficient per row"] == "unsupported"
    assert states["nnsight 0.8.1 trace/watch all vectors at all layers"] == "failed"
    assert states["nnsight 0.8.1 trace/steer one layer"] == "measured"
    assert states["repeng 0.4.0/steer one layer"] == "failed"
    # What an adapter does not ask for is not held against the library.
    assert states["steering-vectors 0.12.2/a coefficient per row"] == "not measured"
    assert "rows" in PEERS["repeng"].unwritten
    means = KINDS["extract"]
    assert states[f"pyvene 0.1.8/{means}"] == "not measured"
    assert states[f"pvcore/{means}"] == "unsupported"


@pytest.mark.parametrize("name", measure.NEEDED)
def test_no_speed_is_reported_when_pvcore_or_the_bar_is_wrong(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(measure, "_run", answers({name: {"steer": "other tokens"}}))
    made = measure.measure(ONE, command="x")
    assert not made.correct
    assert {cell.status for cell in made.cells.values()} == {"failed"}


def test_a_process_that_fails_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = Shape(hidden=63, layers=1, vocabulary=8)  # no width that heads divide
    case = Case(batch=1, kinds=("steer",), new_tokens=2)
    found = measure._run("paper", case, measure.Settings(shape=shape, rounds=1))
    assert found["cells"] == {}
    assert found["failure"].startswith("the paper's steerer, re-written: ")


def test_a_case_reaches_the_worker_as_it_is() -> None:
    settings = measure.Settings(shape=TINY.shape, rounds=30, model="x/config.json")
    (case,) = (one for one in CASES if one.batch == 256)
    words = measure._words(case, settings)
    told = dict(zip(words[::2], words[1::2], strict=True))
    assert (told["--batch"], told["--configurations"], told["--rounds"]) == ("256", "16", "3")
    assert (told["--model"], words.count("--kind")) == ("x/config.json", 3)


def test_a_process_measures_the_jobs_it_is_asked_for() -> None:
    case = Case(batch=1, kinds=("extract",), new_tokens=2, samples=4)
    settings = measure.Settings(shape=TINY.shape, rounds=1)
    found = measure._run("torch-hook", case, settings)
    assert found["cells"].keys() == {"extract"}, found
    assert found["wrong"] == {}
