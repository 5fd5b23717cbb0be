"""Scores that people wrote into a CSV file: found, missing, malformed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from pvcore.errors import JudgeFailure, PvcoreError, TraitError
from pvcore.judge import Judge, judge_all
from pvcore.judge_human import HumanJudge
from pvcore.rollout_run import judge_identity

HEADER = "question,answer,evil,coherence\n"


def file(folder: Path, content: str) -> Path:
    path = folder / "scores.csv"
    path.write_bytes(content.encode())
    return path


def refusal(call: Callable[[], object], error: type[PvcoreError] = JudgeFailure) -> str:
    with pytest.raises(error) as caught:
        call()
    assert type(caught.value) is error
    return str(caught.value)


def test_what_was_written_is_the_score(tmp_path: Path) -> None:
    content = (
        'humor,question,answer,evil,coherence\n1,why?,"so, ""then""\nmore",12.5,90\n'
        "2,why?,no,0,100\n"
    )
    judge = HumanJudge(file(tmp_path, content))
    assert isinstance(judge, Judge)
    pairs = [("why?", "no"), ("why?", 'so, "then"\nmore')]
    result = judge_all(judge, "evil", pairs)
    assert result.trait_scores == (0.0, 12.5)
    assert result.coherence_scores == (100.0, 90.0)
    assert {row.method for row in result.rows} == {"human"}
    assert judge_all(judge, "humor", pairs).trait_scores == (2.0, 1.0)


def test_what_spreadsheets_change_is_looked_through(tmp_path: Path) -> None:
    content = f'\ufeff{HEADER}why?,"one\r\ntwo",40,60\r\n\r\n'
    judge = HumanJudge(file(tmp_path, content))
    assert judge.trait("evil", "why? ", "one\ntwo\n") == 40.0


def test_a_pair_without_a_row_fails_alone(tmp_path: Path) -> None:
    path = file(tmp_path, f"{HEADER}why?,so,40,60\n")
    pairs = [("why?", "so"), ("why?", "So"), ("Why?", "so")]
    result = judge_all(HumanJudge(path), "evil", pairs, max_failed=1.0)
    assert result.trait_scores == (40.0, None, None)
    assert result.rows[1].failure == (
        f"{path}: has no row for the question 'why?' and the answer 'So'; wanted one. Have it "
        "judged"
    )


@pytest.mark.parametrize(
    "cell",
    ["", " ", "8/10", "101", "-1", "nan", "inf", "-inf", "high", "50%", "1,5", "None", "1_0"],
)
@pytest.mark.parametrize("column", ["evil", "coherence"])
def test_a_cell_that_is_no_score_fails_its_row(cell: str, column: str, tmp_path: Path) -> None:
    cells = {"evil": "40", "coherence": "60", column: f'"{cell}"'}
    content = f"{HEADER}why?,so,{cells['evil']},{cells['coherence']}\nwhy?,no,1,2\n"
    path = file(tmp_path, content)
    result = judge_all(HumanJudge(path), "evil", [("why?", "so"), ("why?", "no")], max_failed=0.5)
    assert result.trait_scores == (None, 1.0)
    assert result.coherence_scores == (None, 2.0)
    assert result.rows[0].failure == (
        f"{path}: row 2, column {column!r}: got {cell!r}; wanted a number from 0 to 100. Correct "
        "the cell"
    )


def test_a_trait_without_a_column_is_a_mistake_of_the_call(tmp_path: Path) -> None:
    path = file(tmp_path, f"{HEADER}why?,so,40,60\n")
    for trait in ("humor", "coherence", "question"):
        text = refusal(
            lambda trait=trait: judge_all(HumanJudge(path), trait, [("why?", "so")]), TraitError
        )
        assert text == (
            f"got trait {trait!r}; {path} has columns for evil. Add a column under its name"
        )


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("", "got the columns none; wanted question, answer, coherence and one for each trait"),
        ("question,answer,evil\n", "got the columns 'question', 'answer', 'evil'; wanted"),
        ("question,answer,evil,evil,coherence\n", "'evil', 'evil', 'coherence'; wanted"),
        ("question,answer,,coherence\n", "'question', 'answer', '', 'coherence'; wanted"),
        (f"{HEADER}why?,so,40\n", "row 2 has 3 cells; wanted 4. Correct the row"),
        (f"{HEADER}why?,so,40,60\nwhy?,so, no,4,6\n", "row 3 has 5 cells; wanted 4. Correct"),
        (f'{HEADER}why?,"so,40,60\n', "got text that is no CSV in UTF-8 ("),
        (
            f"{HEADER}why?,so,40,60\nwhy?,so,50,60\n",
            "row 3 scores the pair of row 2 otherwise; wanted one judgement for each pair",
        ),
    ],
)
def test_a_bad_file_is_one_error(content: str, complaint: str, tmp_path: Path) -> None:
    path = file(tmp_path, content)
    text = refusal(lambda: HumanJudge(path))
    assert text.startswith(f"{path}: ")
    assert complaint in text


def test_the_same_row_twice_is_no_quarrel(tmp_path: Path) -> None:
    path = file(tmp_path, f"{HEADER}why?,so,40,60\nwhy?,so, 40,60\n")
    assert HumanJudge(path).trait("evil", "why?", "so") == 40.0


def test_a_file_that_is_not_there_or_no_text_is_named(tmp_path: Path) -> None:
    assert "cannot be read (No such file" in refusal(lambda: HumanJudge(tmp_path / "none.csv"))
    path = tmp_path / "scores.csv"
    path.write_bytes(b"\xff\xfeq\x00")
    assert f"{path}: got text that is no CSV in UTF-8 (" in refusal(lambda: HumanJudge(path))


def test_the_judge_is_another_when_the_file_is(tmp_path: Path) -> None:
    path = file(tmp_path, f"{HEADER}why?,no,40,60\n")
    first, same = HumanJudge(path), HumanJudge(path)
    second = HumanJudge(file(tmp_path, f"{HEADER}why?,no,90,60\n"))
    assert judge_identity(first) == judge_identity(same) != judge_identity(second)
    assert (first.trait("evil", "why?", "no"), second.trait("evil", "why?", "no")) == (40.0, 90.0)
