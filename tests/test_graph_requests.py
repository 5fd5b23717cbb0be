"""The graph engine under everything a request can ask for, and what it refuses."""

import gc
import threading
import weakref
from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import Any

import jaxtyping
import pytest
import torch
import transformers
from torch import Tensor

import pvcore as pv
from pvcore import graph as graph_module
from pvcore import graph_checks, resident
from pvcore.errors import ChatError, HookError, ModelError, PlanError
from tests.families import END, FAMILIES, PAD, build
from tests.oracle import Oracle
from tests.subjects import Subject, fresh, prompts, subject, trio, worst
from tests.test_graph import (
    BANK,
    EVIL,
    GRAPH,
    GREEDY,
    KINDS,
    PROMPTS,
    SYCOPHANCY,
    Counting,
    answer,
    check,
    same_ids,
)

BOTH = KINDS["both"](1.0)


@pytest.fixture(scope="module")
def found() -> Subject:
    return fresh("qwen2")


def both(found: Subject, plan: pv.Plan | None = BOTH, **settings: Any) -> list[Tensor]:
    """Check that both engines agree, and return the tokens."""
    wanted = answer(found, plan, "eager", **settings)
    check(answer(found, plan, GRAPH, **settings), wanted)
    return wanted[0]


def test_rows_end_on_their_own(found: Subject) -> None:
    free = both(found)
    end = int(free[0][4])
    ended = both(found, eos_token_id=end, pad_token_id=PAD)
    assert len({len(ids) for ids in ended}) > 1
    with found.model.arm(BOTH) as seen:
        found.model.generate_ids(
            PROMPTS, engine=GRAPH, eos_token_id=end, pad_token_id=PAD, **GREEDY
        )
    over = seen["evil"].steps.isnan().all(1)
    assert [int(n) for n in (~over).sum(0)] == [len(ids) for ids in ended]


def test_stop_strings_end_a_row(found: Subject) -> None:
    text = found.model.tokenizer.decode(both(found)[0])
    stopped = both(found, stop_strings=[text[4:6]])
    assert len(stopped[0]) <= 6 < len(both(found)[0])


def test_a_generation_config_of_ones_own_counts(found: Subject) -> None:
    config = type(found.model.hf.generation_config)(
        max_new_tokens=7,
        do_sample=False,
        repetition_penalty=5.0,
        eos_token_id=END,
        pad_token_id=PAD,
    )
    wanted = answer(found, BOTH, "eager", generation_config=config, max_new_tokens=7)
    got = answer(found, BOTH, GRAPH, generation_config=config, max_new_tokens=7)
    check(got, wanted)
    assert not same_ids(wanted[0], answer(found, BOTH, "eager", max_new_tokens=7)[0])


def test_sampling_draws_the_same(found: Subject) -> None:
    def sampled(engine: Any, seed: int) -> Any:
        torch.manual_seed(seed)
        settings = {"do_sample": True, "temperature": 1.5, "num_return_sequences": 2}
        return answer(found, KINDS["monitor"](1.0), engine, **settings)

    wanted = sampled("eager", 0)
    check(sampled(GRAPH, 0), wanted)
    assert len(wanted[0]) == 6
    assert not same_ids(wanted[0][::2], wanted[0][1::2])
    assert not same_ids(wanted[0], sampled("eager", 1)[0])


@pytest.mark.parametrize("settings", [{"max_new_tokens": 1}, {"prefill_chunk_size": 4}])
def test_short_and_chunked(found: Subject, settings: dict[str, int]) -> None:
    both(found, **settings)


def test_a_model_may_ask_for_a_static_cache_by_any_name() -> None:
    found, wanted = fresh("gemma2"), answer(subject("gemma2"), BOTH, "eager")
    found.model.hf.generation_config.cache_implementation = "hybrid"
    check(answer(found, BOTH, GRAPH), wanted)


def test_a_float64_model_keeps_its_precision() -> None:
    hf = build("gpt2", dtype=torch.float64)
    found = Subject(name="gpt2", model=pv.HookedModel(hf), oracle=Oracle(hf, FAMILIES["gpt2"]))
    wanted, got = (answer(found, BOTH, engine) for engine in ("eager", GRAPH))
    check(got, wanted)
    assert got[1]["evil"].steps.dtype == torch.float64
    assert worst(got[1]["evil"].steps, wanted[1]["evil"].steps) < 1e-12


def test_texts_are_the_same(found: Subject) -> None:
    chats = ["Is it 3?", "well"]
    with found.model.arm(KINDS["add"](1.0)):
        texts = found.model.generate(chats, **GREEDY)
        assert found.model.generate(chats, engine=GRAPH, **GREEDY) == texts


def test_inference_mode_and_its_absence_do_not_mix(found: Subject) -> None:
    wanted = both(found)
    with torch.inference_mode():
        assert same_ids(answer(found, BOTH, GRAPH)[0], wanted)
    assert same_ids(answer(found, BOTH, GRAPH)[0], wanted)


def test_plans_nest_around_a_graph(found: Subject) -> None:
    outer, inner = pv.Plan(pv.Add(EVIL, coeff=1.0)), pv.Plan(pv.Cap(SYCOPHANCY, max=0.1))
    with found.model.arm(outer):
        inside = both(found, inner)
        left = found.model.generate_ids(PROMPTS, engine=GRAPH, **GREEDY)
    alone = [both(found, plan) for plan in (outer, inner)]
    assert same_ids(left, alone[0])
    assert not same_ids(inside, alone[0])
    assert not same_ids(inside, alone[1])


def test_every_kind_of_site(found: Subject) -> None:
    sites = [pv.resid_pre(0), pv.resid_mid(1), pv.resid_post(1), pv.resid_pre(2)]
    one, two, three = trio(*sites)
    plan = pv.Plan(
        pv.Add(one, coeff=0.7), pv.Cap([two, three], max=0.1), monitor=pv.VectorBank([one, two])
    )
    assert not same_ids(both(found, plan), both(found, None))


def test_a_ring_that_wraps_loses_no_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resident, "RING_STEPS", 4)
    found = fresh("qwen2")
    for tokens in (2, 5, 6, 14):
        both(found, KINDS["monitor"](1.0), max_new_tokens=tokens)


def test_numbers_of_one_structure_share_one_graph() -> None:
    found, counting = fresh("qwen2"), Counting()
    engine = pv.Graph(backend=counting)
    tokens = []
    for turn in range(6):
        one, two, three = (trio(*EVIL.sites)[(turn + k) % 3] for k in range(3))
        bank = pv.VectorBank([one.rename("a"), two.rename("b")])
        coeff = [0.5 * turn, 1.0, -1.0] if turn % 2 else 0.25 * turn
        plan = pv.Plan(
            pv.Add(one, coeff=coeff), pv.Cap(two, max=0.1 * turn), pv.Ablate(three), monitor=bank
        )
        wanted = answer(found, plan, "eager")
        check(answer(found, plan, engine), wanted)
        tokens.append(wanted[0])
    assert counting.graphs == 1
    assert not any(same_ids(tokens[a], tokens[b]) for a in range(6) for b in range(a))
    longer = prompts([4, 19, 6])
    found.model.generate_ids(longer, engine=engine, **GREEDY)
    found.model.generate_ids(longer[::-1], engine=engine, **{**GREEDY, "max_new_tokens": 20})
    assert counting.graphs == 2


def test_more_structures_than_are_kept_stay_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph_module, "MAX_STRUCTURES", 2)
    found, counting = fresh("qwen2"), Counting()
    engine = pv.Graph(backend=counting)
    plans = [None, KINDS["add"](1.0), KINDS["cap"](1.0)]
    wanted = [answer(found, plan, "eager")[0] for plan in plans]
    for turn in (0, 1, 2, 0, 0, 2):
        assert same_ids(answer(found, plans[turn], engine)[0], wanted[turn])
    assert counting.graphs == 4


def test_batches_in_turn_compile_once_each(monkeypatch: pytest.MonkeyPatch) -> None:
    found, counting = fresh("qwen2"), Counting()
    model, engine = found.model, pv.Graph(backend=counting)
    with model.steer(pv.Add(EVIL, coeff=1.0)):
        for size in (3, 2, 3, 2, 3):
            wanted = model.generate_ids(PROMPTS[:size], **GREEDY)
            assert same_ids(model.generate_ids(PROMPTS[:size], engine=engine, **GREEDY), wanted)
        assert counting.graphs == 2
        monkeypatch.setattr(graph_module, "MAX_CACHES", 4)
        for size in (2, 3):
            model.generate_ids(PROMPTS[:size], engine=engine, **GREEDY)
    assert counting.graphs == 3


def test_a_stream_gives_the_same_steps(found: Subject) -> None:
    chats, alarms = ["Is it 3?", "well"], {"evil": 0.0}

    def streamed(engine: Any) -> list[pv.Step]:
        with found.model.steer(pv.Add(EVIL, coeff=1.0)):
            return list(found.model.stream(chats, BANK, alarms=alarms, engine=engine, **GREEDY))

    wanted, got = streamed("eager"), streamed(GRAPH)
    assert [step.text for step in got] == [step.text for step in wanted]
    rung = [
        [[(a.trait, a.site, a.chat, a.step) for a in step.alarms] for step in steps]
        for steps in (wanted, got)
    ]
    assert rung[0] == rung[1]
    assert sum(map(len, rung[0])) > 0
    for ours, theirs in zip(got, wanted, strict=True):
        for trait, scores in theirs.projections.items():
            assert worst(ours.projections[trait], scores) <= 1e-5 * float(scores.abs().max())


class Boom(Exception):
    """What a user's own code raises."""


def exploding(after: int) -> Callable[..., Tensor]:
    calls = []

    def process(_ids: Tensor, scores: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) > after:
            raise Boom
        return scores

    return process


@pytest.mark.parametrize("after", [0, 1, 4])
def test_a_failure_on_the_way_leaves_nothing_behind(after: int) -> None:
    found = subject("llama")
    base = answer(found, None, "eager")[0]
    before = {name: id(value) for name, value in vars(found.model.hf).items()}
    with pytest.raises(Boom), found.model.arm(BOTH) as seen:
        found.model.generate_ids(
            PROMPTS, engine=GRAPH, logits_processor=[exploding(after)], **GREEDY
        )
    with pytest.raises(HookError, match="no forward"):
        _ = seen["evil"]
    assert {name: id(value) for name, value in vars(found.model.hf).items()} == before
    assert found.model._taps.resident is None
    assert same_ids(answer(found, None, "eager")[0], base)
    assert same_ids(answer(found, None, GRAPH)[0], base)
    both(found)


def test_threads_take_turns_and_get_their_own(found: Subject) -> None:
    plans = [pv.Plan(pv.Add(EVIL, coeff=float(k)), monitor=BANK) for k in range(-2, 3)]
    wanted = [answer(found, plan, "eager") for plan in plans]
    wrong: list[str] = []

    def serve(index: int) -> None:
        for engine in (GRAPH, "eager", GRAPH):
            got = answer(found, plans[index], engine)
            try:
                check(got, wanted[index])
            except AssertionError as error:
                wrong.append(f"{index} {engine}: {error}")

    threads = [threading.Thread(target=serve, args=(index,)) for index in range(len(plans))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert not any(same_ids(wanted[a][0], wanted[b][0]) for a in range(5) for b in range(a))


def test_an_open_stream_keeps_its_turn(found: Subject) -> None:
    steps = found.model.stream(["well"], BANK, engine=GRAPH, **GREEDY)
    first = next(steps)
    with pytest.raises(HookError, match="a stream with engine='graph' is open"):
        found.model.generate(["well"], engine=GRAPH, **GREEDY)
    whole = found.model.generate(["well"], **GREEDY)[0]
    assert first.text[0] + "".join(step.text[0] for step in steps) == whole
    assert found.model.generate(["well"], engine=GRAPH, **GREEDY) == [whole]


def test_leaving_a_stream_gives_the_turn_back(found: Subject) -> None:
    for _ in found.model.stream(["well"], BANK, engine=GRAPH, **GREEDY):
        break
    assert found.model.generate(["well"], engine=GRAPH, **GREEDY)


def test_a_generation_inside_itself_is_refused(found: Subject) -> None:
    def again(_ids: Tensor, scores: Tensor) -> Tensor:
        found.model.generate_ids(PROMPTS, engine=GRAPH, **GREEDY)
        return scores

    with pytest.raises(HookError, match="a generation with engine='graph' is open"):
        found.model.generate_ids(PROMPTS, engine=GRAPH, logits_processor=[again], **GREEDY)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"num_beams": 2}, "got beams"),
        ({"use_cache": False}, "got use_cache=False"),
        ({"cache_implementation": "dynamic"}, "got cache_implementation"),
        ({"disable_compile": True}, "got disable_compile"),
        ({"past_key_values": transformers.DynamicCache()}, "got past_key_values"),
        ({"prompt_lookup_num_tokens": 2}, "got prompt_lookup_num_tokens"),
        ({"engine": "fast"}, "got engine 'fast'; wanted 'eager', 'graph' or a pv.Graph"),
    ],
)
def test_what_cannot_be_right_is_refused(
    found: Subject, settings: dict[str, Any], text: str
) -> None:
    with pytest.raises(PlanError, match=text):
        found.model.generate_ids(PROMPTS, **{"engine": GRAPH, **GREEDY, **settings})
    assert found.model._taps.resident is None


def test_rows_are_counted_before_anything_runs(found: Subject) -> None:
    with pytest.raises(PlanError, match="2 per-row"), found.model.steer(pv.Add(EVIL, coeff=[1, 2])):
        found.model.generate_ids(PROMPTS, engine=GRAPH, **GREEDY)
    both(found)


def test_a_break_in_the_graph_is_an_error_that_names_the_way_out() -> None:
    found = fresh("qwen2")
    block = found.model.hf.model.layers[1]
    handle = block.register_forward_hook(lambda *_: torch._dynamo.graph_break())
    with pytest.raises(ModelError, match="engine='eager'"):
        answer(found, BOTH, GRAPH)
    handle.remove()
    both(found)


def test_a_step_that_skips_a_block_is_an_error() -> None:
    found = fresh("qwen2")
    plan = pv.Plan(pv.Add(EVIL, coeff=1.0))
    both(found, plan)
    whole = found.model.hf.model.forward

    def skips(*args: Any, **kwargs: Any) -> Any:
        ids = kwargs.get("input_ids")
        found.model.hf.config.num_hidden_layers = 2 if ids is not None and ids.shape[1] == 1 else 3
        return whole(*args, **kwargs)

    found.model.hf.model.forward = skips
    with pytest.raises(HookError, match=r"resid_pre.2: 0"):
        answer(found, plan, GRAPH)


def test_a_model_that_compiles_itself_is_right() -> None:
    found = fresh("qwen2")
    wanted = answer(found, BOTH, "eager")
    found.model.hf.compile(backend="eager")
    check(answer(found, BOTH, GRAPH), wanted)
    check(answer(found, BOTH, "eager"), wanted)


def test_a_users_own_compiled_forward_keeps_its_taps() -> None:
    found, ids = fresh("qwen2"), PROMPTS[1][None]
    plan = pv.Plan(pv.Add(EVIL, coeff=1.0))

    def logits(forward: Any) -> Tensor:
        with torch.no_grad(), found.model.arm(plan):
            return forward(ids).logits

    wanted = logits(found.model.hf)
    compiled = torch.compile(found.model.hf, backend="eager")
    for _ in range(2):
        assert worst(logits(compiled), wanted) <= 1e-5
        both(found, plan)
    with torch.no_grad():
        assert worst(compiled(ids).logits, found.model.hf(ids).logits) <= 1e-5
        assert worst(compiled(ids).logits, wanted) > 1e-2


def test_a_trace_in_between_leaves_the_graph_alone() -> None:
    found, counting = fresh("qwen2"), Counting()
    plan, engine = pv.Plan(pv.Add(EVIL, coeff=1.0), monitor=BANK), pv.Graph(backend=counting)
    wanted = answer(found, plan, "eager")
    for _ in range(2):
        check(answer(found, plan, engine), wanted)
        with found.model.trace(PROMPTS[0][None]):
            h = found.model.resid_post[1].save()
        assert h.shape == (1, 4, 64)
    assert counting.graphs == 1


def test_a_model_without_transformers_loop_is_refused(
    monkeypatch: pytest.MonkeyPatch, found: Subject
) -> None:
    monkeypatch.setattr(graph_checks, "_LOOP", ("generate", "decode_in_another_way"))
    with pytest.raises(ModelError, match=r"without decode_in_another_way; .* engine='eager'"):
        answer(found, BOTH, GRAPH)


def test_text_needs_a_tokenizer_here_too() -> None:
    bare = pv.HookedModel(build("qwen2"), model_id="tiny/qwen2")
    with pytest.raises(ChatError):
        bare.generate(PROMPTS, engine=GRAPH)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"backend": "fastest"}, "got backend 'fastest'"),
        ({"mode": "fast"}, "got mode 'fast'; wanted one of default"),
        ({"mode": "default"}, "got mode 'default' for a backend without modes"),
        ({"backend": "aot_eager", "mode": "max-autotune"}, "without modes"),
    ],
)
def test_settings_that_no_compiler_takes_are_refused(
    monkeypatch: pytest.MonkeyPatch, found: Subject, settings: dict[str, Any], text: str
) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(PlanError, match=text):
        found.model.generate_ids(PROMPTS, engine=pv.Graph(**settings), **GREEDY)


def test_steps_that_go_another_way_are_an_error() -> None:
    class Stubborn(transformers.Qwen2ForCausalLM):
        """Decodes through its own forward, whatever step it was given."""

        def _sample(self, *args: Any, **settings: Any) -> Any:
            self.__dict__["get_compiled_call"] = lambda _config: self.__call__
            return super()._sample(*args, **settings)

    found = fresh("qwen2")
    found.model.hf.__class__ = Stubborn
    with pytest.raises(HookError, match="got 10 tokens from 0 compiled decode steps"):
        answer(found, BOTH, GRAPH)


def test_steps_that_the_device_did_not_run_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    found = fresh("qwen2")
    add = pv.Plan(pv.Add(EVIL, coeff=1.0))
    both(found, add)
    step = next(iter(found.model._graphs._steps.values()))
    compiled, calls = step._call, []

    def skips(**inputs: Any) -> Any:
        calls.append(1)
        step.resident.step.sub_(int(len(calls) == 3))
        return compiled(**inputs)

    monkeypatch.setattr(step, "_call", skips)
    with pytest.raises(HookError, match="got 8 compiled decode steps on the device; launched 9"):
        answer(found, add, GRAPH)


@pytest.mark.parametrize("change", ["off", "on"])
def test_a_plan_that_comes_or_goes_midway_is_an_error(found: Subject, change: str) -> None:
    add = pv.Add(EVIL, coeff=3.0)

    def generate(engine: Any) -> list[Tensor]:
        stack, calls = ExitStack(), []

        def switch(ids: Tensor, _scores: Any, **_: Any) -> Tensor:
            calls.append(1)
            if len(calls) == 4:
                stack.close() if change == "off" else stack.enter_context(found.model.steer(add))
            return torch.zeros(len(ids), dtype=torch.bool)

        if change == "off":
            stack.enter_context(found.model.steer(add))
        try:
            return found.model.generate_ids(
                PROMPTS, engine=engine, stopping_criteria=[switch], **GREEDY
            )
        finally:
            with suppress(HookError):
                stack.close()

    with pytest.raises(HookError, match="in the middle of a compiled generation"):
        generate(GRAPH)
    if change == "on":
        with pytest.raises(HookError, match="armed in the middle of a generation"):
            generate("eager")
    else:
        eager = generate("eager")
        assert not same_ids(eager, answer(found, pv.Plan(add), "eager")[0])
        assert not same_ids(eager, answer(found, None, "eager")[0])
    both(found)


def test_steps_that_are_kept_keep_no_cache() -> None:
    found, caches = fresh("qwen2"), []
    engine_of = graph_module.GraphEngine.empty_cache

    def noting(self: Any, *sizes: int) -> Any:
        caches.append(weakref.ref(cache := engine_of(self, *sizes)))
        return cache

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graph_module.GraphEngine, "empty_cache", noting)
        for batch in (1, 2, 3):
            found.model.generate_ids(PROMPTS[:1] * batch, engine=GRAPH, **GREEDY)
    gc.collect()
    assert [cache() is None for cache in caches] == [True, True, False]


def test_settings_of_many_kinds_are_read_alike(found: Subject) -> None:
    ends = both(found, None)[0][2:4].tolist()
    wanted = answer(found, None, "eager", eos_token_id=ends)[0]
    assert same_ids(answer(found, None, "eager", eos_token_id=torch.tensor(ends))[0], wanted)
    assert len(wanted[0]) == 3

    class Unhashable(Counting):
        __hash__ = None  # type: ignore[assignment]

    with pytest.raises(PlanError, match="has no hash"):
        pv.Graph(backend=Unhashable())
    mute = pv.HookedModel(found.model.hf, model_id="")
    with pytest.raises(PlanError, match="got stop_strings and a model without a tokenizer"):
        mute.generate_ids(PROMPTS, stop_strings=["x"], **GREEDY)
