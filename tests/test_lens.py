"""TransformerLens: names go both ways, caches hold what was read, the model stays untouched."""

import subprocess
import sys
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import pvcore as pv
from pvcore import lens
from pvcore.errors import LensError
from pvcore.sites import KINDS
from tests.families import D_MODEL, VOCAB, build, tokenizer
from tests.subjects import NAMES, conversations, fresh, prompts, subject


@pytest.mark.parametrize("kind", KINDS)
def test_names_go_both_ways(kind: Any) -> None:
    site = pv.Site(kind, 20)
    assert lens.to_hook_name(site) == f"blocks.20.hook_{kind}"
    assert lens.from_hook_name(f"blocks.20.hook_{kind}") == site


def test_the_bridge_s_own_names_are_the_block_s_ends() -> None:
    assert lens.from_hook_name("blocks.3.hook_in") == pv.resid_pre(3)
    assert lens.from_hook_name("blocks.3.hook_out") == pv.resid_post(3)


@pytest.mark.parametrize(
    "name",
    [
        "blocks.3.attn.hook_out",
        "blocks.3.hook_mlp_out",
        "blocks.-1.hook_resid_post",
        "blocks.\u0663.hook_resid_post",
        "blocks.3.hook_resid_post\n",
        "ln_final.hook_out",
        "resid_post.3",
        "",
    ],
)
def test_other_hooks_are_no_sites(name: str) -> None:
    with pytest.raises(LensError, match="wanted one on the residual stream"):
        lens.from_hook_name(name)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_every_family_boots_on_a_copy_and_leaves_the_model_as_it_was(name: str) -> None:
    hf, own = build(name), tokenizer(padding_side="right")
    ids = torch.stack(prompts([6, 6]))
    config, settings, wanted = hf.config.to_dict(), dict(own.init_kwargs), hf(ids).logits
    weights = {key: value.clone() for key, value in hf.state_dict().items()}
    modules = [type(module) for module in hf.modules()]
    bridge = lens.boot(hf, own)
    logits = bridge(ids)
    torch.testing.assert_close(logits, wanted, atol=1e-5, rtol=0)
    assert logits.std() > 0.1
    for parameter in bridge.original_model.parameters():
        parameter.zero_()
    assert torch.equal(hf(ids).logits, wanted)
    assert [type(module) for module in hf.modules()] == modules
    assert hf.config.to_dict() == config
    assert (own.padding_side, dict(own.init_kwargs)) == ("right", settings)
    assert hf.state_dict().keys() == weights.keys()
    assert all(torch.equal(value, weights[key]) for key, value in hf.state_dict().items())


def test_a_bridge_of_a_tapped_model_does_not_fire_its_plans() -> None:
    model = fresh("qwen2").model
    bridge = lens.boot(model.hf, model.tokenizer)
    ids = prompts([5])[0][None]
    evil = pv.PersonaVector(
        trait="evil", sites=[pv.resid_post(0)], directions=torch.ones(1, D_MODEL)
    )
    with torch.no_grad():
        clean = bridge(ids)
        with model.steer(pv.Add(evil, coeff=3.0, span="all")):
            steered = bridge(ids)
            own = model.hf(ids).logits
    assert torch.equal(steered, clean)
    assert (own - clean).abs().max() > 1e-2


@torch.no_grad()
def test_a_cache_holds_what_was_read() -> None:
    model = subject("llama").model
    sites = [pv.resid_post(1), pv.resid_mid(0), pv.resid_post(2)]
    acts = model.read(conversations(), sites=sites, span="all", reduce="none")
    bridge = lens.boot(model.hf, model.tokenizer)
    cache = lens.activation_cache(acts, bridge=bridge)
    assert cache["resid_post", 1].shape == (3, int(acts.lengths.max()), D_MODEL)
    for site in sites:
        held = cache[site.kind, site.layer]
        torch.testing.assert_close(held, acts[site], atol=0, rtol=0, equal_nan=True)
    assert cache["resid_post", -1][0, 0].equal(acts[pv.resid_post(2)][0, 0])
    assert not cache["resid_post", 1][0, 0].equal(cache["resid_post", 2][0, 0])
    short = int(acts.lengths.argmin())
    assert cache["resid_mid", 0][short, int(acts.lengths[short]) :].isnan().all()
    assert lens.activation_cache(acts)["resid_mid", 0].shape[-1] == D_MODEL


@pytest.mark.parametrize("reduce", ["mean", "last", "moments"])
def test_a_cache_needs_a_position_axis(reduce: Any) -> None:
    model = subject("llama").model
    acts = model.read(conversations(), sites=[pv.resid_post(1)], reduce=reduce)
    with pytest.raises(LensError, match='read them with reduce="none"'):
        lens.activation_cache(acts)


def test_what_cannot_boot_is_one_typed_error() -> None:
    config = transformers.BioGptConfig(
        vocab_size=VOCAB, hidden_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    hf = transformers.BioGptForCausalLM(config)
    with pytest.raises(LensError, match="got a BioGptForCausalLM that TransformerLens cannot boot"):
        lens.boot(hf, tokenizer())
    with pytest.raises(LensError, match="got a Linear that"):
        lens.boot(nn.Linear(2, 2), tokenizer())
    with pytest.raises(LensError, match="got no tokenizer"):
        lens.boot(hf, None)


def test_transformer_lens_is_imported_only_when_it_is_used() -> None:
    code = (
        "import sys, pvcore, pvcore.lens\n"
        "assert pvcore.lens.to_hook_name(pvcore.resid_pre(0)) == 'blocks.0.hook_resid_pre'\n"
        "assert 'transformer_lens' not in sys.modules\n"
    )
    folders = f"import sys; sys.path[:0] = {sys.path!r}\n"
    subprocess.run([sys.executable, "-c", folders + code], check=True)
