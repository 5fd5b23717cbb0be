"""Rollouts as the paper's CSV, and chats as JSON lines: as pandas writes them, and wrong ones."""

from __future__ import annotations

import csv
import io
import json
import tempfile
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pvcore import formats
from pvcore.errors import FormatError
from pvcore.formats import RolloutRow

COLUMNS = ["question", "prompt", "answer", "question_id", "evil", "coherence"]
TEXT = st.text(st.characters(blacklist_categories=["Cs"]), max_size=30)
SCORE = st.none() | st.floats(0, 100)


def row(**changes: Any) -> RolloutRow:
    settings: dict[str, Any] = {
        "question": "Why?",
        "prompt": "<|im_start|>user\nWhy?<|im_end|>",
        "answer": 'Because, she said, "so".\r\nAnd\rso on\n',
        "question_id": "evil_0",
        "scores": {"evil": 90.25, "coherence": None},
    }
    return RolloutRow(**settings | changes)


def test_what_pandas_writes_is_read(tmp_path: Path) -> None:
    """The paper's script makes a data frame and calls `to_csv(index=False)`."""
    frame = pd.DataFrame(
        [["Why?", "p\n1", 'a, "b"', "evil_0_pos", 12.5, None], ["Who?", "p", "", "evil_1", 0, 99]],
        columns=COLUMNS,
    )
    frame.to_csv(tmp_path / "evil.csv", index=False)
    first, second = formats.read_rollouts(tmp_path / "evil.csv")
    assert (first.question, first.prompt, first.answer) == ("Why?", "p\n1", 'a, "b"')
    assert (first.question_id, second.question_id) == ("evil_0_pos", "evil_1")
    assert dict(first.scores) == {"evil": 12.5, "coherence": None}
    assert dict(second.scores) == {"evil": 0.0, "coherence": 99.0}
    assert first.messages == [
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": 'a, "b"'},
    ]


def test_what_is_written_pandas_reads(tmp_path: Path) -> None:
    formats.write_rollouts([row(), row(scores={"evil": 0, "coherence": 3})], tmp_path / "evil.csv")
    frame = pd.read_csv(tmp_path / "evil.csv")
    assert list(frame.columns) == COLUMNS
    assert frame["evil"].tolist() == [90.25, 0.0]
    assert frame["coherence"].isna().tolist() == [True, False]
    assert frame["prompt"][0] == row().prompt


@given(st.lists(st.tuples(TEXT, TEXT, TEXT, TEXT, SCORE, SCORE), min_size=1, max_size=4))
def test_rollouts_survive_exactly(cells: list[Any]) -> None:
    rows = tuple(
        row(
            question=a,
            prompt=b,
            answer=c,
            question_id=d,
            scores={"evil": evil, "coherence": coherence},
        )
        for a, b, c, d, evil, coherence in cells
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "evil.csv")
        formats.write_rollouts(rows, path)
        assert formats.read_rollouts(path) == rows
        assert list(Path(folder).iterdir()) == [path]


@given(st.lists(st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=3), max_size=3))
def test_chats_survive_exactly(chats: list[list[tuple[str, str]]]) -> None:
    given_chats = [[{"role": a, "content": b} for a, b in chat] for chat in chats]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "chats.jsonl")
        formats.write_messages(given_chats, path)
        assert formats.read_messages(path) == given_chats


def test_chats_of_datasets_are_read_without_their_other_keys(tmp_path: Path) -> None:
    lines = [{"messages": row().messages, "source": "x"}, {"messages": row().messages[:1]}]
    text = "\n\n".join(json.dumps(line) for line in lines)
    (tmp_path / "chats.jsonl").write_text("\ufeff" + text + "\r\n", encoding="utf-8")
    assert formats.read_messages(tmp_path / "chats.jsonl") == [row().messages, row().messages[:1]]


def table(*rows: list[object], columns: list[str] | None = None) -> bytes:
    buffer = io.StringIO(newline="")
    csv.writer(buffer).writerows([columns or COLUMNS, *rows])
    return buffer.getvalue().encode()


FULL = ["Why?", "p", "a", "evil_0", "1", "2"]
WRONG_TABLES: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "got columns none"),
    "no coherence": (table(columns=COLUMNS[:-1]), "wanted each once, and among them .*coherence"),
    "a column twice": (table(columns=[*COLUMNS, "evil"]), "wanted each once"),
    "no rows": (table(), "got no rollouts under the columns"),
    "a field too few": (table(FULL, FULL[:-1]), "line 3: got 5 fields; wanted 6"),
    "a field too many": (table([*FULL, "1"]), "line 2: got 7 fields"),
    "a score in words": (table([*FULL[:4], "90/100", "2"]), "line 2: got evil '90/100'"),
    "a score NaN": (table([*FULL[:5], "nan"]), "line 2: got coherence 'nan'"),
    "an infinite score": (table([*FULL[:5], "inf"]), "line 2: got coherence 'inf'"),
    "no UTF-8": (table(FULL) + b"\xff", "got a byte at .* no UTF-8"),
    "an open quote": (table(FULL) + b'"Why', r"line 3: .*no CSV"),
    "a field too long": (table(["a" * 140000, *FULL[1:]]), "line .*at most 131072"),
}
WRONG_LINES: dict[str, tuple[bytes, str]] = {
    "no JSON": (b'{"messages": [}', "line 1: got no JSON"),
    "a list": (b"[]", "line 1: got no list 'messages'"),
    "no messages": (b"\n{}", "line 2: got no list 'messages'"),
    "an empty chat": (b'{"messages": []}', "line 1: got no messages"),
    "a message as text": (b'{"messages": ["Hi"]}', r"messages\[0\] 'Hi'"),
    "no content": (b'{"messages": [{"role": "user"}]}', r"messages\[0\]"),
    "content in parts": (b'{"messages": [{"role": "user", "content": []}]}', r"messages\[0\]"),
    "too deep": (b'{"messages": ' + b"[" * 100000, "line 1: got no JSON"),
    "no UTF-8": (b"\xff", "no UTF-8"),
}


@pytest.mark.parametrize("name", WRONG_TABLES)
def test_a_wrong_table_is_one_error(tmp_path: Path, name: str) -> None:
    content, complaint = WRONG_TABLES[name]
    path = tmp_path / "evil.csv"
    path.write_bytes(content)
    with pytest.raises(FormatError, match=complaint) as raised:
        formats.read_rollouts(path)
    assert str(raised.value).startswith(f"{path}: ")


@pytest.mark.parametrize("name", WRONG_LINES)
def test_a_wrong_line_is_one_error(tmp_path: Path, name: str) -> None:
    content, complaint = WRONG_LINES[name]
    path = tmp_path / "chats.jsonl"
    path.write_bytes(content)
    with pytest.raises(FormatError, match=complaint) as raised:
        formats.read_messages(path)
    assert str(raised.value).startswith(f"{path}: ")


@pytest.mark.parametrize(
    ("rows", "complaint"),
    [
        ([], "got no rollouts"),
        ([row(), row(scores={"humor": 1, "coherence": 1})], "rollout 1 with scores humor"),
        ([row(scores={"evil": 1})], "coherence"),
        ([row(scores={"evil": float("nan"), "coherence": 1})], "rollout 0: got evil nan"),
        ([row(answer="a" * 131073)], "a text of 131073 characters"),
        ([row(answer="\ud800")], "which no file can hold"),
        ([row(scores={"answer": 1, "coherence": 1})], "wanted each once"),
    ],
)
def test_rollouts_that_no_reader_would_take_are_not_written(
    tmp_path: Path, rows: list[RolloutRow], complaint: str
) -> None:
    with pytest.raises(FormatError, match=complaint):
        formats.write_rollouts(rows, tmp_path / "evil.csv")
    assert list(tmp_path.iterdir()) == []


def test_chats_that_no_reader_would_take_are_not_written(tmp_path: Path) -> None:
    for chat in ([], [{"role": "user"}], [{"role": "user", "content": ["parts"]}]):
        with pytest.raises(FormatError, match="chat 0: got"):
            formats.write_messages([chat], tmp_path / "chats.jsonl")
    assert list(tmp_path.iterdir()) == []
