"""Rollouts: what is asked in which order, and why each dropped one is dropped."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from pvcore.errors import ExtractionError
from pvcore.rollouts import Rollout, asked, filtered, kept_of, reasons_of, turns
from pvcore.traits import ContrastPair

PROMPTS = (
    ContrastPair(positive="p0", negative="n0"),
    ContrastPair(positive="p1", negative="n1"),
)
Scores = tuple[float | None, float | None]


def rollouts(positive: Sequence[Scores], negative: Sequence[Scores]) -> list[Rollout]:
    return [
        Rollout(
            positive=side,
            system_prompt="p" if side else "n",
            question="q",
            answer="a",
            trait_score=trait,
            coherence_score=coherence,
            dropped="",
        )
        for side, scores in ((True, positive), (False, negative))
        for trait, coherence in scores
    ]


def test_positive_turns_come_first_and_negative_ones_in_the_same_order() -> None:
    found = turns(PROMPTS, ("a", "b"), 2)
    assert [turn.positive for turn in found] == [True] * 8 + [False] * 8
    assert [(t.system_prompt, t.question, t.copy) for t in found[:5]] == [
        ("p0", "a", 0),
        ("p0", "a", 1),
        ("p0", "b", 0),
        ("p0", "b", 1),
        ("p1", "a", 0),
    ]
    for one, other in zip(found[:8], found[8:], strict=True):
        assert (one.question, one.copy) == (other.question, other.copy)
        assert one.system_prompt.replace("p", "n") == other.system_prompt


def test_a_chat_has_a_system_message_only_where_there_is_a_prompt() -> None:
    assert asked("", "q") == [{"role": "user", "content": "q"}]
    (row,) = rollouts([(1.0, 2.0)], [])
    assert [message["role"] for message in row.chat] == ["system", "user", "assistant"]
    assert row.chat[-1]["content"] == "a"


def test_each_dropped_rollout_has_its_reason() -> None:
    rows = rollouts(
        [(90, 90), (10, 90), (90, 10), (90, 90), (None, None), (90, 90)],
        [(10, 90), (10, 90), (10, 90), (60, 90), (10, 90), (10, 49.9)],
    )
    found = filtered(rows, 50)
    assert [row.dropped for row in found] == [
        "",
        "positive without the trait",
        "incoherent",
        "its counterpart was dropped",
        "not judged",
        "its counterpart was dropped",
        "",
        "its counterpart was dropped",
        "its counterpart was dropped",
        "negative with the trait",
        "its counterpart was dropped",
        "incoherent",
    ]
    assert reasons_of(found)["its counterpart was dropped"] == 5
    assert sum(reasons_of(found).values()) == 10


def test_two_pairs_are_enough_and_one_is_not() -> None:
    two = filtered(rollouts([(90, 90)] * 2, [(10, 90)] * 2), 50)
    assert kept_of(two, "evil") == [0, 1, 2, 3]
    one = filtered(rollouts([(90, 90), (10, 90)], [(10, 90)] * 2), 50)
    with pytest.raises(ExtractionError, match=r"got 1 of 2 pairs kept for 'evil' \(replies dropp"):
        kept_of(one, "evil")
