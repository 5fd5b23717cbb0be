"""The feed: work is done ahead, never too far or too much, and stops when nobody wants it."""

from __future__ import annotations

import json
import threading
import time
import weakref
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pvcore as pv
from pvcore import flag_feed, flag_rows
from pvcore.flag_feed import OBJECT, Feed, ahead, heft
from pvcore.flag_rows import Form
from pvcore.flag_settings import reading_of
from pvcore.flag_sources import resolve
from tests.flag_data import bank, chats, furthest, model, scores, table


def counted(made: list[int], upto: int) -> Iterator[int]:
    for number in range(upto):
        made.append(number)
        yield number


def test_everything_comes_once_in_order() -> None:
    assert list(ahead(iter(range(1000)), 2)) == list(range(1000))
    assert list(ahead(iter(()), 1)) == []


def test_items_are_made_in_another_thread_and_not_too_far_ahead() -> None:
    made: list[int] = []
    items = ahead(counted(made, 100), 3)
    assert next(items) == 0
    deadline = time.monotonic() + 5
    while len(made) < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert len(made) == 5  # one taken, three waiting, one in hand
    items.close()
    assert not [t for t in threading.enumerate() if t.name == "pvcore-feed"]
    assert len(made) <= 6


def test_what_the_thread_raises_is_raised_here_after_what_came_before() -> None:
    def broken() -> Iterator[int]:
        yield 1
        raise KeyError("gone")

    items = ahead(broken(), 4)
    assert next(items) == 1
    with pytest.raises(KeyError, match="gone"):
        next(items)
    assert not [t for t in threading.enumerate() if t.name == "pvcore-feed"]


class Text(str):
    """A text that tells when it is gone."""

    __slots__ = ("__weakref__",)


def watched(alive: Texts, most: list[int], reply: str) -> Iterator[dict[str, str]]:
    """Rows whose texts are counted: the most that were alive when another was asked for."""
    for at in range(300):
        text = Text(reply + str(at))
        alive.add(text)
        most.append(len(alive))
        yield {"prompt": "Say it.", "response": text}
        del text


@pytest.mark.parametrize(("length", "fits"), [(40, True), (2000, False)])
def test_rows_are_held_by_their_size_and_not_by_their_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, length: int, fits: bool
) -> None:
    rows_of_a_window = 10
    row = length + 3 * OBJECT + 10
    monkeypatch.setattr(flag_feed, "WINDOW", rows_of_a_window * row)
    most: list[int] = []
    rows = watched(Texts(), most, "x" * length)
    one = bank("evil", sites=[pv.resid_post(0)])
    flags = pv.flag(model(), rows, one, out=tmp_path / "out", shard_rows=250)
    assert (flags.scored, flags.n_rejected) == ((300, 0) if fits else (0, 300))
    # Portions that wait, one in the making and one being scored, each with what it was made of.
    assert max(most) <= 2 * (2 + 2) * (rows_of_a_window + 2)
    assert len(list((tmp_path / "out/scores").iterdir())) == 2


class Texts:
    """Counts texts that are alive; texts are equal by what they say, and here by which they are."""

    def __init__(self) -> None:
        self._alive = 0

    def add(self, text: Text) -> None:
        self._alive += 1
        weakref.finalize(text, self._gone)

    def _gone(self) -> None:
        self._alive -= 1

    def __len__(self) -> int:
        return self._alive


def test_how_a_shard_is_cut_changes_no_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[Any] = [{"messages": chat} for chat in chats(40)]
    rows[7], rows[8] = {"messages": []}, {"bad": 1}
    hooked = model()
    whole = pv.flag(hooked, rows, bank(), out=tmp_path / "whole", shard_rows=16)
    monkeypatch.setattr(flag_feed, "WINDOW", 700)
    cut = pv.flag(hooked, rows, bank(), out=tmp_path / "cut", shard_rows=16)
    assert furthest(scores(cut), scores(whole)) <= 1e-5
    assert list(table(cut)) == list(table(whole))
    assert list(cut.rejected()) == list(whole.rejected())
    assert cut.manifest == whole.manifest
    # One goes on where the other was stopped.
    (tmp_path / "whole/scores/part-000001.parquet").unlink()
    assert pv.flag(hooked, rows, bank(), out=tmp_path / "whole", shard_rows=16).scored == 38
    assert len(list((tmp_path / "cut/scores").iterdir())) == 3


def test_a_scan_begins_with_few_rows_and_cuts_every_shard_by_its_number_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = [{"messages": chat} for chat in chats(60)]
    size = heft(rows[0], 10**6)
    monkeypatch.setattr(flag_feed, "FIRST", 3 * size)
    feed = Feed(
        sources=resolve(rows),
        reading=reading_of(model(), Form()),
        shard_rows=30,
        held=lambda shard: None,
    )
    cuts = [(one.shard, len(one.samples), one.ends) for one in feed.portions()]
    first = [count for shard, count, _ in cuts if shard == 0]
    assert first[0] <= 4
    assert sum(first) == 30
    assert all(below < above for below, above in pairwise(first[:-1]))
    assert cuts[-1] == (1, 30, True)


def test_a_long_row_is_rejected_with_the_limit_and_its_neighbours_are_scored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flag_rows, "LONGEST_TEXT", 1000)
    lines = [json.dumps({"prompt": "a", "response": "b" * n}) for n in (5, 5000, 6, 100_000, 7)]
    (tmp_path / "d.jsonl").write_text("\n".join(lines))
    one = bank("evil", sites=[pv.resid_post(0)])
    flags = pv.flag(model(), tmp_path / "d.jsonl", one, out=tmp_path / "out")
    assert [row for _, row in table(flags)] == [0, 2, 4]
    assert [(row["row"], row["reason"]) for row in flags.rejected()] == [
        (1, "got 5001 characters; wanted at most 1000"),
        (3, "got 100001 characters; wanted at most 1000"),
    ]


def test_the_weight_of_a_row_is_about_its_text() -> None:
    assert 1000 <= heft(b"x" * 1000, 10**6) <= 1100
    nested = {"messages": [{"role": "user", "content": "x" * 5000}] * 3}
    assert 15_000 <= heft(nested, 10**6) <= 16_500
    assert heft({"image": np.zeros((100, 100))}, 10**6) >= 80_000
    endless: list[Any] = []
    endless.append(endless)
    assert heft(endless, 5000) >= 5000
