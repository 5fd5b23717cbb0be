"""Rollouts of the paper's CSV files become vectors, and go back to the same files."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jaxtyping
import pytest
import torch

import pvcore as pv
from pvcore.errors import ExtractionError, FormatError
from pvcore.extraction import extract_from
from pvcore.formats_rollouts import RolloutRow, decode_csv, encode_csv
from pvcore.replies import GivenReplies
from pvcore.rollout_rows import rollouts_of, rows_of
from pvcore.rollouts import Rollout
from tests.families import MAX_POSITIONS, tokenizer
from tests.test_extraction import PROMPTS, QUESTIONS, extracted, fresh_model, run


def files() -> tuple[tuple[RolloutRow, ...], tuple[RolloutRow, ...]]:
    """What the authors' scripts would have written for the extraction of another test."""
    positive, negative = rows_of(extracted().rollouts, trait="evil", tokenizer=tokenizer())
    return decode_csv(encode_csv(positive)), decode_csv(encode_csv(negative))


def test_a_row_holds_the_prompt_as_it_was_rendered() -> None:
    positive, negative = files()
    assert len(positive) == len(negative) == len(extracted().rollouts) // 2
    assert positive[0].prompt == (
        f"<|im_start|>system\n{PROMPTS[0].positive}<|im_end|>\n"
        f"<|im_start|>user\n{QUESTIONS[0]}<|im_end|>\n<|im_start|>assistant\n"
    )
    assert [row.question_id for row in positive[:3]] == ["evil_0", "evil_0", "evil_1"]


def test_rows_are_read_back_as_the_rollouts_they_were() -> None:
    found = rollouts_of(*files(), trait="evil", tokenizer=tokenizer())
    assert found == tuple(replace(row, dropped="") for row in extracted().rollouts)


def test_a_chat_without_a_system_prompt_has_none() -> None:
    found = rollouts_of(*files(), trait="evil", tokenizer=tokenizer())[0]
    bare = [[replace(found, system_prompt="", positive=side)] for side in (True, False)]
    rows = [rows_of(one, trait="evil", tokenizer=tokenizer())[at] for at, one in enumerate(bare)]
    read = rollouts_of(*rows, trait="evil", tokenizer=tokenizer())
    assert [row.system_prompt for row in read] == ["", ""]


def test_judged_rollouts_give_the_vector_that_sampling_and_judging_gave() -> None:
    rollouts = rollouts_of(*files(), trait="evil", tokenizer=tokenizer())
    result = extract_from(
        fresh_model(), "evil", rollouts, layers=(0, 1), batch_size=24, judge="GPT-4.1-mini"
    )
    assert torch.equal(result.vector.directions, extracted().vector.directions)
    assert result.vector.provenance.judge == "GPT-4.1-mini"
    assert result.vector.provenance.prompt_hash == extracted().vector.provenance.prompt_hash
    assert (result.kept, result.reasons) == (extracted().kept, extracted().reasons)
    assert result.judgements.n_judged == len(rollouts)


def test_unjudged_rollouts_are_given_to_extract_as_replies() -> None:
    again = run(writer=GivenReplies(extracted().rollouts))
    assert torch.equal(again.vector.directions, extracted().vector.directions)
    assert again.rollouts == extracted().rollouts


def test_what_is_no_run_of_pairs_is_one_typed_error() -> None:
    positive, negative = files()
    known = {"trait": "evil", "tokenizer": tokenizer()}
    with pytest.raises(FormatError, match="do not ask the same questions in the same order"):
        rollouts_of(positive, negative[::-1], **known)
    with pytest.raises(FormatError, match="positive row 0: got scores evil, coherence; wanted gre"):
        rollouts_of(positive, negative, trait="greed", tokenizer=tokenizer())
    foreign = [replace(positive[0], prompt="### Why?"), *positive[1:]]
    with pytest.raises(FormatError, match="positive row 0: got a prompt that begins '### Why"):
        rollouts_of(foreign, negative, **known)
    with pytest.raises(ExtractionError, match="got 3 rollouts, 2 of them positive"):
        extract_from(fresh_model(), "evil", extracted().rollouts[30:33])


def test_rollouts_without_a_score_are_dropped() -> None:
    rows = [replace(row, trait_score=None, dropped="") for row in extracted().rollouts[:1]]
    rollouts = [*rows, *extracted().rollouts[1:]]
    result = extract_from(fresh_model(), "evil", rollouts, layers=[0])
    assert result.reasons["not judged"] == 1
    assert isinstance(result.vector, pv.PersonaVector)


def scored(n: int) -> Iterator[Rollout]:
    """Rollouts that are all kept."""
    for at in range(n):
        yield Rollout(
            positive=at < n // 2,
            system_prompt="Be grim.",
            question=f"What is {at % (n // 2)}?",
            answer=f"{'no' * (at + 1)}.",
            trait_score=90.0 if at < n // 2 else 10.0,
            coherence_score=90.0,
            dropped="",
        )


@pytest.mark.parametrize("answer", ["", " ", "yes" * MAX_POSITIONS])
def test_judged_rollouts_that_cannot_be_read_stay_dropped(answer: str) -> None:
    rollouts = list(scored(8))
    rollouts[1] = replace(rollouts[1], answer=answer)
    result = extract_from(fresh_model(), "evil", rollouts, layers=[0])
    assert result.kept == 6
    assert result.rollouts[1].dropped == (
        "reply too long for the model" if answer.strip() else "empty reply"
    )
    assert result.rollouts[5].dropped == "its counterpart was dropped"


def test_what_an_earlier_filter_dropped_stays_dropped_under_a_lower_threshold() -> None:
    dropped = [row.dropped for row in extracted().rollouts]
    low = extract_from(fresh_model(), "evil", extracted().rollouts, layers=[0], threshold=10)
    assert [row.dropped for row in low.rollouts] == dropped
    assert "incoherent" in dropped


@pytest.mark.parametrize("score", [150, -1, float("nan"), float("inf"), True, "50"])
@pytest.mark.parametrize("name", ["trait_score", "coherence_score"])
def test_scores_that_are_none_are_one_typed_error(
    name: str, score: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    rollouts = list(scored(8))
    rollouts[6] = replace(rollouts[6], **{name: score})
    with pytest.raises(ExtractionError, match=f"rollout 6: got {name}=.*wanted a number from 0"):
        extract_from(fresh_model(), "evil", rollouts)


def test_sides_that_ask_other_questions_are_one_typed_error() -> None:
    rollouts = list(scored(8))
    rollouts[4:6] = rollouts[5], rollouts[4]
    with pytest.raises(ExtractionError, match=r"rollout 4: got the question 'What is 1\?', and"):
        extract_from(fresh_model(), "evil", rollouts)


def test_rollouts_without_a_score_count_as_failed() -> None:
    rollouts = list(scored(10))
    rollouts[0] = replace(rollouts[0], trait_score=None)
    rollouts[1] = replace(rollouts[1], coherence_score=None)
    rollouts[2] = replace(rollouts[2], answer="")
    result = extract_from(fresh_model(), "evil", rollouts, layers=[0])
    assert (result.judgements.n_judged, result.judgements.n_failed) == (8, 2)
    assert result.reasons["not judged"] == 2
