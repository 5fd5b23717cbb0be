"""Trace, taps and TransformerLens give the same residuals and the same steered tokens on one plan.

The three share no code: taps are torch hooks, a trace is nnsight's, a bridge rebuilds the model.
"""
# ruff: noqa: SIM117 - nnsight reads the blocks from this file: each trace is a `with` of its own

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import pvcore as pv
from pvcore import lens
from tests.families import D_MODEL, N_LAYERS
from tests.subjects import prompts, subject, trio, vector

NAMES = ("qwen2", "llama", "gpt2", "gemma2", "gpt_neox", "gpt_neox_sequential")
NEW = 12
SETTINGS = {"max_new_tokens": NEW, "do_sample": False}


@cache
def bridge(name: str) -> Any:
    model = subject(name).model
    return lens.boot(model.hf, model.tokenizer)


def sites(name: str) -> list[pv.Site]:
    return sorted(subject(name).sites)


def prompt() -> Tensor:
    return prompts([9])[0]


def by_taps(name: str, act: Sequence[pv.Add]) -> Tensor:
    """`[site, pos, d_model]`."""
    model = subject(name).model

    def read() -> Tensor:
        values = model.read(prompt(), sites=sites(name), span="all", reduce="none").values
        assert values is not None
        return values[:, 0]

    if not act:
        return read()
    with model.steer(*act):
        return read()


def by_trace(name: str, act: Sequence[pv.Add]) -> Tensor:
    model = subject(name).model
    with torch.no_grad():
        with model.trace(prompt()):
            rows = []
            for site in sites(name):
                stream = getattr(model, site.kind)
                if any(site in add.sites for add in act):
                    stream[site.layer] = stream[site.layer] + delta(act, site)
                rows.append(stream[site.layer][0].clone())
            rows.save()
    return torch.stack(rows)


def by_lens(name: str, act: Sequence[pv.Add]) -> Tensor:
    kept: dict[pv.Site, Tensor] = {}

    def hook(site: pv.Site) -> Callable[..., Tensor]:
        def run(h: Tensor, hook: Any) -> Tensor:
            moved = h + delta(act, site)
            kept[site] = moved[0].clone()
            return moved

        return run

    hooks = [(lens.to_hook_name(site), hook(site)) for site in sites(name)]
    with torch.no_grad():
        bridge(name).run_with_hooks(prompt()[None], fwd_hooks=hooks)
    return torch.stack([kept[site] for site in sites(name)])


def delta(act: Sequence[pv.Add], site: pv.Site) -> Tensor:
    """What a plan's additions at a site come to."""
    total = torch.zeros(D_MODEL)
    for add in act:
        if site in add.sites:
            coeff = add.coeff.at(site.layer)
            assert isinstance(coeff, float)
            total = total + coeff * add.vectors[0].direction(site)
    return total


def plans() -> dict[str, list[pv.Add]]:
    """Raw additions at every token, at one layer and at all."""
    everywhere = [pv.resid_post(layer) for layer in range(N_LAYERS)]
    one = vector("evil", [pv.resid_post(1)], seed=3, scale=0.1)
    return {
        "one layer": [pv.Add(one, coeff=2.0, span="all")],
        "all layers": [
            pv.Add(vector("evil", everywhere, seed=3, scale=0.1), coeff=1.5, span="all"),
            pv.Add(trio(*everywhere)[1], coeff={0: -0.5, 1: 1.0, 2: 0.25}, span="all"),
        ],
    }


@pytest.mark.parametrize("plan", [None, *plans()])
@pytest.mark.parametrize("name", NAMES)
def test_residuals_agree_at_every_site(name: str, plan: str | None) -> None:
    act = plans()[plan] if plan else []
    taps, trace, other = (way(name, act) for way in (by_taps, by_trace, by_lens))
    assert torch.equal(taps, trace)
    torch.testing.assert_close(other, taps, atol=1e-5, rtol=0)
    kinds = {site.kind for site in sites(name)}
    assert ("resid_mid" in kinds) == (name != "gpt_neox")
    clean = by_taps(name, [])
    moved = (taps - clean).abs().amax(dim=(1, 2))
    for site, distance in zip(sites(name), moved.tolist(), strict=True):
        reached = any(site >= first for add in act for first in add.sites)
        assert (distance > 1e-2) == reached, site


@pytest.mark.parametrize("plan", plans())
@pytest.mark.parametrize("name", NAMES)
def test_steered_greedy_tokens_agree(name: str, plan: str) -> None:
    model, act, ids = subject(name).model, plans()[plan], prompt()
    with model.steer(*act):
        taps = model.generate_ids(ids, **SETTINGS)[0]

    with torch.no_grad():
        with model.trace(fn="generate", **SETTINGS) as tr:
            with tr.invoke(ids):
                for _ in tr.iter[:NEW]:
                    for layer in range(N_LAYERS):
                        moved = model.resid_post[layer] + delta(act, pv.resid_post(layer))
                        model.resid_post[layer] = moved
            with tr.invoke():
                out = tr.result.save()

    def hook(site: pv.Site) -> Callable[..., Tensor]:
        return lambda h, hook: h + delta(act, site)

    posts = [pv.resid_post(layer) for layer in range(N_LAYERS)]
    hooks = [(lens.to_hook_name(site), hook(site)) for site in posts]
    with torch.no_grad(), bridge(name).hooks(fwd_hooks=hooks):
        other = bridge(name).generate(
            ids[None],
            return_type="tokens",
            verbose=False,
            stop_at_eos=False,
            **SETTINGS,
        )
    assert torch.equal(taps, out[0, len(ids) :])
    assert torch.equal(taps, other[0, len(ids) :])
    assert not torch.equal(taps, model.generate_ids(ids, **SETTINGS)[0])
    assert len(taps.unique()) > 1
