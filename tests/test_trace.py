"""Traces: reads, patches and gradients equal raw hooks in every family.

nnsight reads the blocks below from this file, so each trace is a `with` of its own.
"""
# ruff: noqa: SIM117 - or Python leaves the outer context first

from typing import Any

import pytest
import torch
from torch import Tensor

import pvcore as pv
from pvcore.errors import SiteError, TraceError
from tests.families import D_MODEL, FAMILIES, N_LAYERS, build
from tests.oracle import Edit, padded
from tests.subjects import NAMES, conversations, encoded, point, prompts, subject, vector

FLATTENED = ("opt",)
WITH_MID = [name for name in NAMES if FAMILIES[name].attention and name not in FLATTENED]
TEXTS = ["What is it?", "no"]


def batch() -> tuple[Tensor, Tensor]:
    return padded(prompts([7, 4]), side="left")


def positions(name: str, mask: Tensor) -> dict[str, Tensor]:
    taken = FAMILIES[name].takes_positions
    return {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)} if taken else {}


def direction(seed: int = 3) -> Tensor:
    return torch.randn(D_MODEL, generator=torch.Generator().manual_seed(seed))


def add(h: Tensor, delta: Tensor) -> Tensor:
    """As the oracle adds: in float64, rounded once."""
    return (h.double() + delta.double()).to(h.dtype)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_reads_equal_raw_hooks(name: str) -> None:
    one = subject(name)
    model, (ids, mask) = one.model, batch()
    kinds = ("resid_pre", "resid_mid", "resid_post")
    seen = {}
    with model.trace(input_ids=ids, attention_mask=mask, **positions(name, mask)):
        for layer in range(N_LAYERS):
            for kind in kinds if name in WITH_MID else kinds[::2]:
                seen[kind, layer] = getattr(model, kind)[layer]
        seen.save()
    _, tape = one.oracle.forward(ids, mask)
    wanted = tape.frames[0].residuals
    assert seen.keys() == {p for p in wanted if p[0] != "resid_mid" or name in WITH_MID}
    for place, h in seen.items():
        assert torch.equal(h, wanted[place]), place
    assert not torch.equal(seen["resid_post", 0], seen["resid_post", 1])


@pytest.mark.parametrize("layer", range(N_LAYERS))
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_patches_equal_raw_hooks(name: str, layer: int) -> None:
    one = subject(name)
    model, (ids, mask), delta = one.model, batch(), direction()
    extra = positions(name, mask)
    with model.trace(input_ids=ids, attention_mask=mask, **extra) as tr:
        model.resid_pre[layer] = add(model.resid_pre[layer], 2 * delta)
        model.resid_post[layer] = add(model.resid_post[layer], delta)
        shown = model.resid_post[layer].save()
        logits = tr.result.logits.save()
    coeff = torch.ones(2)
    edits = [
        Edit(kind="add", point=(kind, layer), vectors=raw[None], where=mask >= 0, coeff=coeff)
        for kind, raw in (("resid_pre", 2 * delta), ("resid_post", delta))
    ]
    wanted, tape = one.oracle.forward(ids, mask, edits)
    assert torch.equal(logits, wanted)
    assert torch.equal(shown, tape.frames[0].residuals["resid_post", layer])
    assert (logits - one.oracle.forward(ids, mask)[0]).abs().max() > 1e-2


@pytest.mark.parametrize("name", WITH_MID)
@torch.no_grad()
def test_a_patch_of_resid_mid_moves_the_residual_branch_too(name: str) -> None:
    one, site = subject(name), pv.resid_mid(1)
    model, (ids, mask) = one.model, batch()
    evil = vector("evil", [site], seed=5, scale=0.2)
    inputs = {"input_ids": ids, "attention_mask": mask, **positions(name, mask)}
    with model.trace(**inputs) as tr:
        model.resid_mid[1] = model.resid_mid[1] + evil.direction(site)
        after = model.resid_post[1].save()
        logits = tr.result.logits.save()
    edit = Edit(
        kind="add",
        point=point(site),
        vectors=evil.direction(site)[None],
        where=mask >= 0,
        coeff=torch.ones(2),
    )
    _, tape = one.oracle.forward(ids, mask, [edit])
    # The oracle moves attention's output instead, which rounds once more.
    torch.testing.assert_close(after, tape.frames[0].residuals["resid_post", 1], atol=1e-5, rtol=0)
    with model.steer(pv.Add(evil, coeff=1.0, layers=[site], span="all")):
        own = model.hf(**inputs).logits
    assert torch.equal(logits[mask.bool()], own[mask.bool()])
    assert (logits - model.hf(**inputs).logits).abs().max() > 1e-2


@torch.no_grad()
def test_flattened_resid_mid_is_refused() -> None:
    model = subject("opt").model
    with pytest.raises(TraceError, match=r"resid_mid\.0 of shape \[7, 64\].*opt.*flattens"):
        with model.trace(prompts([7])[0]):
            model.resid_mid[0].save()


@pytest.mark.parametrize("name", ["qwen2", "gpt2", "gemma2"])
def test_gradients_equal_raw_hooks(name: str) -> None:
    one, (ids, _) = subject(name), batch()
    model, delta = one.model, direction().requires_grad_()
    with model.trace(ids):
        h = model.resid_post[0]
        model.resid_post[1] = model.resid_post[1] + delta
        loss = model.resid_post[2].square().sum().save()
        with loss.backward():
            inner = h.grad.save()
    leaf = delta.grad
    assert leaf is not None

    twin, caught = build(name), []
    blocks = list(twin.get_submodule(FAMILIES[name].blocks).children())
    again = direction().requires_grad_()
    blocks[0].register_forward_hook(lambda _m, _a, out: caught.append(out))
    blocks[1].register_forward_hook(lambda _m, _a, out: out + again)
    blocks[2].register_forward_hook(lambda _m, _a, out: caught.append(out))
    twin(ids)
    caught[0].retain_grad()
    caught[1].square().sum().backward()
    assert torch.equal(inner, caught[0].grad)
    assert torch.equal(leaf, again.grad)
    assert inner.abs().max() > 1e-3
    model.hf.zero_grad()


@torch.no_grad()
def test_a_trace_sees_the_tokens_that_read_sees() -> None:
    one, site = subject("qwen2"), pv.resid_post(1)
    model = one.model
    (talk, _), ids = encoded()[0], prompts([5])[0]
    whole = torch.stack(prompts([6, 6]))
    given: list[tuple[Any, Any]] = [
        (TEXTS[0], TEXTS[0]),
        (TEXTS, TEXTS),
        (conversations()[0], talk),
        (conversations()[:2], [ids for ids, _ in encoded()[:2]]),
        (ids, ids),
        (whole, whole),
        (model.tokenizer(TEXTS[0], return_tensors="pt"), TEXTS[0]),
    ]
    for chats, same in given:
        with model.trace(chats):
            h = model.resid_post[1].save()
        acts = model.read(same, sites=[site], span="all", reduce="none")
        for row, wanted, length in zip(h, acts[site], acts.lengths, strict=True):
            torch.testing.assert_close(row[-length:], wanted[:length], atol=1e-5, rtol=0)
    assert model.tokenizer.padding_side == "left"


@torch.no_grad()
def test_invokes_patch_their_own_rows() -> None:
    model, delta = subject("llama").model, direction()
    with model.trace() as tr:
        with tr.invoke(TEXTS[0]):
            model.resid_post[0] = model.resid_post[0] + delta
            first = model.resid_post[2].save()
        with tr.invoke(TEXTS[1]):
            second = model.resid_post[2].save()
    with model.trace(TEXTS[0]):
        clean = model.resid_post[2].save()
    acts = model.read(TEXTS[1], sites=[pv.resid_post(2)], span="all", reduce="none")
    torch.testing.assert_close(second[:, -2:], acts.values[0], atol=1e-5, rtol=0)
    assert (first - clean).abs().max() > 1e-2


@torch.no_grad()
def test_generation_is_patched_once_a_step_with_iter() -> None:
    model, site = subject("qwen2").model, pv.resid_post(1)
    evil = vector("evil", [site], seed=5, scale=0.4)
    chat = conversations()[0][:1]
    settings = {"max_new_tokens": 6, "do_sample": False}
    with model.trace(chat, fn="generate", **settings) as tr:
        plain = tr.result.save()
    with model.trace(fn="generate", **settings) as tr:
        with tr.invoke(chat):
            for _ in tr.iter[:6]:
                model.resid_post[1] = model.resid_post[1] + evil.direction(site)
        with tr.invoke():
            ids = tr.result.save()
    with model.steer(pv.Add(evil, coeff=1.0, layers=[site], span="all")):
        wanted = model.generate_ids(chat, **settings)[0]
    assert torch.equal(ids[0, -6:], wanted)
    assert not torch.equal(ids, plain)
    assert torch.equal(plain[0, -6:], model.generate_ids(chat, **settings)[0])


def test_a_patch_without_iter_acts_on_the_first_step_only() -> None:
    model, delta, fired = subject("qwen2").model, direction(), []
    with torch.no_grad():
        with model.trace(TEXTS[0], fn="generate", max_new_tokens=4) as tr:
            model.resid_post[1] = model.resid_post[1] + delta
            fired.append(1)
        with model.trace(fn="generate", max_new_tokens=4) as tr:
            with tr.invoke(TEXTS[0]):
                for _ in tr.iter[:4]:
                    model.resid_post[1] = model.resid_post[1] + delta
                    fired.append(4)
    assert fired == [1, 4, 4, 4, 4]


def test_a_family_without_resid_mid_says_so() -> None:
    model = subject("phi").model
    with pytest.raises(SiteError, match="in parallel"):
        with model.trace(TEXTS[0]):
            model.resid_mid[0].save()
