"""The local judge against an enumeration of its own: every number written out, in float64."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

import pvcore as pv
from pvcore import world
from pvcore.errors import JudgeFailure, PvcoreError, TraitError
from pvcore.grading import Rubrics
from pvcore.judge import Judge, judge_all
from pvcore.judge_local import LocalJudge
from pvcore.traits import ContrastPair, Trait
from pvcore.world.tokenizer import TEMPLATE

WORDS = "How many ? why so no yes rate it said is a b c d e f user assistant"
NUMBERS = [str(number) for number in range(101)]
RUBRIC = "rate {question} it said {answer}"


def splitting() -> Any:
    """The tokenizer of the persona world, which writes 85 in two tokens."""
    return AutoTokenizer.from_pretrained(world.path())


def whole() -> Any:
    """A tokenizer of words, to which 85 is one."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "[UNK]"]
    vocabulary = {word: index for index, word in enumerate([*special, *NUMBERS, *WORDS.split()])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=TEMPLATE,
    )


TOKENIZERS: dict[str, Callable[[], Any]] = {"splitting": splitting, "whole": whole}


def subject(
    tokenizer: Any,
    *,
    liking: float = 9.0,
    stopping: float = 8.0,
    dtype: torch.dtype = torch.float32,
) -> Any:
    """A random Qwen2 that likes to write digits and to stop after them."""
    torch.manual_seed(3)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        initializer_range=0.3,
    )
    model = Qwen2ForCausalLM(config).eval()
    written = tokenizer([*NUMBERS], add_special_tokens=False)["input_ids"]
    numbers = sorted({token for ids in written for token in ids})
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    bias = torch.zeros(len(tokenizer))
    bias[numbers], bias[end] = liking, liking - 2.0
    head = nn.Linear(32, len(tokenizer), bias=True)
    with torch.no_grad():
        # One column of the residual says "a number stands here", and makes the end likely.
        model.model.embed_tokens.weight[:, 0] = 0.0
        model.model.embed_tokens.weight[numbers, 0] = 4.0
        head.weight.copy_(0.5 * model.lm_head.weight)
        head.weight[:, 0] = 0.0
        head.weight[end, 0] = stopping
        head.bias.copy_(bias)
    model.lm_head = head
    return model.to(dtype)


def rubric(question: str, answer: str) -> str:
    return RUBRIC.format(question=question, answer=answer)


def prompt(text: str) -> str:
    return f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"


def enumerated(model: Any, tokenizer: Any, text: str) -> Tensor:
    """The probability that the whole reply is each number: one forward for each, in float64."""
    exact = copy.deepcopy(model).double()
    opening = tokenizer(prompt(text), add_special_tokens=False)["input_ids"]
    probabilities = []
    for number in NUMBERS:
        whole = prompt(text) + number + "<|im_end|>"
        ids = tokenizer(whole, add_special_tokens=False)["input_ids"]
        assert ids[: len(opening)] == opening
        with torch.no_grad():
            logits = exact(torch.tensor([ids]), use_cache=False).logits[0]
        logprobs = logits.log_softmax(-1)
        total = sum(logprobs[at - 1, ids[at]].item() for at in range(len(opening), len(ids)))
        probabilities.append(math.exp(total))
    return torch.tensor(probabilities, dtype=torch.float64)


def mean_of(probabilities: Tensor) -> float:
    numbers = torch.arange(101, dtype=torch.float64)
    return float((probabilities * numbers).sum() / probabilities.sum())


def trait() -> Trait:
    return Trait(
        name="bluntness",
        adjective="blunt",
        opposite="mild",
        description="says it straight",
        instructions=(ContrastPair(positive="Be blunt.", negative="Be mild."),),
        extraction_questions=("why",),
        evaluation_questions=("how",),
        rubric=RUBRIC,
    )


ANSWERS = [("why ?", "so so no"), ("How many ?", "yes"), ("why", "a b c d e f a b c d e f")]


def scores_of(judge: LocalJudge) -> list[float]:
    return [judge.trait("bluntness", *pair) for pair in ANSWERS]


def test_coherence_is_scored_in_the_same_way() -> None:
    tokenizer = splitting()
    model = subject(tokenizer)
    text = Rubrics().coherence(*ANSWERS[1])
    probabilities = enumerated(model, tokenizer, text)
    wanted = mean_of(probabilities)
    assert 0.25 < float(probabilities.sum()) <= 1.0
    assert LocalJudge(model, tokenizer).coherence(*ANSWERS[1]) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("batch_size", [1, 7, 128])
def test_the_score_is_that_of_an_enumeration(name: str, batch_size: int) -> None:
    tokenizer = TOKENIZERS[name]()
    assert (len(tokenizer("85", add_special_tokens=False)["input_ids"]) == 1) == (name == "whole")
    model = subject(tokenizer)
    judge = LocalJudge(model, tokenizer, traits=[trait()], batch_size=batch_size)
    precise = LocalJudge(
        copy.deepcopy(model).double(), tokenizer, traits=[trait()], batch_size=batch_size
    )
    scores = []
    for question, answer in ANSWERS:
        probabilities = enumerated(model, tokenizer, rubric(question, answer))
        assert 0.25 < float(probabilities.sum()) <= 1.0
        wanted = mean_of(probabilities)
        assert judge.trait("bluntness", question, answer) == pytest.approx(wanted, rel=1e-5)
        assert precise.trait("bluntness", question, answer) == pytest.approx(wanted, rel=1e-12)
        scores.append(wanted)
    assert len({round(score, 3) for score in scores}) == len(scores)


def test_a_number_is_not_taken_for_the_beginning_of_another() -> None:
    tokenizer = splitting()
    model = subject(tokenizer)
    judge = LocalJudge(model, tokenizer, traits=[trait()])
    probabilities = enumerated(model, tokenizer, rubric(*ANSWERS[0]))
    first = tokenizer("8", add_special_tokens=False)["input_ids"]
    opening = tokenizer(prompt(rubric(*ANSWERS[0])), add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        begins = model(torch.tensor([opening])).logits[0, -1].softmax(-1)[first[0]]
    # Where 8 alone is as likely as it looks at first sight, this would say nothing.
    assert float(begins) > 1.2 * float(probabilities[8])
    assert judge.trait("bluntness", *ANSWERS[0]) == pytest.approx(mean_of(probabilities), rel=1e-5)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_too_little_probability_on_numbers_is_a_failure(name: str) -> None:
    tokenizer = TOKENIZERS[name]()
    model = subject(tokenizer, liking=-4.0)
    mass = float(enumerated(model, tokenizer, rubric(*ANSWERS[0])).sum())
    assert mass < 0.25
    judge = LocalJudge(model, tokenizer, traits=[trait()])
    with pytest.raises(JudgeFailure) as caught:
        judge.trait("bluntness", *ANSWERS[0])
    assert str(caught.value).startswith(f"got a probability of {mass:.3g} that the reply is")
    result = judge_all(judge, "bluntness", ANSWERS, max_failed=1.0)
    assert (result.n_judged, result.n_failed) == (0, 3)
    assert {row.method for row in result.rows} == {"enumerated-candidates"}


def test_a_numberless_model_that_is_broken_scores_nothing() -> None:
    tokenizer = splitting()
    model = subject(tokenizer)
    with torch.no_grad():
        model.lm_head.bias[:] = math.nan
    judge = LocalJudge(model, tokenizer, traits=[trait()])
    with pytest.raises(JudgeFailure, match="got a probability of nan"):
        judge.trait("bluntness", *ANSWERS[0])


def test_a_hooked_model_judges_with_its_own_tokenizer_and_unsteered() -> None:
    tokenizer = splitting()
    hooked = pv.HookedModel(subject(tokenizer), tokenizer, model_id="tiny")
    judge = LocalJudge(hooked, traits=[trait()])
    assert isinstance(judge, Judge)
    alone = scores_of(judge)
    push = pv.PersonaVector(
        trait="evil", sites=[pv.resid_post(1)], directions=torch.ones(1, 32), model_id="tiny"
    )
    ids = torch.tensor([[5, 6, 7]])
    plain = hooked.hf(ids).logits
    with hooked.steer(pv.Add(push, coeff=4.0)):
        assert scores_of(judge) == alone
        steered = hooked.hf(ids).logits
    assert not torch.allclose(plain, steered)


def test_equal_calls_give_equal_scores_and_leave_no_trace() -> None:
    tokenizer = splitting()
    model = subject(tokenizer)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    judge = LocalJudge(model, tokenizer, traits=[trait()])
    assert scores_of(judge) == scores_of(judge)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.is_grad_enabled()


def refusal(call: Callable[[], object], error: type[PvcoreError] = JudgeFailure) -> str:
    with pytest.raises(error) as caught:
        call()
    assert type(caught.value) is error
    return str(caught.value)


def test_what_cannot_judge_is_refused() -> None:
    tokenizer = splitting()
    model = subject(tokenizer)
    assert refusal(lambda: LocalJudge(model)) == (
        "got no tokenizer for Qwen2ForCausalLM; wanted the one that belongs to the model. Give "
        "LocalJudge(model, tokenizer)"
    )
    assert refusal(lambda: LocalJudge(model, tokenizer, batch_size=0)) == (
        "got batch_size=0; wanted at least 1"
    )
    judge = LocalJudge(model, tokenizer, traits=[trait()])
    assert "got trait 'greed'" in refusal(lambda: judge.trait("greed", "why", "so"), TraitError)
    assert refusal(lambda: judge.trait("bluntness", "why", "so " * 600)).startswith(
        "the judge cannot read its prompt: got a chat longer than the model allows"
    )
    model.train()
    assert "in training mode" in refusal(lambda: judge.trait("bluntness", "why", "so"))
    model.eval()
    tokenizer.chat_template = "{{ messages[0]['content'] }} {{ messages[-1]['content'] }}"
    with pytest.raises(PvcoreError):
        LocalJudge(model, tokenizer)
