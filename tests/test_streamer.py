"""A streamer for transformers' generate: the text and projections of pvcore's own stream."""

import threading
from typing import Any

import pytest
import torch
import transformers

import pvcore as pv
from pvcore.errors import ChatError, HookError, PlanError
from tests.families import build
from tests.subjects import fresh, prompts, subject, worst
from tests.test_stream import BANK, GREEDY

CHAT = "Is it 3?"


def inputs(model: pv.HookedModel) -> torch.Tensor:
    return torch.tensor(model.tokenizer(CHAT)["input_ids"])[None]


def same(got: list[pv.Step], wanted: list[pv.Step]) -> None:
    assert [step.text for step in got] == [step.text for step in wanted]
    assert len(got) >= 2
    for one, other in zip(got, wanted, strict=True):
        assert torch.equal(one.token_ids, other.token_ids)
        for trait in BANK.traits:
            scale = max(1.0, float(other.projections[trait].abs().max()))
            assert worst(one.projections[trait], other.projections[trait]) < 1e-5 * scale


@pytest.mark.parametrize("name", ["qwen2", "gpt2"])
def test_it_tells_what_a_stream_tells(name: str) -> None:
    model = subject(name).model
    bank = pv.VectorBank([vector.rename(vector.trait) for vector in BANK])
    wanted = list(model.stream([CHAT], bank, check_model=False, **GREEDY))
    streamer = pv.ProjectionStreamer(model, bank, timeout=60, check_model=False)
    thread = threading.Thread(
        target=model.hf.generate, args=(inputs(model),), kwargs={"streamer": streamer, **GREEDY}
    )
    thread.start()
    got = list(streamer)
    thread.join()
    same(got, wanted)
    told: list[pv.Step] = []
    at_once = pv.ProjectionStreamer(model, bank, on_step=told.append, check_model=False)
    for _ in range(2):
        told.clear()
        model.hf.generate(inputs(model), streamer=at_once, **GREEDY)
        same(told, wanted)


def test_plans_of_the_thread_act_and_nothing_stays_armed() -> None:
    model, told = fresh("qwen2").model, list[pv.Step]()
    plain = model.hf.generate(inputs(model), **GREEDY)
    streamer = pv.ProjectionStreamer(model, BANK, on_step=told.append)
    with model.steer(pv.Add(BANK["evil"], coeff=6.0, layers=[1])):
        model.hf.generate(inputs(model), streamer=streamer, **GREEDY)
        wanted = list(model.stream([CHAT], BANK, **GREEDY))
    same(told, wanted)
    assert [int(step.token_ids) for step in told] != plain[0, inputs(model).shape[1] :].tolist()
    assert not model._taps.is_armed()
    assert torch.equal(model.hf.generate(inputs(model), **GREEDY), plain)


def test_a_failed_generation_can_be_closed_and_the_streamer_used_again() -> None:
    model, told = fresh("qwen2").model, list[pv.Step]()
    streamer = pv.ProjectionStreamer(model, BANK, on_step=told.append)

    def fail(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("out of order")

    with pytest.raises(RuntimeError, match="out of order"):
        model.hf.generate(inputs(model), streamer=streamer, logits_processor=[fail], **GREEDY)
    assert model._taps.is_armed()
    streamer.close()
    assert not model._taps.is_armed()
    model.hf.generate(inputs(model), streamer=streamer, **GREEDY)
    same(told, list(model.stream([CHAT], BANK, **GREEDY)))


OTHER = "Sure?"


def test_the_next_generation_begins_with_its_own_first_token() -> None:
    model = subject("qwen2").model
    streamer = pv.ProjectionStreamer(model, BANK, timeout=60)
    other = torch.tensor(model.tokenizer(OTHER)["input_ids"])[None]
    seen, wanted = [], list(model.stream([OTHER], BANK, **GREEDY))
    first = threading.Thread(
        target=model.hf.generate, args=(inputs(model),), kwargs={"streamer": streamer, **GREEDY}
    )
    first.start()
    for step in streamer:
        seen.append(step)
        break
    first.join()  # the generation went on to its end, and nobody listened
    second = threading.Thread(
        target=model.hf.generate, args=(other,), kwargs={"streamer": streamer, **GREEDY}
    )
    second.start()
    got = list(streamer)
    second.join()
    same(got, wanted)
    assert [step.text for step in got] != [
        step.text for step in model.stream([CHAT], BANK, **GREEDY)
    ]


def test_generations_made_before_anybody_listens_come_one_by_one() -> None:
    model = subject("qwen2").model
    streamer = pv.ProjectionStreamer(model, BANK, timeout=1)
    texts = (CHAT, OTHER)
    for text in texts:
        ids = torch.tensor(model.tokenizer(text)["input_ids"])[None]
        model.hf.generate(ids, streamer=streamer, **GREEDY)
    for text in texts:
        same(list(streamer), list(model.stream([text], BANK, **GREEDY)))


@pytest.mark.parametrize("closed", [False, True])
def test_a_generation_that_failed_leaves_nothing_to_the_next(closed: bool) -> None:
    model = fresh("qwen2").model
    streamer = pv.ProjectionStreamer(model, BANK, timeout=1)
    calls = []

    def fail(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        calls.append(ids)
        if len(calls) in (1, 4):  # before the first token, and after some
            raise RuntimeError("out of order")
        return scores

    listening = iter(streamer)
    for tokens in (0, 2):
        with pytest.raises(RuntimeError, match="out of order"):
            model.hf.generate(inputs(model), streamer=streamer, logits_processor=[fail], **GREEDY)
        if tokens:
            assert len([next(listening) for _ in range(tokens)]) == tokens
        if closed:
            streamer.close()
    model.hf.generate(inputs(model), streamer=streamer, **GREEDY)
    same(list(streamer), list(model.stream([CHAT], BANK, **GREEDY)))
    with pytest.raises(HookError, match="failed before its end"):
        next(listening)
    assert not model._taps.is_armed()


def test_what_it_cannot_follow_is_refused() -> None:
    model = subject("qwen2").model
    streamer = pv.ProjectionStreamer(model, BANK, timeout=0.01)
    with pytest.raises(PlanError, match="got 2 chats in a streamer"):
        model.hf.generate(torch.stack(prompts([4, 4])), streamer=streamer, **GREEDY)
    with pytest.raises(HookError, match=r"no token for 0.01 seconds"):
        next(iter(streamer))
    with pytest.raises(ChatError, match="no tokenizer"):
        pv.ProjectionStreamer(pv.HookedModel(build("qwen2")), BANK)


def test_a_model_compiled_while_idle_is_heard_too() -> None:
    model, told = fresh("qwen2").model, list[pv.Step]()
    short = {"max_new_tokens": 2, "do_sample": False}
    wanted = list(model.stream([CHAT], BANK, **short))
    model.hf.forward = torch.compile(model.hf.forward, backend="eager")
    plain = model.hf.generate(inputs(model), **short)
    streamer = pv.ProjectionStreamer(model, BANK, on_step=told.append)
    assert torch.equal(model.hf.generate(inputs(model), streamer=streamer, **short), plain)
    same(told, wanted)


def test_another_model_s_tokens_are_refused() -> None:
    streamer = pv.ProjectionStreamer(fresh("qwen2").model, BANK)
    other = subject("qwen2").model
    with pytest.raises(HookError, match="did not come past all sites"):
        other.hf.generate(inputs(other), streamer=streamer, **GREEDY)
    streamer.close()


SPELT = "a😀".encode()


class Spelling:
    """A tokenizer whose tokens from 10 on are the bytes of `SPELT`."""

    def __init__(self, plain: Any) -> None:
        self._plain = plain

    def __getattr__(self, name: str) -> Any:
        return getattr(self._plain, name)

    def __call__(self, *given: Any, **settings: Any) -> Any:
        return self._plain(*given, **settings)

    def decode(self, ids: Any, skip_special_tokens: bool = False) -> str:
        return bytes(SPELT[int(one) - 10] for one in ids).decode(errors="replace")


@pytest.mark.parametrize(
    ("order", "texts"),
    [
        ((0, 1, 2, 3), ["a", "", "", "\ufffd"]),
        ((1, 2, 3, 4, 0, 1), ["", "", "", "😀", "a", "\ufffd"]),
        ((0, 1, 0, 0), None),
    ],
    ids=["cut", "whole, then cut", "broken"],
)
@pytest.mark.parametrize("at_once", [False, True])
def test_what_the_last_token_leaves_unfinished_is_told_with_it(
    order: tuple[int, ...], texts: list[str] | None, at_once: bool
) -> None:
    plain = subject("qwen2").model
    model = pv.HookedModel(plain.hf, Spelling(plain.tokenizer), model_id="")
    prompt, told = inputs(plain), list[pv.Step]()

    def spell(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        forced = torch.full_like(scores, -1e9)
        forced[:, 10 + order[ids.shape[1] - prompt.shape[1]]] = 0.0
        return forced

    settings = {"max_new_tokens": len(order), "do_sample": False, "logits_processor": [spell]}
    wanted = list(model.stream([CHAT], BANK, check_model=False, **settings))
    on_step = told.append if at_once else None
    streamer = pv.ProjectionStreamer(model, BANK, on_step=on_step, timeout=5, check_model=False)
    model.hf.generate(prompt, streamer=streamer, **settings)
    same(told if at_once else told + list(streamer), wanted)
    assert [int(step.token_ids) - 10 for step in wanted] == list(order)
    whole = model.tokenizer.decode([10 + one for one in order])
    pieces = [text for step in wanted for text in step.text]
    assert "".join(pieces) == whole
    assert texts is None or pieces == texts
    theirs = transformers.TextIteratorStreamer(model.tokenizer, skip_prompt=True, timeout=5)
    model.hf.generate(prompt, streamer=theirs, **settings)
    assert "".join(theirs) == whole
