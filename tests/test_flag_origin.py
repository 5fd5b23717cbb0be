"""Origins: text and cleaned copies come only from the sources that were scored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import pvcore as pv
from pvcore.errors import FlagError
from tests.flag_data import WRITERS, as_pair, bank, chats, model, write_jsonl

ROWS = [as_pair(chat) for chat in chats(20)]
ONE = bank("evil", sites=[pv.resid_post(1)])


@pytest.fixture(scope="module")
def hooked() -> pv.HookedModel:
    return model()


def refused(flags: pv.Flags, folder: Path, said: str = "not what was scored") -> None:
    """Neither a copy nor a text is given, and nothing is left of the attempt."""
    with pytest.raises(FlagError, match=said):
        flags.filter("evil", threshold=0.0).write_clean(folder)
    assert not [path for path in folder.rglob("*") if path.is_file()]
    with pytest.raises(FlagError, match=said):
        flags.conversations(flags.top("evil", 3))


@pytest.mark.parametrize("ending", list(WRITERS))
@pytest.mark.parametrize("change", ["reordered", "shrunk", "gone"])
def test_a_file_that_changed_is_refused(
    hooked: pv.HookedModel, tmp_path: Path, ending: str, change: str
) -> None:
    path = WRITERS[ending](tmp_path / f"d{ending}", ROWS)
    flags = pv.flag(hooked, path, ONE, out=tmp_path / "out", shard_rows=7)
    assert len(flags.conversations(flags.top("evil", 3))) == 3
    if change == "gone":
        path.unlink()
    else:
        WRITERS[ending](path, ROWS[::-1] if change == "reordered" else ROWS[:12])
    refused(flags, tmp_path / "clean")
    if change != "gone":
        refused(pv.Flags.load(flags.folder, sources=path), tmp_path / "clean")
    flags.report(tmp_path / "page.html")
    html = (tmp_path / "page.html").read_text()
    assert "not what was scored" in html
    assert not any(row["response"].strip() in html for row in ROWS[1:])


@pytest.mark.parametrize("given", ["generator", "reversed", "shrunk", "changed"])
def test_a_data_set_of_other_rows_is_refused(
    hooked: pv.HookedModel, tmp_path: Path, given: str
) -> None:
    flags = pv.flag(hooked, iter(ROWS), ONE, out=tmp_path / "out", shard_rows=7)
    if given == "generator":  # the scan itself has read it to its end
        refused(flags, tmp_path / "clean")
        return
    other: list[Any] = {
        "reversed": ROWS[::-1],
        "shrunk": ROWS[:-1],
        "changed": [*ROWS[:-1], {**ROWS[-1], "response": "another"}],
    }[given]
    refused(pv.Flags.load(flags.folder, sources=other), tmp_path / "clean")


def test_the_same_rows_are_taken_again(hooked: pv.HookedModel, tmp_path: Path) -> None:
    flags = pv.flag(hooked, iter(ROWS), ONE, out=tmp_path / "out", shard_rows=7)
    top = flags.top("evil", 5)
    for again in (ROWS, iter(ROWS)):
        found = pv.Flags.load(flags.folder, sources=again).filter("evil", threshold=top[-1].score)
        (made,) = found.write_clean(tmp_path / "clean").values()
        assert (made.kept, made.flagged) == (16, 4)
        kept = [json.loads(line) for line in made.path.read_text().splitlines()]
        assert kept == [row for at, row in enumerate(ROWS) if ("rows", at) not in found]
    (text, *_) = pv.Flags.load(flags.folder, sources=ROWS).conversations(top)
    assert text == chats(20)[top[0].row]


def test_a_source_under_another_name_is_refused(
    hooked: pv.HookedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = write_jsonl(Path("d.jsonl"), ROWS)
    flags = pv.flag(hooked, path, ONE, out="out")
    for other in (path.absolute(), {"mine": path}, ROWS):
        with pytest.raises(FlagError, match=r"which this scan has not scored; it has 'd\.jsonl'"):
            pv.Flags.load("out", sources=other)
    renamed = pv.Flags.load("out", sources={"d.jsonl": path.absolute()})
    bound = flags.top("evil", 5)[-1].score
    (made,) = renamed.filter("evil", threshold=bound).write_clean("clean").values()
    assert (made.kept, made.flagged) == (16, 4)
