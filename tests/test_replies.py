"""Who writes replies: the model itself under seeds, or a list of replies there is."""

from __future__ import annotations

import pytest
import torch

from pvcore.errors import ExtractionError
from pvcore.replies import GivenReplies, ModelWriter, Writer, batches
from pvcore.rollouts import Rollout, Turn, turns
from tests.test_extraction import PROMPTS, QUESTIONS, fresh_model


def rollout(system_prompt: str, question: str, answer: str) -> Rollout:
    return Rollout(
        positive=True,
        system_prompt=system_prompt,
        question=question,
        answer=answer,
        trait_score=None,
        coherence_score=None,
        dropped="",
    )


def test_a_batch_is_the_same_whenever_it_is_written() -> None:
    asked = turns(PROMPTS, QUESTIONS[:2], 2)
    writer = ModelWriter(fresh_model(), max_new_tokens=8, seed=4)
    assert isinstance(writer, Writer)
    torch.manual_seed(1)
    later = writer.write(asked[:4], batch=1)
    assert writer.write(asked[:4], batch=0) != later
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert writer.write(asked[:4], batch=1) == later
    assert torch.equal(torch.get_rng_state(), state)
    assert ModelWriter(fresh_model(), max_new_tokens=8, seed=5).write(asked[:4], batch=1) != later


def test_a_writer_says_what_decides_its_replies() -> None:
    model = fresh_model()
    known = ModelWriter(model, max_new_tokens=8, seed=4).identity
    others = (
        ModelWriter(model, max_new_tokens=9, seed=4),
        ModelWriter(model, max_new_tokens=8, seed=5),
        ModelWriter(model, max_new_tokens=8, seed=4, temperature=0.5),
        ModelWriter(model, max_new_tokens=8, seed=4, engine="graph"),
    )
    assert ModelWriter(model, max_new_tokens=8, seed=4, temperature=1).identity == known
    assert all(other.identity != known for other in others)


def test_any_engine_writes() -> None:
    asked = turns(PROMPTS, QUESTIONS[:1], 1)
    texts = [
        ModelWriter(fresh_model(), max_new_tokens=6, temperature=0, engine=engine).write(
            asked, batch=0
        )
        for engine in ("eager", "graph")
    ]
    assert texts[0] == texts[1]
    assert all(texts[0])


def test_given_replies_go_to_their_turns_in_the_order_they_were_given() -> None:
    given = GivenReplies(
        [rollout("a", "b", "one"), rollout("a", "c", "x"), rollout("a", "b", "two")]
    )
    asked = [
        Turn(positive=True, system_prompt="a", question=question, copy=copy)
        for question, copy in (("b", 1), ("c", 0), ("b", 0))
    ]
    assert isinstance(given, Writer)
    assert given.write(asked, batch=0) == ["two", "x", "one"]
    other = GivenReplies([rollout("a", "b", "one"), rollout("a", "c", "x"), rollout("a", "b", "2")])
    assert other.identity != given.identity


@pytest.mark.parametrize(
    ("question", "copy", "complaint"),
    [("d", 0, "got 0 given replies to 'd' under 'a'; wanted 1"), ("b", 1, "got 1 given replies")],
)
def test_a_turn_that_nobody_answered_is_one_typed_error(
    question: str, copy: int, complaint: str
) -> None:
    given = GivenReplies([rollout("a", "b", "one")])
    turn = Turn(positive=True, system_prompt="a", question=question, copy=copy)
    with pytest.raises(ExtractionError, match=complaint):
        given.write([turn], batch=0)


def test_batches_are_in_order_and_the_last_may_be_smaller() -> None:
    assert list(batches(range(5), 2)) == [range(0, 2), range(2, 4), range(4, 5)]
    with pytest.raises(ExtractionError, match="got batch_size=0"):
        list(batches(range(5), 0))
