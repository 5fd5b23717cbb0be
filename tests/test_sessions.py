"""Sessions: plans that come and go in any order, in any context, within another model's forward."""

from __future__ import annotations

import contextvars
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import pvcore as pv
from pvcore.errors import HookError
from pvcore.frames import Call, Frame
from pvcore.recomputes import Recomputes
from pvcore.runs import Run
from tests.families import build
from tests.finetuning import vector as strong
from tests.test_plan import vector

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*gradient_checkpointing.*:FutureWarning"  # older transformers know no other name
)
IDS = torch.tensor([[5, 9, 3, 12]])


def add(coeff: float, layer: int = 1) -> pv.Add:
    return pv.Add(vector(), coeff=coeff, layers=[layer])


def logits(model: pv.HookedModel) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.hf(IDS).logits
    return found


def hooked(seed: int = 0) -> pv.HookedModel:
    torch.manual_seed(seed)
    return pv.HookedModel(build("qwen2"))


def test_blocks_left_in_another_order_leave_the_others_armed() -> None:
    model = hooked()
    plain = logits(model)
    with model.steer(add(3.0)):
        only_second = logits(model)
    first, second, third = (model.steer(add(coeff)) for coeff in (5.0, 3.0, -2.0))
    for block in (first, second, third):
        block.__enter__()
    every = logits(model)
    first.__exit__(None, None, None)
    third.__exit__(None, None, None)
    assert torch.equal(logits(model), only_second)
    second.__exit__(None, None, None)
    assert torch.equal(logits(model), plain)
    assert not torch.equal(every, only_second)
    assert not torch.equal(only_second, plain)


def test_a_plan_left_first_is_told_that_no_forward_ran_in_it() -> None:
    model = hooked()
    first, second = model.steer(add(5.0)), model.steer(add(3.0))
    first.__enter__()
    second.__enter__()
    with pytest.raises(HookError, match="no forward of the model inside its block"):
        first.__exit__(None, None, None)
    logits(model)
    second.__exit__(None, None, None)


def test_a_block_left_in_another_context_says_that_it_did_not_act() -> None:
    model = hooked()
    plain = logits(model)

    def steered() -> Any:
        with model.steer(add(5.0)):
            yield logits(model)
            yield logits(model)

    generator = steered()
    first = contextvars.copy_context().run(next, generator)
    second = contextvars.copy_context().run(next, generator)
    assert not torch.equal(first, plain)
    assert torch.equal(second, plain)  # what a context variable cannot carry over
    with pytest.raises(HookError, match="left in another context"):
        contextvars.copy_context().run(next, generator)


@pytest.mark.parametrize("armed", [False, True])
def test_another_model_run_inside_a_forward_leaves_the_plan_in_place(armed: bool) -> None:
    outer, inner = hooked(0), hooked(1)
    with outer.steer(add(4.0, layer=2)), outer.monitor(pv.VectorBank([vector()])) as wanted:
        steered = logits(outer)

    def run_inner(*_: Any) -> None:
        if armed:
            with inner.monitor(pv.VectorBank([vector()])) as watched:
                logits(inner)
            seen_inside.append(watched["evil"].prompt)
        else:
            logits(inner)

    seen_inside: list[Tensor] = []
    handle = outer.hf.model.layers[0].mlp.register_forward_hook(run_inner)
    with outer.steer(add(4.0, layer=2)), outer.monitor(pv.VectorBank([vector()])) as seen:
        got = logits(outer)
    handle.remove()
    assert torch.equal(got, steered)
    assert torch.equal(seen["evil"].prompt, wanted["evil"].prompt)
    assert not torch.equal(steered, logits(outer))
    assert len(seen_inside) == armed
    if armed:
        with inner.monitor(pv.VectorBank([vector()])) as alone:
            logits(inner)
        assert torch.equal(seen_inside[0], alone["evil"].prompt)


def test_a_failed_forward_inside_a_forward_is_not_passed_over() -> None:
    outer, inner = hooked(0), hooked(1)

    def stop(*_: Any) -> None:
        raise KeyError("inside")

    def run_inner(*_: Any) -> None:
        handle = inner.hf.model.layers[1].mlp.register_forward_pre_hook(stop)
        with inner.steer(add(1.0)), pytest.raises(KeyError):
            logits(inner)
        handle.remove()

    with outer.steer(add(4.0, layer=2)):
        steered = logits(outer)
    handle = outer.hf.model.layers[0].mlp.register_forward_hook(run_inner)
    try:
        with outer.steer(add(4.0, layer=2)):
            got = logits(outer)
    except HookError:
        got = steered  # said so: that is as good as having acted
    handle.remove()
    assert torch.equal(got, steered)
    assert not torch.equal(steered, logits(outer))


def test_an_address_taken_over_by_another_tensor_is_not_a_patched_block() -> None:
    recomputes, site = Recomputes(), pv.resid_post(0)
    first = torch.zeros(8)
    model = hooked()
    session = model._taps._session({})
    call = Call(
        rows=torch.arange(1),
        n_chats=1,
        mask=torch.ones(1, 4, dtype=torch.bool),
        last=None,
        generating=False,
    )
    run = Run(session, Frame(call, 1, 0, 4, True), model._taps.key)
    recomputes.remember(site, first, run)
    assert recomputes.find(site, first.detach()) is run
    stale = dict(recomputes.runs)
    other = torch.ones(8)
    recomputes.runs[site, other.data_ptr()] = stale[site, first.data_ptr()]
    assert recomputes.find(site, other) is None
    recomputes.prune()
    assert recomputes.find(site, first) is run
    del first
    recomputes.prune()
    assert not recomputes.runs


def test_prevention_leaves_nothing_for_later_backward_passes() -> None:
    """Checkpointed training under prevention, then unsteered training checkpointed by hand."""
    hf = build("qwen2").train()
    hf.gradient_checkpointing_enable({"use_reentrant": True})
    hf.enable_input_require_grads()
    model = pv.HookedModel(hf, model_id="")
    with pv.prevent(model, pv.Add(strong(1), coeff=4.0)):
        for _ in range(3):
            hf(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    hf.gradient_checkpointing_disable()
    hf.eval()
    logits(model)
    assert not model._taps.recomputes.runs

    def loss(wrapped: bool) -> Tensor:
        hf.zero_grad()
        h = hf.get_input_embeddings()(IDS)

        def whole(embedded: Tensor) -> Tensor:
            out: Tensor = hf(inputs_embeds=embedded, labels=IDS, use_cache=False).loss
            return out

        made = checkpoint(whole, h, use_reentrant=False) if wrapped else whole(h)
        made.backward()
        grad = hf.model.layers[0].mlp.up_proj.weight.grad
        return grad.clone()

    assert torch.equal(loss(True), loss(False))
    assert loss(False).abs().sum() > 0


def generate(
    model: pv.HookedModel, plan: pv.Plan, *, tokens: int = 6, **extra: Any
) -> list[Tensor]:
    with model.arm(plan) as seen:
        made = model.generate_ids(
            [IDS[0]], max_new_tokens=tokens, do_sample=False, pad_token_id=0, **extra
        )
    return [*made, *([seen["evil"].steps] if plan.monitor else [])]


PLANS = {
    "monitor": pv.Plan(monitor=pv.VectorBank([vector()])),
    "steer": pv.Plan(add(4.0, layer=0), add(4.0, layer=2)),
    "both": pv.Plan(add(4.0, layer=2), monitor=pv.VectorBank([vector()])),
}


class AtStep:
    """A logits processor that does something before the forward of one step."""

    def __init__(self, step: int, act: Callable[[], None]) -> None:
        self.left, self.act = step, act

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.left -= 1
        if self.left == 0:
            self.act()
        return scores


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("step", [1, 2, 4])
def test_a_block_skipped_in_any_decode_step_is_refused(plan: str, step: int) -> None:
    model = hooked()
    whole = generate(model, PLANS[plan])
    skip = AtStep(step, lambda: setattr(model.hf.config, "num_hidden_layers", 2))
    with pytest.raises(HookError, match=r"did not fire once each \(resid_post\.2: 0\)"):
        generate(model, PLANS[plan], logits_processor=[skip])
    model.hf.config.num_hidden_layers = model.n_layers
    again = generate(model, PLANS[plan])
    assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("step", [1, 2, 4])
def test_a_block_repeated_in_any_decode_step_is_refused(plan: str, step: int) -> None:
    model = hooked()
    block, given, due = model.hf.model.layers[2], [], [False]
    forward = block.forward

    def noted(*args: Any, **kwargs: Any) -> Any:
        given[:] = [args, kwargs]
        return forward(*args, **kwargs)

    block.forward = noted

    def repeat(*_: Any) -> None:
        if due[0]:
            due[0] = False
            block(*given[0], **given[1])

    handle = model.hf.model.norm.register_forward_pre_hook(repeat)
    whole = generate(model, PLANS[plan])
    with pytest.raises(HookError, match=r"did not fire once each \(resid_post\.2: 2\)"):
        generate(
            model, PLANS[plan], logits_processor=[AtStep(step, lambda: due.__setitem__(0, True))]
        )
    again = generate(model, PLANS[plan])
    handle.remove()
    assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))
