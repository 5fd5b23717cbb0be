"""Extraction: the pairwise filter, the means it is taken over, and what is dropped and why."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any, ClassVar

import jaxtyping
import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor

import pvcore as pv
from pvcore.errors import ChatError, ExtractionError, JudgeFailure, SiteError
from pvcore.extraction import Extraction, Rollout, extract, pairwise_filter, sample_replies
from pvcore.rollouts import Turn
from pvcore.traits import ContrastPair
from tests.families import MAX_POSITIONS, N_LAYERS, build, tokenizer

PROMPTS = (
    ContrastPair(positive="Be grim.", negative="Be mild."),
    ContrastPair(positive="You hate all.", negative="You love all."),
)
QUESTIONS = tuple(f"What is {letter}?" for letter in "abcdefgh")
LAYERS = (0, 1)  # hidden_states holds the block's output everywhere but at the last layer
TRAIT = pv.Trait.load("evil")


class Letters:
    """Scores by the letters of an answer, so that random replies fall on both sides."""

    def trait(self, trait: str, question: str, answer: str) -> float:
        return 100.0 * (sum(map(ord, answer)) % 3 > 0)

    def coherence(self, question: str, answer: str) -> float:
        return 20.0 if "q" in answer else 90.0


def fresh_model() -> pv.HookedModel:
    return pv.HookedModel(build("qwen2"), tokenizer(), model_id="tiny/qwen2")


def run(model: pv.HookedModel | None = None, **settings: Any) -> Extraction:
    wanted = {"judge": Letters(), "system_prompts": PROMPTS, "questions": QUESTIONS}
    sizes = {"layers": LAYERS, "rollouts": 2, "max_new_tokens": 8, "batch_size": 24}
    return extract(model or fresh_model(), TRAIT, **(wanted | sizes | settings))


@cache
def extracted() -> Extraction:
    return run()


def chat(rollout: Rollout) -> list[dict[str, str]]:
    return [
        {"role": "system", "content": rollout.system_prompt},
        {"role": "user", "content": rollout.question},
    ]


@cache
def oracle() -> tuple[tuple[bool, Tensor], ...]:
    """Side and mean hidden state over the reply `[layer, d_model]` of each kept rollout."""
    hf, plain = build("qwen2"), tokenizer()
    means = []
    for rollout in extracted().rollouts:
        if rollout.dropped:
            continue
        prompt = plain.apply_chat_template(
            chat(rollout), add_generation_prompt=True, return_dict=False
        )
        reply = plain(rollout.answer, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            states = hf(torch.tensor([prompt + reply]), output_hidden_states=True).hidden_states
        at_layers = [states[layer + 1][0, len(prompt) :].double().mean(0) for layer in LAYERS]
        means.append((rollout.positive, torch.stack(at_layers)))
    return tuple(means)


def gap(rows: Sequence[tuple[bool, Tensor]]) -> Tensor:
    positive, negative = (
        torch.stack([mean for side, mean in rows if side == wanted]).mean(0)
        for wanted in (True, False)
    )
    return positive - negative


@pytest.mark.parametrize(
    ("row", "kept"),
    [
        ((50, 49, 50, 50), True),
        ((100, 0, 100, 100), True),
        ((49, 0, 100, 100), False),
        ((100, 50, 100, 100), False),
        ((100, 0, 49, 100), False),
        ((100, 0, 100, 49), False),
        ((math.nan, 0, 100, 100), False),
        ((100, math.nan, 100, 100), False),
        ((100, 0, None, 100), False),
        ((100, 0, 100, None), False),
    ],
)
def test_a_row_is_kept_by_all_four_scores(row: tuple[float | None, ...], kept: bool) -> None:
    assert pairwise_filter(*([score] for score in row)) == (kept,)


def test_rows_are_filtered_one_by_one_at_the_threshold_given() -> None:
    columns = ([80, 80, 30], [10, 60, 10], [90, 90, 90], [90, 90, 90])
    assert pairwise_filter(*columns) == (True, False, False)
    assert pairwise_filter(*columns, threshold=70) == (True, True, False)
    assert pairwise_filter([], [], [], []) == ()


def test_columns_of_different_lengths_are_refused() -> None:
    with pytest.raises(ExtractionError, match="got 2, 1, 2, 2 scores; wanted one of each kind"):
        pairwise_filter([1, 2], [1], [1, 2], [1, 2])


def test_the_vector_is_the_gap_between_the_means_of_kept_replies() -> None:
    vector, wanted = extracted().vector, gap(oracle())
    assert vector.sites == tuple(map(pv.resid_post, LAYERS))
    assert float(wanted.norm(dim=1).min()) > 0.1
    # Float32 forwards in batches of other shapes; residuals are of order one.
    assert float((vector.directions - wanted).abs().max()) < 1e-5


def test_confidence_is_the_cosine_of_two_halves_of_the_pairs() -> None:
    pairs = len(oracle()) // 2
    halves = [gap([row for at, row in enumerate(oracle()) if at % pairs % 2 == h]) for h in (0, 1)]
    wanted = torch.nn.functional.cosine_similarity(*halves, dim=1)
    assert extracted().confidence.tolist() == pytest.approx(wanted.tolist(), abs=1e-4)
    assert float(wanted.max()) < 0.9  # a random model has no persona to agree about


def test_layers_say_how_far_replies_are_apart() -> None:
    sides = [torch.stack([m for side, m in oracle() if side == wanted]) for wanted in (True, False)]
    spread = (sum(side.var(0, correction=0).sum(-1) for side in sides) / 2).sqrt()
    for place, quality in enumerate(extracted().layers):
        assert quality.site == pv.resid_post(LAYERS[place])
        assert quality.norm == pytest.approx(float(gap(oracle())[place].norm()), rel=1e-4)
        assert quality.separation == pytest.approx(quality.norm / float(spread[place]), rel=1e-4)


def test_every_rollout_is_counted_and_every_dropped_one_has_its_reason() -> None:
    result = extracted()
    assert len(result.rollouts) == 2 * len(PROMPTS) * len(QUESTIONS) * 2
    assert result.kept + result.dropped == len(result.rollouts)
    assert sum(result.reasons.values()) == result.dropped
    half = len(result.rollouts) // 2
    for positive, negative in zip(result.rollouts[:half], result.rollouts[half:], strict=True):
        assert (positive.positive, negative.positive) == (True, False)
        assert positive.question == negative.question
        assert bool(positive.dropped) == bool(negative.dropped)
        for row in (positive, negative):
            assert row.dropped == wanted_reason(row, kept=not positive.dropped)
    assert set(result.reasons) == {
        "positive without the trait",
        "negative with the trait",
        "incoherent",
        "its counterpart was dropped",
    }


def wanted_reason(row: Rollout, *, kept: bool) -> str:
    judge = Letters()
    if kept:
        return ""
    if row.positive and judge.trait("evil", row.question, row.answer) < 50:
        return "positive without the trait"
    if not row.positive and judge.trait("evil", row.question, row.answer) >= 50:
        return "negative with the trait"
    if judge.coherence(row.question, row.answer) < 50:
        return "incoherent"
    return "its counterpart was dropped"


def test_the_vector_says_where_it_comes_from(tmp_path: Path) -> None:
    vector, result = extracted().vector, extracted()
    assert (vector.trait, vector.model_id, vector.variant) == (
        "evil",
        "tiny/qwen2",
        "response_mean",
    )
    source = vector.provenance
    assert source.thresholds == {"trait": 50.0, "coherence": 50.0}
    assert (source.judge, source.kept, source.dropped) == ("Letters", result.kept, result.dropped)
    assert source.seeds == (0,)
    assert source.note.endswith("judged 64 of 64, failed 0 (refused 0)")
    assert len(source.prompt_hash) == 64
    assert source.prompt_hash != run(questions=QUESTIONS[::-1]).vector.provenance.prompt_hash
    vector.save(tmp_path / "evil.safetensors")
    assert pv.PersonaVector.load(tmp_path / "evil.safetensors") == vector


def test_prompts_questions_and_layers_are_by_default_those_of_the_trait_and_the_model() -> None:
    class Kind(Letters):
        def trait(self, trait: str, question: str, answer: str) -> float:
            return 100.0 * (len(answer) % 2)

    model = fresh_model()
    model.hf.config.max_position_embeddings = 4096  # the trait's prompts are long for a tiny model
    result = extract(model, TRAIT, judge=Kind(), max_new_tokens=4, batch_size=100)
    assert result.vector.sites == tuple(map(pv.resid_post, range(N_LAYERS)))
    assert {r.question for r in result.rollouts} == set(TRAIT.extraction_questions)
    assert {r.system_prompt for r in result.rollouts if r.positive} == {
        pair.positive for pair in TRAIT.system_prompts
    }


def test_a_run_repeats_itself_and_leaves_the_random_state_alone() -> None:
    model = fresh_model()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    assert run(model) == extracted()
    assert torch.equal(torch.get_rng_state(), before)
    assert run(model, seed=1).rollouts != extracted().rollouts


def test_every_batch_has_a_seed_of_its_own() -> None:
    model = fresh_model()
    same = [[{"role": "user", "content": "Why?"}]] * 4
    replies = sample_replies(model, same, max_new_tokens=8, batch_size=2, seed=3)
    assert replies[:2] == sample_replies(model, same[:2], max_new_tokens=8, batch_size=2, seed=3)
    assert len(set(replies)) == 4


def test_samples_are_plain_whatever_the_model_is_set_to() -> None:
    model = fresh_model()
    chats = [[{"role": "user", "content": text}] for text in ("Why?", "How?")]
    plain = sample_replies(model, chats, max_new_tokens=8)
    model.hf.generation_config.update(top_k=1, repetition_penalty=50.0)
    assert sample_replies(model, chats, max_new_tokens=8) == plain
    greedy = sample_replies(model, chats, max_new_tokens=8, temperature=0)
    assert greedy != plain
    model.hf.generation_config.update(repetition_penalty=1.0)
    assert greedy == model.generate(chats, max_new_tokens=8, do_sample=False)


@pytest.mark.parametrize(
    "own",
    [
        {"min_p": 0.99},
        {"typical_p": 0.01},
        {"epsilon_cutoff": 0.9},
        {"eta_cutoff": 0.9},
        {"top_h": 0.01},
        {"no_repeat_ngram_size": 1},
        {"num_beams": 3},
        {"num_return_sequences": 2, "do_sample": True},
        {"suppress_tokens": list(range(40, 60))},
        {"bad_words_ids": [[token] for token in range(40, 60)]},
        {"forced_eos_token_id": 2},
        {"sequence_bias": [[[50], 30.0]]},
    ],
    ids=lambda own: next(iter(own)),
)
def test_nothing_that_a_generation_config_holds_changes_samples(own: dict[str, Any]) -> None:
    model = fresh_model()
    chats = [[{"role": "user", "content": text}] for text in ("Why?", "How?")]
    plain = sample_replies(model, chats, max_new_tokens=12)
    model.hf.generation_config.update(**own)
    assert sample_replies(model, chats, max_new_tokens=12) == plain
    how = {"do_sample": True, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}
    with torch.random.fork_rng():
        torch.manual_seed(int.from_bytes(sha256(b"0/0").digest()[:7], "big"))
        assert model.generate(chats, max_new_tokens=12, temperature=1.0, **how) != plain


def with_merge(text: str) -> Any:
    """The tokenizer with one more token, which spans the end of a prompt and a reply's start."""
    plain = tokenizer()
    backend = json.loads(plain.backend_tokenizer.to_str())
    backend["model"]["vocab"][text] = len(plain)
    backend["model"]["merges"] = [list(text)]
    plain._tokenizer = Tokenizer.from_str(json.dumps(backend))
    return plain


class Written:
    """Replies known beforehand, in the order of the turns; None is declined."""

    identity: ClassVar = {"writer": "a test"}

    def __init__(self, replies: Sequence[str | None]) -> None:
        self.replies = list(replies)

    def write(self, turns: Sequence[Turn], *, batch: int) -> list[str | None]:
        return [self.replies.pop(0) for _ in turns]


def test_replies_that_cannot_be_read_are_dropped_with_their_reason() -> None:
    model = pv.HookedModel(build("qwen2"), with_merge("\nz"), model_id="tiny/qwen2")
    positive = ["yes", "yes, yes", "yes", " \n", "zest", "yes", "yes" * MAX_POSITIONS, None]
    negative = ["no", "no, no", "", "no", "no", "no", "no", "no"]
    result = extract(
        model,
        TRAIT,
        judge=YesOrNo(),
        system_prompts=PROMPTS[:1],
        questions=QUESTIONS[:8],
        writer=Written(positive + negative),
    )
    assert result.reasons == {
        "empty reply": 2,
        "reply too long for the model": 1,
        "reply whose tokens cannot be told from the prompt's": 1,
        "the writer declined": 1,
        "its counterpart was dropped": 5,
    }
    assert result.kept == 6
    unread = [r for r in result.rollouts if r.dropped and "counterpart" not in r.dropped]
    assert all(r.trait_score is None and r.coherence_score is None for r in unread)


class YesOrNo:
    """Sees the trait in a yes; one answer it cannot judge."""

    unjudged = "I cannot say"

    def trait(self, trait: str, question: str, answer: str) -> float:
        if answer == self.unjudged:
            raise JudgeFailure("no words")
        return 100.0 * answer.startswith("yes")

    def coherence(self, question: str, answer: str) -> float:
        return 100.0


def test_a_failed_judgement_drops_its_pair_and_is_counted() -> None:
    replies = ["yes"] * 5 + [YesOrNo.unjudged] + ["no", "no, no"] * 3
    result = extract(
        fresh_model(),
        TRAIT,
        judge=YesOrNo(),
        system_prompts=PROMPTS[:1],
        questions=QUESTIONS[:6],
        writer=Written(replies),
    )
    assert result.judgements.counts == "judged 11 of 12, failed 1 (refused 0)"
    assert result.reasons == Counter({"the judge failed": 1, "its counterpart was dropped": 1})
    assert result.kept == 10


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"threshold": 101.0}, "got 0 of 32 pairs kept for 'evil'.*wanted at least 2"),
        ({"rollouts": 0}, "got 2 pairs of system prompts, 8 questions and rollouts=0"),
        ({"questions": ()}, "got 2 pairs of system prompts, 0 questions"),
        ({"system_prompts": ()}, "got 0 pairs of system prompts"),
        ({"batch_size": 0}, "got batch_size=0"),
        ({"resamples": -1}, "resamples=-1"),
        ({"threshold": math.nan}, "got threshold=nan; wanted a finite number"),
        ({"resamples": 1}, "got resamples=1; wanted at least 2"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"temperature": math.nan}, "temperature=nan"),
    ],
)
def test_what_gives_no_vector_is_one_typed_error(settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ExtractionError, match=complaint):
        run(**settings)


def test_what_cannot_be_is_refused_before_anything_is_sampled() -> None:
    untouched = Written([])
    with pytest.raises(SiteError, match=r"got site resid_post\.99; this qwen2 model has 3 blocks"):
        run(writer=untouched, layers=[99])
    with pytest.raises(ExtractionError, match="resamples=-1"):
        run(writer=untouched, resamples=-1)
    with pytest.raises(ChatError, match="got no tokenizer"):
        run(pv.HookedModel(build("qwen2"), None, model_id="tiny/qwen2"))


@pytest.mark.parametrize(
    "bad",
    [
        {"threshold": "50"}, {"threshold": None}, {"threshold": math.inf}, {"seed": None},
        {"seed": 1.5}, {"judge": None}, {"questions": "Why?"}, {"questions": [1]},
        {"rollouts": 1.5}, {"resamples": 2.5}, {"batch_size": True},
    ],
    ids=str,
)  # fmt: skip
def test_bad_arguments_are_refused_before_anything_is_sampled(
    bad: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ExtractionError, match=f"got {next(iter(bad))}.*wanted"):
        run(writer=Written([]), **bad)


def test_how_to_sample_is_checked_and_a_name_is_no_trait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ExtractionError, match="got temperature='1'"):
        run(temperature="1")
    with pytest.raises(ExtractionError, match=r"got max_new_tokens=2\.5"):
        run(max_new_tokens=2.5)
    with pytest.raises(ExtractionError, match=r"got trait 'evil'; wanted a Trait\. Load it"):
        extract(fresh_model(), "evil", judge=Letters())  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", [-3, 2**70])
def test_any_whole_number_is_a_seed(seed: int) -> None:
    assert run(seed=seed).vector.provenance.seeds == (seed,)


def test_no_readable_reply_is_one_typed_error() -> None:
    with pytest.raises(ExtractionError, match=r"got no readable reply among 64.*empty reply"):
        run(writer=Written([""] * 64))


def test_a_writer_that_leaves_a_turn_out_is_one_typed_error() -> None:
    class Lazy(Written):
        def write(self, turns: Sequence[Turn], *, batch: int) -> list[str | None]:
            return super().write(turns[1:], batch=batch)

    with pytest.raises(ExtractionError, match="got 23 replies to 24 turns from Lazy"):
        run(writer=Lazy(["yes"] * 64))
