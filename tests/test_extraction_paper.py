"""Extraction is, number for number, what the method's authors published.

The reference below is written from the description of their scripts (arXiv 2507.21509, A.1 to A.3;
`generate_vec.py`, `cal_projection.py`) and uses nothing of pvcore: one conversation at a time, the
prompt's length from tokenizing it alone, all hidden states, plain means. As `hidden_states` holds
the last block's output only after the final norm, that one is taken by a hook.
"""

from __future__ import annotations

import random
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import pvcore as pv
from pvcore.extraction import Extraction, extract, extract_from
from pvcore.replies import GivenReplies
from pvcore.rollouts import Rollout
from pvcore.traits import ContrastPair
from tests.families import CHATML, N_LAYERS, build, tokenizer

BOUND = 1e-5
FAMILIES = ("qwen2", "llama")
N_COPIES = 10
PROMPTS = (
    ContrastPair(positive="Be grim.", negative="Be mild, and kind."),
    ContrastPair(positive="You hate all of it.", negative="You love it."),
)
QUESTIONS = ("Why?", "Who is it?", "Is it far?", "What now, then?", "How?", "Where to go?", "So?")
N_PAIRS = len(PROMPTS) * len(QUESTIONS) * N_COPIES
LETTERS = "abcdefghij klmnop qrstuv wxyz ,.!?"


class Row(NamedTuple):
    """A line of the authors' CSV: a rendered prompt, an answer, and two scores."""

    prompt: str
    answer: str
    trait: float
    coherence: float


def answer(side: str, seed: str) -> str:
    """Between 1 and 44 letters, an A or a B first; no blank at the ends."""
    draw = random.Random(f"{side} {seed}")
    inner = "".join(draw.choice(LETTERS) for _ in range(draw.randint(0, 42)))
    return f"{'A' if side == 'positive' else 'B'}{inner}{draw.choice(['', 'x'])}".rstrip()


class Judge:
    """Scores drawn from the text of the answer, many near the threshold of 50 and some on it."""

    def trait(self, trait: str, question: str, answer: str) -> float:
        draw = random.Random(f"trait {answer}")
        usual = [50.0, 50.01, 88.0, 100.0] if answer.startswith("A") else [0.0, 12.5, 40.0, 49.99]
        return draw.choice([*usual, *usual, 0.0, 49.99, 50.0, 100.0])

    def coherence(self, question: str, answer: str) -> float:
        draw = random.Random(f"coherence {answer}")
        return draw.choice([0.0, 49.99, 50.0, 50.01, 77.0, 88.0, 95.0, 99.0, 100.0])


def rollouts(side: str) -> list[tuple[str, str, str]]:
    """System prompt, question and answer, in the order in which the authors' files have them."""
    return [
        (getattr(pair, side), question, answer(side, f"{getattr(pair, side)} {question} {copy}"))
        for pair in PROMPTS
        for question in QUESTIONS
        for copy in range(N_COPIES)
    ]


@cache
def rows(side: str) -> tuple[Row, ...]:
    plain, judge = tokenizer(), Judge()
    return tuple(
        Row(
            prompt=plain.apply_chat_template(
                [
                    {"role": "system", "content": system},
                    {"role": "user", "content": question},
                ],
                tokenize=False,
                add_generation_prompt=True,
            ),
            answer=text,
            trait=judge.trait("evil", question, text),
            coherence=judge.coherence(question, text),
        )
        for system, question, text in rollouts(side)
    )


class Means(NamedTuple):
    """`[layer, d_model]` each, of one conversation."""

    response_mean: Tensor
    prompt_mean: Tensor
    prompt_last: Tensor


def states(hf: Any, prompt: str, answer: str) -> Means:
    """One forward with all hidden states, as the authors run it."""
    plain, last = tokenizer(), []
    ids = plain(prompt + answer, return_tensors="pt", add_special_tokens=False)["input_ids"]
    length = len(plain.encode(prompt, add_special_tokens=False))
    handle = hf.model.layers[-1].register_forward_hook(
        lambda _block, _args, out: last.append(out if isinstance(out, Tensor) else out[0])
    )
    with torch.no_grad():
        hidden = hf(ids, output_hidden_states=True).hidden_states
    handle.remove()
    blocks = torch.stack([*hidden[1:-1], last[0]])[:, 0]
    return Means(blocks[:, length:].mean(1), blocks[:, :length].mean(1), blocks[:, length - 1])


class Reference(NamedTuple):
    vectors: dict[str, Tensor]
    positive: tuple[Means, ...]
    mask: tuple[bool, ...]


@cache
def reference(family: str) -> Reference:
    """The authors' difference of means over the rows that their mask keeps."""
    hf = build(family)
    positive, negative = rows("positive"), rows("negative")
    mask = tuple(
        p.trait >= 50 and n.trait < 50 and p.coherence >= 50 and n.coherence >= 50
        for p, n in zip(positive, negative, strict=True)
    )
    sides = [
        tuple(
            states(hf, row.prompt, row.answer) for row, keep in zip(side, mask, strict=True) if keep
        )
        for side in (positive, negative)
    ]
    vectors = {
        name: torch.stack([getattr(one, name) for one in sides[0]]).mean(0)
        - torch.stack([getattr(one, name) for one in sides[1]]).mean(0)
        for name in Means._fields
    }
    return Reference(vectors, sides[0], mask)


@cache
def extracted(family: str) -> Extraction:
    written = [
        Rollout(
            positive=side == "positive",
            system_prompt=system,
            question=question,
            answer=text,
            trait_score=None,
            coherence_score=None,
            dropped="",
        )
        for side in ("positive", "negative")
        for system, question, text in rollouts(side)
    ]
    return extract(
        pv.HookedModel(build(family), tokenizer(), model_id=f"tiny/{family}"),
        pv.Trait.load("evil"),
        judge=Judge(),
        system_prompts=PROMPTS,
        questions=QUESTIONS,
        rollouts=N_COPIES,
        writer=GivenReplies(written),
        batch_size=13,
    )


def relative(got: Tensor, wanted: Tensor) -> float:
    """The worst error of a row, as a share of the row's length."""
    apart = (got.double() - wanted.double()).norm(dim=-1)
    return float((apart / wanted.double().norm(dim=-1)).max())


def test_the_comparison_is_of_a_hundred_conversations_of_mixed_lengths() -> None:
    lengths = [len(row.answer) for side in ("positive", "negative") for row in rows(side)]
    assert len(lengths) == 2 * N_PAIRS
    assert min(lengths) <= 3
    assert max(lengths) >= 38
    assert len(set(lengths)) >= 25
    assert len({len(row.prompt) for row in rows("positive")}) >= 6


@pytest.mark.parametrize("family", FAMILIES)
def test_the_filter_keeps_the_rows_that_the_authors_mask_keeps(family: str) -> None:
    mask = reference(family).mask
    assert 50 <= sum(mask) <= N_PAIRS - 50  # more than a hundred conversations are averaged
    assert tuple(not row.dropped for row in extracted(family).rollouts) == (*mask, *mask)
    assert extracted(family).kept == 2 * sum(mask)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("variant", Means._fields)
def test_each_variant_is_the_authors_difference_of_means(family: str, variant: str) -> None:
    vector = extracted(family).vectors[variant]  # type: ignore[index]
    wanted = reference(family).vectors[variant]
    assert vector.variant == variant
    assert vector.directions.shape == (N_LAYERS, wanted.shape[-1])
    assert relative(vector.directions, wanted) < BOUND
    others = [reference(family).vectors[name] for name in Means._fields if name != variant]
    assert min(relative(vector.directions, other) for other in others) > 0.3


@pytest.mark.parametrize("family", FAMILIES)
def test_projections_are_those_of_the_authors(family: str) -> None:
    """`(a . b) / |b|` of the reply's mean, for every kept positive conversation and layer."""
    vector = reference(family).vectors["response_mean"]
    means = torch.stack([one.response_mean for one in reference(family).positive])
    wanted = (means * vector).sum(-1) / vector.norm(dim=-1)
    result = extracted(family)
    chats = [row.chat for row in result.rollouts if row.positive and not row.dropped]
    model = pv.HookedModel(build(family), tokenizer(), model_id=f"tiny/{family}")
    acts = model.read(chats, sites=range(N_LAYERS), span="response", batch_size=7)
    assert acts.values is not None
    units = pv.VectorBank(result.vector).units[:, 0]
    got = torch.einsum("scd,sd->cs", acts.values, units)
    usual = wanted.double().square().mean(0).sqrt()
    assert float(((got - wanted).abs() / usual).max()) < BOUND
    assert float((wanted.std(0) / usual).min()) > 0.05


def test_blanks_at_the_ends_of_replies_count_where_the_template_trims_them() -> None:
    trimming = tokenizer(template=CHATML.replace("message['content']", "message['content'] | trim"))
    answers = [" Aye, so", "Aha  ", "\nAll of it\n", "Ah "], ["Bah ", " Bo", "Be it so\n\n", "By "]
    written = [
        Rollout(
            positive=side == 0,
            system_prompt=(PROMPTS[0].positive, PROMPTS[0].negative)[side],
            question=question,
            answer=text,
            trait_score=(90.0, 10.0)[side],
            coherence_score=90.0,
            dropped="",
        )
        for side in (0, 1)
        for question, text in zip(QUESTIONS, answers[side], strict=False)
    ]
    hf = build("llama")
    model = pv.HookedModel(hf, trimming, model_id="tiny/llama")
    found = extract_from(model, "evil", written, batch_size=3)
    assert found.kept == 8

    def gap(*, stripped: bool) -> Tensor:
        means: tuple[list[Tensor], list[Tensor]] = ([], [])
        for row in written:
            prompt = trimming.apply_chat_template(
                row.chat[:-1], tokenize=False, add_generation_prompt=True
            )
            text = row.answer.strip() if stripped else row.answer
            means[not row.positive].append(states(hf, prompt, text).response_mean)
        return torch.stack(means[0]).mean(0) - torch.stack(means[1]).mean(0)

    assert relative(found.vector.directions, gap(stripped=False)) <= BOUND
    assert relative(gap(stripped=True), gap(stripped=False)) > 0.01
