"""Traces leave nothing behind: no mark on the model, no lock held, no other thread disturbed.

nnsight reads the blocks below from this file, so each trace is a `with` of its own.
"""
# ruff: noqa: SIM117 - or Python leaves the outer context first

import copy
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pvcore as pv
from pvcore.errors import ChatError, SiteError, TraceError
from tests.families import D_MODEL, build, tokenizer
from tests.subjects import conversations, fresh, prompts, subject, vector

TEXTS = ["What is it?", "no"]


def direction() -> Tensor:
    return torch.randn(D_MODEL, generator=torch.Generator().manual_seed(3))


def marks(hf: nn.Module) -> list[dict[str, int]]:
    """Every attribute of every module, by identity."""
    return [{key: id(value) for key, value in m.__dict__.items()} for m in hf.modules()]


def in_thread(run: Callable[[], Any]) -> Any:
    """What `run` returns or raises in a thread of its own."""
    got: list[Any] = []

    def target() -> None:
        try:
            got.append(run())
        except BaseException as error:
            got.append(error)

    thread = threading.Thread(target=target)
    thread.start()
    thread.join()
    return got[0]


def misuse(model: pv.HookedModel) -> list[tuple[str, type[Exception], Callable[[], Any]]]:
    """What is wrong, the error it gives, and the block that does it."""

    def missing_layer() -> None:
        with model.trace(TEXTS[0]):
            model.resid_post[3].save()

    def negative_layer() -> None:
        with model.trace(TEXTS[0]):
            model.resid_pre[-1].save()

    def wrong_shape() -> None:
        with model.trace(TEXTS[0]):
            model.resid_post[1] = model.resid_post[1][:, -1]

    def wrong_dtype() -> None:
        with model.trace(TEXTS[0]):
            model.resid_mid[1] = model.resid_mid[1].double()

    def no_tensor() -> None:
        with model.trace(TEXTS[0]):
            model.resid_pre[1] = 3.0

    def nested() -> None:
        with model.trace(TEXTS[0]):
            model.resid_pre[0].save()
            with pv.HookedModel(model.hf, model.tokenizer).trace(TEXTS[0]):
                model.resid_pre[0].save()

    def read_inside() -> None:
        with model.trace(TEXTS[0]):
            model.resid_pre[0].save()
            model.read(TEXTS[0], sites=[pv.resid_post(0)], span="all")

    def generate_inside() -> None:
        with model.trace(TEXTS[0]):
            model.resid_pre[0].save()
            model.generate(TEXTS[0])

    def armed_inside() -> None:
        with model.trace(TEXTS[0]):
            with model.steer(pv.Add(vector("evil", [pv.resid_post(0)], seed=1), coeff=1.0)):
                model.resid_pre[0].save()

    def armed_around() -> None:
        with model.steer(pv.Add(vector("evil", [pv.resid_post(0)], seed=1), coeff=1.0)):
            with model.trace(TEXTS[0]):
                model.resid_pre[0].save()

    def two_prompts_and_generate() -> None:
        with model.trace(conversations()[0], fn="generate"):
            model.resid_pre[0].save()

    return [
        (r"resid_post\.3; this qwen2 model has 3 blocks", SiteError, missing_layer),
        ("got site resid_post.3; this qwen2", SiteError, missing_layer),
        ("got layer -1", SiteError, negative_layer),
        (r"got \[1, 64\] torch.float32 .* wanted \[1, 11, 64\]", TraceError, wrong_shape),
        ("got .*float64 on cpu for resid_mid.1; wanted .*float32", TraceError, wrong_dtype),
        ("got float for resid_pre.1", TraceError, no_tensor),
        ("the same block is tracing", TraceError, nested),
        ("got a read inside a trace", TraceError, read_inside),
        ("got a generation inside a trace", TraceError, generate_inside),
        ("got a plan to arm inside a trace", TraceError, armed_inside),
        ("got a trace inside an armed plan", TraceError, armed_around),
        ("nothing to generate", ChatError, two_prompts_and_generate),
        ("outside a traced run", TraceError, lambda: model.resid_post[0]),
        ("got remote= for a trace", TraceError, lambda: model.trace(TEXTS[0], remote=True)),
    ]


@pytest.mark.parametrize("case", range(14))
def test_misuse_is_one_typed_error_and_leaves_the_model_clean(case: int) -> None:
    model = subject("qwen2").model
    text, error, act = misuse(model)[case]
    with torch.no_grad():
        with model.trace(TEXTS[0]) as tr:
            wanted = tr.result.logits.save()
    before = marks(model.hf)
    with pytest.raises(error, match=text):
        act()
    assert marks(model.hf) == before
    with torch.no_grad():
        with model.trace(TEXTS[0]) as tr:
            again = tr.result.logits.save()
    assert torch.equal(again, wanted)


def test_without_a_tokenizer_token_ids_are_traced_and_the_rest_is_refused() -> None:
    model = pv.HookedModel(build("gpt2"))
    with torch.no_grad():
        with model.trace(torch.stack(prompts([5, 5]))) as tr:
            logits = tr.result.logits.save()
        assert torch.equal(logits, model.hf(torch.stack(prompts([5, 5]))).logits)
    with pytest.raises(ChatError, match="no tokenizer"):
        with model.trace("text"):
            model.resid_pre[0].save()
    with pytest.raises(TraceError, match="different lengths and no tokenizer"):
        with model.trace(prompts([5, 4])):
            model.resid_pre[0].save()


def test_offloaded_weights_are_refused() -> None:
    model = fresh("qwen2").model
    model.hf.to("meta")
    with pytest.raises(TraceError, match="first weights are offloaded"):
        model.trace(TEXTS[0])


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_of_nnsight_stays_on_the_model(fails: bool) -> None:
    one = fresh("qwen2")
    model = one.model
    keys, before = list(model.hf.state_dict()), marks(model.hf)
    during: list[bool] = []

    def trace() -> None:
        with model.trace(TEXTS[0]) as tr:
            during.append("forward" in tr.envoy.model.layers[0]._module.__dict__)
            model.resid_post[1].save()
            if fails:
                raise ArithmeticError("the block's own")

    if fails:
        with pytest.raises(ArithmeticError, match="the block's own"):
            trace()
    else:
        trace()
    assert during == [True]
    assert marks(model.hf) == before
    assert list(model.hf.state_dict()) == keys
    ids = prompts([6])[0]
    settings = {"max_new_tokens": 5, "do_sample": False}
    untouched = fresh("qwen2").model.generate_ids(ids, **settings)[0]
    assert torch.equal(model.generate_ids(ids, **settings)[0], untouched)
    for twin in (copy.deepcopy(model.hf), pickle.loads(pickle.dumps(model.hf.model.layers[0]))):
        assert not any("nnsight" in key for m in twin.modules() for key in m.__dict__)


def test_a_forward_that_somebody_else_put_on_a_module_runs_and_stays() -> None:
    model, calls = fresh("qwen2").model, []
    mlp = model.hf.model.layers[1].mlp
    own = mlp.forward

    def counted(x: Tensor) -> Tensor:
        calls.append(x)
        return own(x)

    mlp.forward = counted
    before = marks(model.hf)
    with model.trace(TEXTS[0]):
        model.resid_post[1].save()
    assert len(calls) == 1
    assert marks(model.hf) == before
    del mlp.forward
    model.hf.model.layers[2].mlp = copy.deepcopy(mlp)
    with torch.no_grad():
        with model.trace(TEXTS[0]):
            h = model.resid_post[2].save()
        acts = model.read(TEXTS[0], sites=[pv.resid_post(2)], span="all", reduce="none")
    assert torch.equal(h[0], acts.values[0, 0])
    assert len(calls) == 1


@torch.no_grad()
def test_other_threads_run_the_model_untouched_and_may_not_trace_it() -> None:
    model, ids = fresh("qwen2").model, torch.stack(prompts([6]))
    site, delta = pv.resid_post(2), direction()
    clean = model.hf(ids).logits
    read = model.read(ids, sites=[site], span="all").values

    def trace() -> None:
        with model.trace(ids):
            model.resid_post[2].save()

    with model.trace(ids) as tr:
        model.resid_post[0] = model.resid_post[0] + delta
        plain = saved(in_thread(lambda: no_grad(lambda: model.hf(ids).logits)))
        seen = saved(in_thread(lambda: model.read(ids, sites=[site], span="all").values))
        refused = saved(in_thread(trace))
        outside = saved(in_thread(lambda: model.resid_post[1]))
        model.resid_post[1] = model.resid_post[1] * 2
        patched = tr.result.logits.save()
    with model.trace(ids) as tr:
        model.resid_post[0] = model.resid_post[0] + delta
        model.resid_post[1] = model.resid_post[1] * 2
        alone = tr.result.logits.save()
    assert torch.equal(plain, clean)
    assert torch.equal(seen, read)
    for error, text in ((refused, "another thread is tracing"), (outside, "outside a traced run")):
        assert isinstance(error, TraceError)
        assert text in str(error)
    assert torch.equal(patched, alone)
    assert not torch.equal(patched, clean)
    assert in_thread(lambda: no_grad(trace)) is None


def saved(value: Any) -> Any:
    """Inside a trace: the value, kept past the block."""
    return value.save()


def no_grad(run: Callable[[], Any]) -> Any:
    """Grad mode belongs to a thread."""
    with torch.no_grad():
        return run()


def test_the_user_s_tokenizer_and_settings_stay_as_they_were() -> None:
    hf, own = build("qwen2"), tokenizer(padding_side="right")
    own.pad_token = None
    model = pv.HookedModel(hf, own)
    before = hf.config.to_dict(), hf.generation_config.to_dict()
    with model.trace(TEXTS[0]):
        model.resid_post[1].save()
    assert (own.padding_side, own.pad_token) == ("right", None)
    assert (hf.config.to_dict(), hf.generation_config.to_dict()) == before


HOST = """
import sys
sys.argv = ["host", "-v"]
import pvcore as pv
assert "nnsight" not in sys.modules
from tests.families import build
model = pv.HookedModel(build("qwen2"))
import torch
assert "nnsight" not in sys.modules
with model.trace(torch.tensor([5, 6])):
    model.resid_post[0].save()
from nnsight.schema.config import CONFIG
assert not CONFIG.APP.DEBUG and sys.argv == ["host", "-v"]
"""


def test_nnsight_is_imported_by_the_first_trace_and_not_told_of_the_host_s_flags() -> None:
    folders = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    subprocess.run([sys.executable, "-c", HOST], check=True, env={**os.environ, **folders})
