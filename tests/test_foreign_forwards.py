"""Forwards that pvcore does not start: plain calls, transformers' own generate, hand-made loops."""

import contextvars

import pytest
import torch
import transformers

import pvcore as pv
from pvcore.errors import HookError, PlanError, SpanError
from tests.subjects import prompts, subject
from tests.test_plan import vector

GREEDY = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
SPANS = ["all", "prompt", "response", "last_prompt_token", None]
MODES = [{}, {"use_cache": False}, {"cache_implementation": "static"}]


@pytest.mark.parametrize("family", ["qwen2", "gpt2", "gemma2"])
@pytest.mark.parametrize("span", SPANS)
def test_raw_generate_steers_as_generate_does(family, span):
    model = subject(family).model
    rows = prompts([6, 4])
    ids = torch.zeros(2, 6, dtype=torch.long)
    mask = torch.zeros(2, 6, dtype=torch.long)
    for k, row in enumerate(rows):
        ids[k, 6 - len(row) :], mask[k, 6 - len(row) :] = row, 1
    base = model.generate_ids(rows, max_new_tokens=5, do_sample=False)
    for mode in MODES:
        with model.steer(pv.Add(vector(model_id=""), coeff=[4.0, -4.0], layers=[1], span=span)):
            wanted = model.generate_ids(rows, max_new_tokens=5, do_sample=False, **mode)
            raw = model.hf.generate(ids, attention_mask=mask, **GREEDY, **mode)[:, 6:]
        assert all(torch.equal(a, b) for a, b in zip(raw, wanted, strict=True)), mode
        assert not all(torch.equal(a, b) for a, b in zip(base, wanted, strict=True)), mode


def test_a_chunk_after_the_first_has_no_known_prompt():
    model = subject("qwen2").model
    (ids,) = prompts([6])
    with (
        pytest.raises(SpanError, match="does not say where its prompts end"),
        model.steer(pv.Add(vector(), coeff=1.0, layers=[1])),
    ):
        model.hf.generate(ids[None], prefill_chunk_size=5, **GREEDY)
    with model.steer(pv.Add(vector(), coeff=4.0, layers=[1], span="all")):
        chunked = model.hf.generate(ids[None], prefill_chunk_size=5, **GREEDY)
        whole = model.hf.generate(ids[None], **GREEDY)
    assert torch.equal(chunked, whole)


def test_plain_forward_is_steered_everywhere_by_default():
    model = subject("qwen2").model
    (ids,) = prompts([6])
    by_span = {}
    for span in SPANS:
        with model.steer(pv.Add(vector(), coeff=2.0, layers=[1], span=span)):
            by_span[span] = model.hf(ids[None]).logits
    base = model.hf(ids[None]).logits
    assert torch.equal(by_span[None], by_span["all"])
    assert torch.equal(by_span["all"], by_span["prompt"])
    assert torch.equal(by_span["response"], by_span["last_prompt_token"])
    assert torch.equal(by_span["response"][:, :-1], base[:, :-1])
    assert not torch.equal(by_span["response"][:, -1], base[:, -1])


def test_training_does_not_guess_where_prompts_end():
    model = subject("qwen2").model
    (ids,) = prompts([6])
    model.hf.train()
    try:
        with (
            pytest.raises(SpanError, match="use span='all'"),
            model.steer(pv.Add(vector(), coeff=1.0, layers=[1], span="response")),
        ):
            model.hf(ids[None])
        with model.steer(pv.Add(vector(), coeff=1.0, layers=[1])):
            model.hf(ids[None])
    finally:
        model.hf.eval()


def test_a_loop_written_by_hand_keeps_its_cache():
    model = subject("qwen2").model
    (ids,) = prompts([6])
    with torch.no_grad(), model.steer(pv.Add(vector(), coeff=3.0, layers=[1], span="all")):
        first = model.hf(ids[None, :5], use_cache=True)
        second = model.hf(ids[None, 5:], past_key_values=first.past_key_values)
        whole = model.hf(ids[None]).logits
    assert torch.allclose(second.logits[:, -1], whole[:, -1], atol=1e-5)


def test_monitoring_a_foreign_generation_is_refused():
    model = subject("qwen2").model
    (ids,) = prompts([6])
    with (
        pytest.raises(HookError, match="monitor it with model"),
        model.monitor(pv.VectorBank([vector()])),
    ):
        model.hf.generate(ids[None], **GREEDY)


def test_rows_that_do_not_match_are_refused_before_anything_moves():
    model = subject("qwen2").model
    rows = prompts([6, 4, 3])
    with (
        pytest.raises(PlanError, match="got 2 per-row coefficients for a batch of 3"),
        model.steer(pv.Add(vector(), coeff=[1.0, 2.0], layers=[1])),
    ):
        model.generate_ids(rows, max_new_tokens=2)


def test_assisted_decoding_is_refused_while_armed():
    model = subject("qwen2").model
    rows = prompts([6])
    with (
        pytest.raises(PlanError, match="prompt_lookup_num_tokens while a plan is armed"),
        model.steer(pv.Add(vector(), coeff=1.0, layers=[1])),
    ):
        model.generate_ids(rows, max_new_tokens=2, prompt_lookup_num_tokens=2)


def test_drafted_tokens_of_somebody_elses_generation_are_refused_while_armed():
    model = subject("qwen2").model
    (ids,) = prompts([4])
    row = ids.repeat(4)[None]
    drafted = {**GREEDY, "prompt_lookup_num_tokens": 3}
    plain = model.hf.generate(row, **GREEDY)
    assert torch.equal(model.hf.generate(row, **drafted), plain)
    for before in (lambda: None, lambda: model.hf.generate(ids[None], **GREEDY)):
        with model.steer(pv.Add(vector(), coeff=4.0, layers=[1])):
            before()
            with pytest.raises(HookError, match="drafted tokens"):
                contextvars.copy_context().run(model.hf.generate, row, **drafted)
            steered = model.hf.generate(row, **GREEDY)
        assert not torch.equal(steered, plain)


def test_a_generation_on_a_cache_of_ones_own_knows_none_of_an_earlier_prompt():
    model = subject("qwen2").model
    first, second = prompts([6, 9])
    add = pv.Add(vector(), coeff=4.0, layers=[1], span="all")

    def on_a_cache():
        cache = transformers.DynamicCache(config=model.hf.config)
        with torch.no_grad():
            model.hf(second[None, :5], past_key_values=cache)
        return model.hf.generate(second[None], past_key_values=cache, **GREEDY)

    with model.steer(add):
        wanted = contextvars.copy_context().run(on_a_cache)
        model.hf.generate(first[None], **GREEDY)
        got = on_a_cache()
        whole = model.hf.generate(second[None], **GREEDY)
    assert torch.equal(got, wanted)
    assert torch.equal(got, whole)
    assert not torch.equal(got, on_a_cache())


def test_drafted_tokens_with_nothing_armed_are_all_returned():
    model = subject("qwen2").model
    (ids,) = prompts([4])
    row = ids.repeat(4)
    drafted = {"max_new_tokens": 24, "do_sample": False, "prompt_lookup_num_tokens": 4}
    wanted = model.hf.generate(row[None], pad_token_id=0, **drafted)[0, len(row) :]
    never = [lambda ids, _scores, **_: torch.zeros(len(ids), dtype=torch.bool)]
    for stops in ({"stopping_criteria": never}, {"stop_strings": ["@@@@"]}):
        (got,) = model.generate_ids([row], **drafted, **stops)
        assert torch.equal(got, wanted[: len(got)])
        assert len(got) == len(model.generate_ids([row], **drafted)[0]) > 4
    with pytest.raises(PlanError, match="prompt_lookup_num_tokens while a plan is armed, in a str"):
        next(model.stream([row], **drafted))
