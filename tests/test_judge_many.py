"""Judges that score many answers together: order, checks, counts, and stopping early."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from pvcore.errors import JudgeFailure, JudgeRefusal
from pvcore.judge import BatchJudge, Judge, Judgement, JudgingAborted, judge_all
from pvcore.judge_lexicon import LexiconJudge

PAIRS = [("why?", answer) for answer in "abcd"]


def row(trait: Any = 10.0, coherence: Any = 80.0, **changes: Any) -> Judgement:
    fields = {"question": "?", "answer": "?", "failure": None, "method": "own"}
    return Judgement(trait_score=trait, coherence_score=coherence, **fields | changes)


@dataclass
class Together:
    """Says the scripted rows one after the other, and whether it was closed."""

    rows: Sequence[tuple[Any, Any]]
    said: int = 0
    closed: bool = False

    def trait(self, trait: str, question: str, answer: str) -> float:
        raise AssertionError("rows are asked for together")

    coherence = trait

    def judge_many(
        self, trait: str, pairs: Sequence[tuple[str, str]]
    ) -> Iterator[tuple[int, Judgement]]:
        try:
            for index, judgement in self.rows:
                self.said += 1
                yield index, judgement
        finally:
            self.closed = True


def test_rows_come_back_in_the_order_of_the_pairs() -> None:
    judge = Together([(2, row(30.0)), (0, row(10.0)), (3, row(40.0)), (1, row(20.0))])
    assert isinstance(judge, BatchJudge)
    result = judge_all(judge, "evil", PAIRS)
    assert result.trait_scores == (10.0, 20.0, 30.0, 40.0)
    assert [judgement.method for judgement in result.rows] == ["own"] * 4
    assert judge.closed


def test_a_simple_judge_needs_nothing_new() -> None:
    judge = LexiconJudge({"evil": ["a"]})
    assert isinstance(judge, Judge)
    assert not isinstance(judge, BatchJudge)
    result = judge_all(judge, "evil", PAIRS)
    assert {judgement.method for judgement in result.rows} == {"lexicon"}
    assert result.counts == "judged 4 of 4, failed 0 (refused 0)"


@pytest.mark.parametrize(
    ("bad", "shown"),
    [
        (row(trait=101.0), "trait: got 101.0"),
        (row(trait=-1.0), "trait: got -1.0"),
        (row(trait=math.nan), "trait: got nan"),
        (row(trait=None), "trait: got None"),
        (row(coherence=None), "coherence: got None"),
        (row(coherence=math.inf), "coherence: got inf"),
    ],
)
def test_what_is_no_score_is_caught_here_too(bad: Judgement, shown: str) -> None:
    judge = Together([(0, row()), (1, bad), (2, row()), (3, row())])
    result = judge_all(judge, "evil", PAIRS, max_failed=0.5)
    failed = result.rows[1]
    assert (failed.trait_score, failed.coherence_score) == (None, None)
    assert failed.failure == f"{shown}; wanted a finite number from 0 to 100"
    assert failed.answer == "b"
    assert result.counts == "judged 3 of 4, failed 1 (refused 0)"


def test_a_failure_that_brings_a_score_has_none() -> None:
    half = row(trait=50.0, coherence=None, failure="no coherence")
    result = judge_all(Together([(0, half)]), "evil", PAIRS[:1], max_failed=1.0)
    assert (result.rows[0].trait_score, result.rows[0].failure) == (None, "no coherence")


def test_refusals_are_failures_that_are_counted() -> None:
    class Picky:
        def trait(self, trait: str, question: str, answer: str) -> float:
            if answer == "b":
                raise JudgeRefusal("I would rather not")
            if answer == "c":
                raise JudgeFailure("garbled")
            return 40.0

        def coherence(self, question: str, answer: str) -> float:
            return 90.0

    result = judge_all(Picky(), "evil", PAIRS, max_failed=0.5)
    assert [judgement.refused for judgement in result.rows] == [False, True, False, False]
    assert (result.n_judged, result.n_failed, result.n_refused) == (2, 2, 1)
    assert result.counts == "judged 2 of 4, failed 2 (refused 1)"
    with pytest.raises(JudgingAborted, match=r"got 2 failed rows \(1 refused\) among the first 3"):
        judge_all(Picky(), "evil", PAIRS, max_failed=0.25)


def test_too_many_failures_close_the_judge_and_keep_what_was_done() -> None:
    bad = Judgement.failed("why?", "a", JudgeRefusal("no"))
    judge = Together([(3, row()), (0, bad), (1, bad), (2, row())])
    with pytest.raises(JudgingAborted) as caught:
        judge_all(judge, "evil", PAIRS, max_failed=0.25)
    assert str(caught.value) == (
        "got 2 failed rows (2 refused) among the first 3 of 4 judged for 'evil'; wanted no more "
        "than a share of 0.25 to fail. The first was row 0: no. Mend the judge, or raise max_failed"
    )
    assert (judge.said, judge.closed) == (3, True)
    assert caught.value.judgements.trait_scores == (None, None, 10.0)


def test_progress_counts_rows_as_they_are_done(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [(2, row(30.0)), (0, row(10.0)), (3, row(40.0)), (1, row(20.0))]
    shown = judge_all(Together(rows), "evil", PAIRS, progress=True)
    heard = capsys.readouterr()
    assert shown == judge_all(Together(rows), "evil", PAIRS)
    assert heard.out == ""
    assert "judging evil" in heard.err
    assert "100%" in heard.err


@pytest.mark.parametrize(
    ("indices", "complaint"),
    [
        ([0, 1, 1], "got row 1 from Together.judge_many; wanted each of 4 rows once"),
        ([0, 4], "got row 4 from Together.judge_many; wanted each of 4 rows once"),
        ([-1], "got row -1 from Together.judge_many; wanted each of 4 rows once"),
        ([3, 0, 2], "got no row 1 from Together.judge_many; wanted each of 4 rows once"),
        ([], "got no row 0 from Together.judge_many; wanted each of 4 rows once"),
    ],
)
def test_a_judge_that_loses_count_is_refused(indices: list[int], complaint: str) -> None:
    judge = Together([(index, row()) for index in indices])
    with pytest.raises(JudgeFailure) as caught:
        judge_all(judge, "evil", PAIRS)
    assert str(caught.value) == f"{complaint}. Mend the judge"
    assert judge.closed
