"""The file of answers: what a kill leaves of it, what it refuses, and what it never loses."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from pvcore.answers import Answers, key_of
from pvcore.errors import AnswersError

FIRST = {"text": "fünf\u2028", "n": 5}
SECOND = {"text": "six", "top": [["6", -0.25], ["7", -2.5]]}


def test_what_is_put_is_there_for_the_next_who_opens_the_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "answers.jsonl"
    answers = Answers(path)
    assert (len(answers), answers.get("a")) == (0, None)
    answers.put("a", FIRST)
    answers.put("b", SECOND)
    answers.put("a", SECOND)
    for one in (answers, Answers(path), Answers(str(path))):
        assert (one.get("a"), one.get("b"), one.get("c"), len(one)) == (SECOND, SECOND, None, 2)


def test_without_a_path_answers_are_in_memory() -> None:
    answers = Answers()
    answers.put("a", FIRST)
    assert answers.get("a") == FIRST


def test_a_write_cut_at_any_byte_loses_that_answer_alone(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    Answers(path).put("a", FIRST)
    start = path.stat().st_size
    Answers(path).put("b", SECOND)
    whole = path.read_bytes()
    n_lost = 0
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        answers = Answers(path)
        assert answers.get("a") == (FIRST if length >= start - 1 else None)
        n_lost += answers.get("b") is None
        answers.put("b", SECOND)
        answers.put("c", FIRST)
        again = Answers(path)
        assert (again.get("b"), again.get("c")) == (SECOND, FIRST)
        assert again.get("a") == answers.get("a")
    assert n_lost == len(whole) - 1  # all but the one that lacks the last newline only


@pytest.mark.parametrize("content", ["question,answer\n1,2\n", "[]\n", '{"other": 1}\n', "\0\0"])
def test_another_file_is_refused_and_left_alone(content: str, tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    path.write_text(content, "utf-8")
    with pytest.raises(AnswersError) as caught:
        Answers(path)
    assert str(caught.value) == (
        f"{path}: line 1 is no answer kept by pvcore; wanted a file of answers, or none. Give "
        "another path: nothing was written to this one"
    )
    assert path.read_text("utf-8") == content


def test_a_line_that_holds_something_else_counts_as_cut(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_text('{"pvcore_answer": 3, "answer": {}}\n{"pvcore_answer": "a", "answer": 1}\n')
    assert len(Answers(path)) == 0


def test_a_file_that_cannot_be_read_or_written_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(AnswersError, match="cannot be read"):
        Answers(tmp_path)
    (tmp_path / "file").write_text("", "utf-8")
    with pytest.raises(AnswersError, match="an answer cannot be kept"):
        Answers(tmp_path / "file" / "below").put("a", FIRST)


def test_a_full_disk_is_said_and_the_answer_is_not_taken_for_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = Answers(tmp_path / "answers.jsonl")
    answers.put("a", FIRST)

    def full(file: int, line: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    real = os.write
    monkeypatch.setattr(os, "write", full)
    with pytest.raises(AnswersError, match="No space left on device"):
        answers.put("b", SECOND)
    monkeypatch.setattr(os, "write", lambda file, line: real(file, line[:20]))
    with pytest.raises(AnswersError, match="kept in part \\(20 of"):
        answers.put("b", SECOND)
    monkeypatch.setattr(os, "write", real)
    assert answers.get("b") is None
    answers.put("c", SECOND)
    again = Answers(tmp_path / "answers.jsonl")
    assert (again.get("a"), again.get("b"), again.get("c")) == (FIRST, None, SECOND)


def test_a_key_depends_on_content_and_not_on_order() -> None:
    one = key_of({"model": "m", "messages": [{"role": "user", "content": "é"}], "seed": 0})
    assert one == key_of({"seed": 0, "messages": [{"content": "é", "role": "user"}], "model": "m"})
    assert one != key_of({"model": "m", "messages": [{"role": "user", "content": "e"}], "seed": 0})
    assert one != key_of({"model": "m", "messages": [{"role": "user", "content": "é"}], "seed": 1})
