"""`pvcore monitor`: chats from a file are read or answered, figures go to files, alarms act."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet
import pytest
import torch

import pvcore as pv
from pvcore.world.demo_subject import world_model
from tests.command_line import in_process

TOLD = [
    {"role": "user", "content": "How do I start with chess?"},
    {"role": "assistant", "content": "Start with the rules. It is a fine game."},
    {"role": "user", "content": "What is the capital of France?"},
    {"role": "assistant", "content": "The capital of France is Paris."},
]
ASKED = TOLD[:3]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Any:
    """The command line in this process: `(status, standard output, standard error)`."""
    return in_process(monkeypatch, capfd, "monitor")


@pytest.fixture
def evil(tmp_path: Path) -> Path:
    model = world_model()
    pv.PersonaVector(
        trait="evil",
        sites=[pv.resid_post(1), pv.resid_post(2)],
        directions=torch.randn(2, model.d_model, generator=torch.Generator().manual_seed(0)),
        model_id=model.model_id,
    ).save(tmp_path / "evil.safetensors")
    return tmp_path / "evil.safetensors"


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    path = tmp_path / "chats.jsonl"
    lines = [json.dumps(TOLD), "", json.dumps({"messages": ASKED}), json.dumps(TOLD[:2])]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_files_hold_what_the_library_finds(
    run: Any, evil: Path, chats: Path, tmp_path: Path
) -> None:
    places = [tmp_path / f"seen.{ending}" for ending in ("jsonl", "parquet", "html")]
    outs = [part for place in places for part in ("--out", place)]
    given = ("--chats", chats, "--vector", evil, "--max-new-tokens", "12", *outs)
    status, out, err = run("world", *given, "--json")
    assert (status, err) == (0, "")
    document = json.loads(out)
    assert document["files"] == [str(place) for place in places]
    rows = document["conversations"]
    model, bank = world_model(), pv.VectorBank(pv.PersonaVector.load(evil))
    monitor = pv.Monitor(model, bank)
    told, short = monitor.read([TOLD, TOLD[:2]])
    (made,) = monitor.generate([ASKED], max_new_tokens=12, do_sample=False)
    for row, one in zip(rows, (told, made, short), strict=True):
        figures = row["projections"]["evil resid_post.2"]
        assert figures["by_turn"] == pytest.approx(one.drift("evil")[:, 1].tolist(), abs=1e-5)
        assert row["reply"] == one.messages[-1]["content"]
        assert row["prompt"] == one.messages[-2]["content"]
    assert len(rows[0]["projections"]["evil resid_post.2"]["by_turn"]) == 2
    lines = [json.loads(line) for line in places[0].read_text(encoding="utf-8").split("\n")[:-1]]
    assert [len(line["replies"]) for line in lines] == [2, 2, 1]
    table = parquet.read_table(places[1])
    tokens = sum(1 + len(reply.tokens) for one in (told, made, short) for reply in one.replies)
    assert table.num_rows == tokens
    page = places[2].read_text(encoding="utf-8")
    assert page.count('class="turns"') == 3
    assert "Paris" in page


def test_alarms_are_told_and_may_stop_the_reply(run: Any, evil: Path) -> None:
    asked = TOLD[2]["content"]
    common = ("world", asked, "--vector", evil, "--layers", "2", "--max-new-tokens", "12", "--json")
    _, out, _ = run(*common)
    (free,) = json.loads(out)["conversations"]
    assert free["alarms"] == []
    figures = free["projections"]["evil resid_post.2"]
    level = (figures["mean"] + figures["highest"]) / 2
    _, out, _ = run(*common, "--alarm", f"evil={level}")
    (told,) = json.loads(out)["conversations"]
    assert told["reply"] == free["reply"]
    rules = ("--alarm", f"evil={level}:{level - 1}", "--on-alarm", "stop", "--engine", "graph")
    _, out, _ = run(*common, *rules)
    (stopped,) = json.loads(out)["conversations"]
    (first,) = stopped["alarms"]
    assert first == told["alarms"][0] | {"value": pytest.approx(told["alarms"][0]["value"])}
    assert free["reply"].startswith(stopped["reply"].rstrip())
    assert len(stopped["reply"]) < len(free["reply"])


def test_two_levels_for_one_trait_are_refused(run: Any, evil: Path, tmp_path: Path) -> None:
    rules = ("--alarm", "evil=4", "--alarm", "evil=9:2", "--out", tmp_path / "seen.jsonl")
    status, out, err = run("world", "Hello.", "--vector", evil, *rules)
    assert (status, out) == (2, "")
    assert "got --alarm for 'evil' twice" in err.replace("\n", " ")
    assert not (tmp_path / "seen.jsonl").exists()


def test_alarms_sound_in_chats_that_are_read(
    run: Any, evil: Path, chats: Path, tmp_path: Path
) -> None:
    places = [tmp_path / "seen.jsonl", tmp_path / "seen.html"]
    outs = [part for place in places for part in ("--out", place)]
    settings = ("--vector", evil, "--layers", "2", "--max-new-tokens", "4", "--batch-size", "1")
    monitor = pv.Monitor(world_model(), pv.VectorBank(pv.PersonaVector.load(evil), layers=[2]))
    (read,) = monitor.read([TOLD])
    first, second = (reply.projections[0, 0] for reply in read.replies)
    level = min(float(first.max()), float(second.max())) - 1e-3
    status, out, _ = run(
        "world", "--chats", chats, *settings, *outs, "--alarm", f"evil={level}", "--json"
    )
    assert status == 0
    told = [row["alarms"] for row in json.loads(out)["conversations"]]
    assert {alarm["message"] for alarm in told[0]} == {1, 3}
    assert {alarm["message"] for alarm in told[2]} == {1}
    assert [a for a in told[0] if a["message"] == 1] == told[2]
    lines = [json.loads(line) for line in places[0].read_text(encoding="utf-8").split("\n")[:-1]]
    assert [[(a["message"], a["step"]) for a in line["alarms"]] for line in lines] == [
        [(a["message"], a["step"]) for a in row] for row in told
    ]
    assert not any("chat" in alarm for line in lines for alarm in line["alarms"])
    assert places[1].read_text(encoding="utf-8").count('class="bell"') == sum(map(len, told))


def test_what_was_exported_can_be_given_back(run: Any, evil: Path, tmp_path: Path) -> None:
    told = [{**TOLD[0], "content": "How do I\u2028 start\x85?"}, TOLD[1]]
    seen, again = tmp_path / "seen.jsonl", tmp_path / "again.jsonl"
    text = json.dumps(told, ensure_ascii=False)
    seen.write_text(f"\ufeff{text}\n", encoding="utf-8")
    settings = ("world", "--vector", evil, "--json")
    rows = []
    for given, made in ((seen, again), (again, tmp_path / "last.jsonl")):
        status, out, err = run(*settings, "--chats", given, "--out", made)
        assert (status, err) == (0, "")
        rows.append(json.loads(out)["conversations"])
    assert rows[0] == rows[1]
    assert rows[0][0]["prompt"] == told[0]["content"]
    assert again.read_bytes() == (tmp_path / "last.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((), "no chats; give user messages"),
        (("hi", "--alarm", "evil"), "got --alarm 'evil'; wanted trait=HIGH"),
        (("hi", "--alarm", "evil=high"), "got --alarm 'evil=high'"),
        (("hi", "--alarm", "envy=1"), "an alarm for envy"),
        (("hi", "--on-alarm", "shout"), "got --on-alarm 'shout'"),
        (("hi", "--out", "seen.csv"), "ends in .jsonl, .parquet, .html"),
        (("hi", "--engine", "steam"), "got engine 'steam'"),
        (("--chats", "none.jsonl"), "none.jsonl, which cannot be read"),
        (("--chats", "bad.jsonl"), "bad.jsonl, line 2: got no JSON"),
        (("--chats", "odd.jsonl"), "odd.jsonl, line 1: got no chat"),
    ],
)
def test_it_fails_in_words(
    run: Any,
    evil: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    text: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bad.jsonl").write_text(json.dumps(TOLD) + "\n{\n")
    Path("odd.jsonl").write_text('{"text": "hi"}\n')
    status, out, err = run("world", *arguments, "--vector", evil)
    assert (status, out) == (2, "")
    assert text in err.replace("\n", " ")
    assert not list(tmp_path.glob("seen*"))
