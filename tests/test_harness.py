"""Requests of lm-eval are answered as raw hooks say, whatever their batch, padding and span."""

import importlib.util
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import pvcore as pv
from pvcore.errors import SpanError
from tests.families import MAX_POSITIONS, build, tokenizer
from tests.harness_tasks import (
    COEFF,
    LAYER,
    PAIRS,
    add,
    adding,
    covers,
    encode,
    log_probability,
    model,
)

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="another version set: make test-eval"
)
SPANS = ["all", "prompt", "response", "last_prompt_token", None]


def lm(hooked: pv.HookedModel, *interventions: Any, batch_size: int = 3) -> Any:
    from pvcore.harness import SteeredLM

    return SteeredLM(hooked, interventions, batch_size=batch_size, max_length=None)


def requests(*arguments: tuple[Any, ...]) -> list[Any]:
    return [SimpleNamespace(args=given, task_name="task") for given in arguments]


@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
@pytest.mark.parametrize("span", SPANS)
def test_continuations_are_scored_under_the_plan_as_by_raw_hooks(
    family: str, span: str | None
) -> None:
    hooked = model(family)
    # An intervention that names no span acts on the reply when its plan is evaluated.
    spans = span or "response"
    got = lm(hooked, add(spans)).loglikelihood(requests(*PAIRS), disable_tqdm=True)
    plain = lm(hooked).loglikelihood(requests(*PAIRS), disable_tqdm=True)
    hf = build(family)
    for (context, continuation), (score, _), (unsteered, _) in zip(PAIRS, got, plain, strict=True):
        prompt, ids = encode(context), encode(continuation)
        assert unsteered == pytest.approx(log_probability(hf, prompt, ids), abs=1e-4)
        with adding(hf, family, covers(span, len(prompt))):
            assert score == pytest.approx(log_probability(hf, prompt, ids), abs=1e-4)
        assert abs(score - unsteered) > 1e-2


def test_a_greedy_continuation_is_known_as_one() -> None:
    hooked = model()
    with hooked.steer(add("response")):
        (reply,) = hooked.generate_ids(
            [torch.tensor(encode("Is it red?"))], max_new_tokens=4, do_sample=False
        )
    text = tokenizer().decode(reply)
    assert encode(text) == reply.tolist()
    asked = requests(("Is it red?", text), ("Is it red?", " Yes."))
    steered = lm(hooked, add("response")).loglikelihood(asked, disable_tqdm=True)
    plain = lm(hooked).loglikelihood(asked, disable_tqdm=True)
    assert [greedy for _, greedy in steered] == [True, False]
    assert [greedy for _, greedy in plain] == [False, False]


def test_a_context_that_is_empty_or_too_long() -> None:
    hooked, hf = model(), build("qwen2")
    long = ("So it went on, and on. " * 8).strip()  # the harness scores a space with what follows
    asked = requests(("", "Yes."), (long, " Yes."))
    (bare, _), (cut, _) = lm(hooked, add("response")).loglikelihood(asked, disable_tqdm=True)
    begin = [tokenizer().bos_token_id]
    with adding(hf, "qwen2", covers("response", 1)):
        assert bare == pytest.approx(log_probability(hf, begin, encode("Yes.")), abs=1e-4)
    n_cut = len(encode(" Yes."))
    with adding(hf, "qwen2", covers("response", MAX_POSITIONS - n_cut + 1)):
        wanted = log_probability(hf, encode(long), encode(" Yes."))
    assert len(encode(long)) > MAX_POSITIONS
    assert cut == pytest.approx(wanted, abs=1e-4)
    endless = requests(("Go", " on" * MAX_POSITIONS))
    with pytest.raises(SpanError, match="takes 128 at a time"):
        lm(hooked).loglikelihood(endless, disable_tqdm=True)


@pytest.mark.parametrize("span", ["all", "response"])
def test_whole_texts_are_reply_from_their_first_token(span: str) -> None:
    hooked, hf = model(), build("qwen2")
    text = "It was red, and then it was blue. " * 6
    asked = requests(("It was red.",), (text,))
    short, long = lm(hooked, add(span)).loglikelihood_rolling(asked, disable_tqdm=True)
    plain = lm(hooked).loglikelihood_rolling(asked, disable_tqdm=True)
    begin, ids = [tokenizer().bos_token_id], encode(text)
    assert MAX_POSITIONS < len(ids) < 2 * MAX_POSITIONS
    with adding(hf, "qwen2", covers("all", 0)):
        assert short == pytest.approx(log_probability(hf, begin, encode("It was red.")), abs=1e-3)
        # The first window is full; the second is as long, and scores only what is left.
        left = ids[MAX_POSITIONS:]
        before = ids[:MAX_POSITIONS][len(left) - 1 - MAX_POSITIONS :]
        wanted = log_probability(hf, begin, ids[:MAX_POSITIONS]) + log_probability(hf, before, left)
    assert long == pytest.approx(wanted, abs=1e-3)
    assert min(abs(short - plain[0]), abs(long - plain[1])) > 0.1


@pytest.mark.parametrize("span", ["prompt", "last_prompt_token"])
def test_whole_texts_have_no_prompt(span: Any) -> None:
    with pytest.raises(SpanError, match=f"got span '{span}' for a task that scores whole texts"):
        lm(model(), add(span)).loglikelihood_rolling(requests(("It was.",)), disable_tqdm=True)


@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
@pytest.mark.parametrize("span", ["all", "prompt", "response", "last_prompt_token"])
def test_replies_are_generated_under_the_plan_as_by_raw_hooks(family: str, span: str) -> None:
    hooked, hf = model(family), build(family)
    contexts = ["Is it red?", "Why", "What is the very best of colours?"]
    settings = {"until": [";;"], "max_gen_toks": 6, "do_sample": False}
    asked = requests(*((context, dict(settings)) for context in contexts))
    got = lm(hooked, add(span)).generate_until(asked, disable_tqdm=True)
    plain = lm(hooked).generate_until(asked, disable_tqdm=True)
    for context, reply in zip(contexts, got, strict=True):
        ids = encode(context)
        for _ in range(6):
            if ids[-1] == tokenizer().eos_token_id:
                break
            with adding(hf, family, covers(span, len(encode(context)))), torch.no_grad():
                ids.append(int(hf(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        wanted = tokenizer().decode(ids[len(encode(context)) :], skip_special_tokens=True)
        assert reply == wanted
    assert got != plain


def test_each_reply_ends_at_its_own_stop_string() -> None:
    hooked = model()
    contexts = ["Is it red?", "Why", "And so"]
    settings = {"max_gen_toks": 24, "do_sample": False}
    free = lm(hooked, add("all")).generate_until(
        requests(*((context, {**settings, "until": [";;"]}) for context in contexts)),
        disable_tqdm=True,
    )
    stop = free[1][3]
    seen = []
    handle = hooked.hf.register_forward_hook(lambda *_: seen.append(1))
    cut = lm(hooked, add("all")).generate_until(
        requests(*((context, {**settings, "until": [stop]}) for context in contexts)),
        disable_tqdm=True,
    )
    handle.remove()
    assert cut == [text.split(stop)[0] for text in free]
    assert len(cut[1]) <= 3
    # Alone, the reply that stops needs no more steps than it has tokens.
    seen.clear()
    handle = hooked.hf.register_forward_hook(lambda *_: seen.append(1))
    lm(hooked, add("all")).generate_until(
        requests((contexts[1], {**settings, "until": [stop]})), disable_tqdm=True
    )
    handle.remove()
    assert len(seen) <= 4


def test_ablation_and_caps_act_in_the_harness_too() -> None:
    hooked, hf = model(), build("qwen2")
    evil = add("all").vectors[0]
    unit = evil.unit().direction(pv.resid_post(LAYER))
    context, continuation = PAIRS[0]
    got = {
        name: lm(hooked, one).loglikelihood(requests(PAIRS[0]), disable_tqdm=True)[0][0]
        for name, one in {
            "ablated": pv.Ablate(evil, span="all"),
            "capped": pv.Cap(evil, max=-1.0, span="all"),
            "added": add("all", -COEFF),
        }.items()
    }
    for name, moved in {
        "ablated": torch.zeros_like,
        "capped": lambda s: s.clamp(max=-1.0),
    }.items():
        handle = hf.model.layers[LAYER].register_forward_hook(
            lambda _m, _a, h, moved=moved: h + (moved(h @ unit) - h @ unit)[..., None] * unit
        )
        wanted = log_probability(hf, encode(context), encode(continuation))
        handle.remove()
        assert got[name] == pytest.approx(wanted, abs=1e-4)
    assert len({round(score, 3) for score in got.values()}) == 3
