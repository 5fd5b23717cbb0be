"""Streaming: the same text, tokens and projections as a whole generation, step by step."""

import threading

import pytest
import torch

import pvcore as pv
from pvcore.errors import ChatError, PlanError
from pvcore.monitor import WAITING_STEPS
from pvcore.stream import Pieces
from tests.families import build
from tests.subjects import prompts, subject
from tests.test_plan import vector

BANK = pv.VectorBank([vector(), vector("humor", seed=2)])
GREEDY = {"max_new_tokens": 6, "do_sample": False}


def test_streaming_equals_generating():
    model = subject("qwen2").model
    chats = ["Is it 3?", "well"]
    with model.monitor(BANK) as seen:
        texts = model.generate(chats, **GREEDY)
    steps = list(model.stream(chats, BANK, **GREEDY))
    assert ["".join(step.text[row] for step in steps) for row in (0, 1)] == texts
    streamed = torch.stack([step.projections["humor"] for step in steps])
    assert torch.equal(streamed, seen["humor"].steps)
    assert len({tuple(step.token_ids.tolist()) for step in steps}) > 1


def test_steps_that_wait_to_be_scored_give_what_a_stream_shows():
    """More tokens than wait on a CPU, and a reply that ends before the others."""
    model = subject("qwen2").model
    longer = GREEDY | {"max_new_tokens": WAITING_STEPS + 5, "pad_token_id": 0}
    end = int(model.generate_ids(["Is it 3?"], **longer)[0][7])
    with model.monitor(BANK) as seen:
        model.generate(["Is it 3?", "well"], **longer, eos_token_id=end)
    steps = list(model.stream(["Is it 3?", "well"], BANK, **longer, eos_token_id=end))
    assert len(steps) > WAITING_STEPS + 1
    for trait in ("evil", "humor"):
        streamed = torch.stack([step.projections[trait] for step in steps])
        assert torch.allclose(streamed, seen[trait].steps, rtol=0, atol=0, equal_nan=True)
        assert len({tuple(row) for row in streamed[:, 0].tolist()}) > WAITING_STEPS


def test_a_stream_runs_under_the_autocast_around_it():
    model = subject("qwen2").model
    seen = []
    handle = model.hf.model.layers[0].mlp.register_forward_hook(
        lambda _module, _args, output: seen.append(output.dtype)
    )
    with torch.autocast("cpu", torch.bfloat16):
        list(model.stream(["well"], **GREEDY))
    under = set(seen)
    seen.clear()
    list(model.stream(["well"], **GREEDY))
    handle.remove()
    assert under == {torch.bfloat16}
    assert set(seen) == {torch.float32}


def test_steering_around_a_stream_reaches_it():
    model = subject("qwen2").model
    plain = [step.token_ids.tolist() for step in model.stream(["well"], **GREEDY)]
    with model.steer(pv.Add(vector(), coeff=6.0, layers=[1])):
        steered = [step.token_ids.tolist() for step in model.stream(["well"], **GREEDY)]
        whole = model.generate_ids(["well"], **GREEDY)
    assert [row[0] for row in steered] == whole[0].tolist()
    assert steered != plain


def test_an_ended_chat_falls_silent():
    model = subject("qwen2").model
    chats = ["Is it 3?", "well"]
    free = model.generate_ids(chats, **GREEDY)
    end = int(free[0][1])
    replies = model.generate_ids(chats, **GREEDY, eos_token_id=end, pad_token_id=0)
    steps = list(model.stream(chats, BANK, **GREEDY, eos_token_id=end, pad_token_id=0))
    assert len(steps) == max(map(len, replies))
    assert len(replies[0]) < len(steps)
    for late in steps[len(replies[0]) :]:
        assert late.text[0] == ""
        assert late.projections["evil"][:, 0].isnan().all()
        assert not late.projections["evil"][:, 1].isnan().any()


def test_alarms_ring_once_per_crossing():
    model = subject("qwen2").model
    with model.monitor(BANK) as seen:
        model.generate(["Is it 3?", "well"], max_new_tokens=12, do_sample=False)
    scores = seen["evil"].steps
    threshold = float(scores.median())
    rung = [
        (alarm.step, alarm.site.layer, alarm.chat)
        for step in model.stream(
            ["Is it 3?", "well"],
            BANK,
            alarms={"evil": threshold},
            max_new_tokens=12,
            do_sample=False,
        )
        for alarm in step.alarms
    ]
    above = scores > threshold
    before = torch.cat([torch.zeros_like(above[:1]), above[:-1]])
    assert sorted(rung) == sorted(map(tuple, (above & ~before).nonzero().tolist()))
    assert 0 < len(rung) < int(above.sum())


def test_leaving_the_loop_stops_the_generation():
    model = pv.HookedModel(build("qwen2"), subject("qwen2").model.tokenizer)
    forwards = []
    model.hf.register_forward_hook(lambda *_: forwards.append(1))
    stream = model.stream(["well"], BANK, max_new_tokens=50)
    next(stream)
    next(stream)
    stream.close()
    assert len(forwards) <= 3
    assert not [t for t in threading.enumerate() if t.name == "pvcore-stream"]


def test_the_next_token_waits_for_the_consumer():
    model = pv.HookedModel(build("qwen2"), subject("qwen2").model.tokenizer)
    forwards = []
    model.hf.register_forward_hook(lambda *_: forwards.append(1))
    for count, _ in enumerate(model.stream(["well"], max_new_tokens=5, do_sample=False), 1):
        assert len(forwards) == count


def test_errors_of_the_generation_reach_the_consumer():
    model = pv.HookedModel(build("qwen2"), subject("qwen2").model.tokenizer)

    def fail(*_):
        raise RuntimeError("out of order")

    model.hf.lm_head.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="out of order"):
        list(model.stream(["well"], max_new_tokens=3))


def test_what_cannot_be_streamed_is_refused():
    model = subject("qwen2").model
    with pytest.raises(PlanError, match="stream follows one per chat"):
        model.stream(["well"], num_beams=2)
    with pytest.raises(PlanError, match="got an alarm for envy; the bank watches evil, humor"):
        model.stream(["well"], BANK, alarms={"envy": 1.0})
    with pytest.raises(ChatError, match="got no tokenizer"):
        pv.HookedModel(build("qwen2")).stream(prompts([4]))


class Bytes:
    """A tokenizer whose tokens are single UTF-8 bytes."""

    def decode(self, ids, skip_special_tokens):
        return bytes(ids).decode("utf-8", errors="replace")


def test_characters_of_several_tokens_are_held_back_until_whole():
    text = "naïve 🙂 ok"
    pieces = Pieces(Bytes())
    parts = [pieces.push(byte) for byte in text.encode()]
    assert "".join(parts) == text
    assert "\ufffd" not in "".join(parts)
    assert "" in parts


def test_a_reply_that_ends_inside_a_character_is_told_to_its_end():
    cut = "ok é".encode()[:-1]
    pieces = Pieces(Bytes())
    told = "".join(pieces.push(byte, last=at == len(cut) - 1) for at, byte in enumerate(cut))
    assert told == Bytes().decode(cut, skip_special_tokens=True) == "ok \ufffd"


class Halves:
    """A tokenizer whose every token begins a character that the next one completes."""

    def __init__(self, plain):
        self._plain = plain

    def __getattr__(self, name):
        return getattr(self._plain, name)

    def decode(self, ids, skip_special_tokens):
        return "".join("x" for _ in ids[1:]) + "\ufffd" * (len(ids) > 0)


@pytest.mark.parametrize("ending", [{"max_new_tokens": 5}, {"max_length": 11}, {"stop": 3}])
def test_a_stream_tells_what_a_last_token_leaves_unfinished(ending):
    found = subject("qwen2")
    model = pv.HookedModel(found.model.hf, Halves(found.model.tokenizer), model_id="")
    (ids,) = prompts([6])
    settings = {"do_sample": False, "eos_token_id": None, **ending}
    stop = settings.pop("stop", None)
    if stop is not None:
        settings["max_new_tokens"] = 9
        settings["stopping_criteria"] = [
            lambda ids, _scores, **_: torch.full((len(ids),), ids.shape[1] >= 6 + stop)
        ]
    steps = list(model.stream([ids], **settings))
    assert len(steps) == (stop or 5)
    assert [step.text[0] for step in steps] == [""] * (len(steps) - 1) + [
        "x" * (len(steps) - 1) + "\ufffd"
    ]
