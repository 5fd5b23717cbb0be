"""Gradient checkpointing: a block that runs again is steered as it was the first time."""

import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer

import pvcore as pv
from pvcore.errors import HookError
from tests.subjects import Subject, fresh, worst
from tests.test_gradients import BOUND, ROWS, VISIBLE, Part, gradients, loss_of, steps, wanted

Backward = Callable[[Subject, list[pv.Site]], list[Part]]
PLANS = {
    "post": [pv.resid_post(1)],
    "pre": [pv.resid_pre(1)],
    "both": [pv.resid_pre(1), pv.resid_post(1)],
}


def checkpointed(*, reentrant: bool) -> Subject:
    found = fresh("qwen2")
    found.model.hf.train()
    # transformers renamed the switch and warns of the old name.
    enable = getattr(found.model.hf, "activation_checkpointing_enable", None)
    (enable or found.model.hf.gradient_checkpointing_enable)({"use_reentrant": reentrant})
    found.model.hf.enable_input_require_grads()
    return found


@pytest.fixture(params=["newer", "older"])
def transformers_style(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Newer transformers checkpoint a block's forward; older ones its hooks as well."""

    def call_with_hooks_inside(block: Any, *args: Any, **kwargs: Any) -> Any:
        kwargs = {name: value for name, value in kwargs.items() if name != "past_key_values"}
        call = partial(nn.Module.__call__, block, **kwargs)
        if block.gradient_checkpointing and block.training:
            return block._gradient_checkpointing_func(call, *args)
        return call(*args)

    if request.param == "older":
        newer = Qwen2DecoderLayer.forward
        monkeypatch.setattr(Qwen2DecoderLayer, "forward", getattr(newer, "__wrapped__", newer))
        monkeypatch.setattr(Qwen2DecoderLayer, "__call__", call_with_hooks_inside)


def in_a_thread(found: Subject, sites: list[pv.Site]) -> list[Part]:
    """Autograd runs the backward of CUDA tensors in threads of its own."""
    with found.model.steer(*(step for site in sites for step in steps(site, 0.5))):
        loss = loss_of(found.model.hf, ROWS[0])
        thread = threading.Thread(target=loss.backward)
        thread.start()
        thread.join()
    return [(ROWS[0], 0.5)]


def after_the_block(found: Subject, sites: list[pv.Site]) -> list[Part]:
    with found.model.steer(*(step for site in sites for step in steps(site, 0.5))):
        loss = loss_of(found.model.hf, ROWS[0])
    loss.backward()
    return [(ROWS[0], 0.5)]


def of_two_plans_at_once(found: Subject, sites: list[pv.Site]) -> list[Part]:
    parts, losses = [(ROWS[0], 0.5), (ROWS[1], -0.5)], []
    for ids, coeff in parts:
        with found.model.steer(*(step for site in sites for step in steps(site, coeff))):
            losses.append(loss_of(found.model.hf, ids))
    (losses[0] + losses[1]).backward()
    return parts


def of_two_lengths_at_once(found: Subject, sites: list[pv.Site]) -> list[Part]:
    with found.model.steer(*(step for site in sites for step in steps(site, 0.5))):
        losses = [loss_of(found.model.hf, ids) for ids in (ROWS[0], ROWS[2])]
        (losses[0] + losses[1]).backward()
    return [(ROWS[0], 0.5), (ROWS[2], 0.5)]


def beside_an_unsteered_one(found: Subject, sites: list[pv.Site]) -> list[Part]:
    """A loss that compares the steered model with the model as it is."""
    with found.model.steer(*(step for site in sites for step in steps(site, 0.5))):
        steered = loss_of(found.model.hf, ROWS[0])
    (steered + 0.0 * loss_of(found.model.hf, ROWS[0])).backward()
    return [(ROWS[0], 0.5)]


@pytest.mark.usefixtures("transformers_style")
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(
    "backward",
    [
        in_a_thread,
        after_the_block,
        of_two_plans_at_once,
        of_two_lengths_at_once,
        beside_an_unsteered_one,
    ],
)
@pytest.mark.parametrize("plan", PLANS)
def test_recomputed_blocks_are_steered_as_they_were(
    plan: str, backward: Backward, reentrant: bool
) -> None:
    found, sites = checkpointed(reentrant=reentrant), PLANS[plan]
    parts: list[Part] = []
    got = gradients(found.model.hf, lambda: parts.extend(backward(found, sites)))
    assert worst(got, wanted(found.oracle, sites, *parts)) < BOUND
    assert worst(got, wanted(found.oracle, [], *parts)) > VISIBLE


@pytest.mark.usefixtures("transformers_style")
@pytest.mark.parametrize("reentrant", [False, True])
def test_inside_a_checkpoint_nothing_can_be_changed(reentrant: bool) -> None:
    found = checkpointed(reentrant=reentrant)
    refused = pytest.raises(HookError, match=r"resid_mid\.1 under gradient checkpointing")
    with refused, found.model.steer(*steps(pv.resid_mid(1), 0.5)):
        loss_of(found.model.hf, ROWS[0])
    found.model.hf.eval()
    with found.model.steer(*steps(pv.resid_mid(1), 0.5)):
        loss_of(found.model.hf, ROWS[0])


def wrapped(hf: Any, *, reentrant: bool) -> None:
    from torch.distributed.algorithms._checkpoint import checkpoint_wrapper as wrapper

    way = wrapper.CheckpointImpl.REENTRANT if reentrant else wrapper.CheckpointImpl.NO_REENTRANT
    for layer, block in enumerate(hf.model.layers):
        hf.model.layers[layer] = wrapper.checkpoint_wrapper(block, way)


def of_rows(hf: Any, given: Any) -> list[Any]:
    """Gradients of the block's weights in a forward on rows of its own."""
    hf.zero_grad()
    hf(inputs_embeds=given, use_cache=False).logits.square().mean().backward()
    return [weight.grad.clone() for weight in hf.model.layers[1].parameters()]


def near(one: list[Any], other: list[Any]) -> bool:
    return all((a - b).abs().max() <= BOUND for a, b in zip(one, other, strict=True))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # within no_grad
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("train", [False, True])
def test_blocks_checkpointed_by_somebody_else_run_again_as_they_ran(
    train: bool, reentrant: bool
) -> None:
    found = fresh("qwen2")
    model, hf = found.model, found.model.hf.train(train)
    rows = torch.randn(1, 5, model.d_model, requires_grad=True)
    plan = steps(pv.resid_pre(0), 0.5)
    with model.steer(*plan):
        steered = of_rows(hf, rows)
    plain = of_rows(hf, rows)
    wrapped(hf, reentrant=reentrant)
    with model.steer(*plan):
        assert near(of_rows(hf, rows), steered)
        loss = hf(inputs_embeds=rows, use_cache=False).logits.square().mean()
    with torch.no_grad():
        hf(inputs_embeds=rows, use_cache=False)
    hf.zero_grad()
    loss.backward()
    assert near([one.grad for one in hf.model.layers[1].parameters()], steered)
    assert near(of_rows(hf, rows), plain)  # the same rows, with nothing armed any more
    assert not near(plain, steered)


def copying() -> Any:
    """What is saved for the backward pass comes back as another tensor, as from host memory."""
    return torch.autograd.graph.saved_tensors_hooks(
        lambda saved: saved.clone(), lambda saved: saved
    )


@pytest.mark.skipif(
    not hasattr(Qwen2DecoderLayer.forward, "__wrapped__"),
    reason="another version: its checkpoints hold a block's hooks, where a copy is refused",
)
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("plan", PLANS)
def test_a_copied_input_is_no_matter_where_hooks_are_outside(plan: str, reentrant: bool) -> None:
    found, sites = checkpointed(reentrant=reentrant), PLANS[plan]
    parts: list[Part] = []
    with copying():
        got = gradients(found.model.hf, lambda: parts.extend(in_a_thread(found, sites)))
    assert worst(got, wanted(found.oracle, sites, *parts)) < BOUND
    assert worst(got, wanted(found.oracle, [], *parts)) > VISIBLE


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("plan", PLANS)
def test_a_block_that_runs_again_on_a_copy_is_never_unsteered_silently(
    plan: str, reentrant: bool
) -> None:
    found, sites = fresh("qwen2"), PLANS[plan]
    hf = found.model.hf.train()
    plain = wanted(found.oracle, [], (ROWS[0], 0.5))
    hf.enable_input_require_grads()
    wrapped(hf, reentrant=reentrant)
    with copying(), found.model.steer(*(step for site in sites for step in steps(site, 0.5))):
        losses = [loss_of(hf, ROWS[0]) for _ in range(2)]

    with pytest.raises(HookError, match="on a copy of its input"):
        losses[0].backward()
    with copying():
        unsteered = loss_of(hf, ROWS[0])
    assert worst(gradients(hf, unsteered.backward), plain) < BOUND
    with pytest.raises(HookError, match="on a copy of its input"):
        losses[1].backward()


def test_a_checkpoint_around_the_whole_decoder_is_refused_where_it_steers() -> None:
    found = fresh("qwen2")
    model, hf = found.model, found.model.hf.train()
    ids = ROWS[0].reshape(1, -1)
    whole = partial(torch.utils.checkpoint.checkpoint, hf.model, ids, use_reentrant=False)
    with model.steer(*steps(pv.resid_post(1), 0.5)):
        hf(input_ids=ids).logits.sum().backward()
        armed, left = whole(), whole()
        with pytest.raises(HookError, match="checkpoint around the whole decoder"):
            armed.last_hidden_state.sum().backward()
    with pytest.raises(HookError, match="checkpoint around the whole decoder"):
        left.last_hidden_state.sum().backward()
    hf.zero_grad()
    whole().last_hidden_state.sum().backward()  # the same ids, nothing armed
    got = [weight.grad.clone() for weight in hf.model.layers[1].parameters()]
    hf.zero_grad()
    hf.model(ids).last_hidden_state.sum().backward()
    assert near(got, [weight.grad for weight in hf.model.layers[1].parameters()])
