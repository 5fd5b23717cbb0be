"""Models without attention: their state does not say how many tokens it has seen."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import pytest
import torch
import transformers
from torch import Tensor

import pvcore as pv

LAYERS, WIDTH, NEW, COEFF = 3, 32, 5, 1.5
EXACTLY = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}


@cache
def model() -> pv.HookedModel:
    torch.manual_seed(1)
    config = transformers.MambaConfig(
        vocab_size=64,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    hf = transformers.MambaForCausalLM(config).eval()
    for weight in hf.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.2)
    return pv.HookedModel(hf)


def vector() -> pv.PersonaVector:
    directions = torch.randn(LAYERS, WIDTH, generator=torch.Generator().manual_seed(2))
    sites = [pv.resid_post(layer) for layer in range(LAYERS)]
    return pv.PersonaVector(trait="evil", sites=sites, directions=directions, model_id="")


def prompt() -> Tensor:
    return torch.randint(3, 64, (7,), generator=torch.Generator().manual_seed(3))


@contextmanager
def newest_rows(layer: int, delta: Tensor) -> Iterator[list[Tensor]]:
    """A raw hook that adds `delta` to each newest row of a block's output, and keeps the row."""
    rows: list[Tensor] = []

    def hook(_module: object, _args: object, output: Tensor) -> Tensor:
        moved = output.clone()
        moved[:, -1] += delta
        rows.append(moved[:, -1].clone())
        return moved

    handle = model().hf.backbone.layers[layer].register_forward_hook(hook)
    try:
        yield rows
    finally:
        handle.remove()


def generated() -> Tensor:
    ids = prompt()[None]
    with torch.no_grad():
        output: Tensor = model().hf.generate(ids, attention_mask=torch.ones_like(ids), **EXACTLY)
    return output[0, ids.shape[1] :]


def test_a_generation_is_steered_and_watched_at_every_token():
    found, one = vector(), pv.resid_post(1)
    with newest_rows(1, COEFF * found.direction(one)) as rows:
        wanted = generated()
    with (
        model().steer(pv.Add(found, coeff=COEFF, layers=[1])),
        model().monitor(pv.VectorBank([found])) as seen,
    ):
        tokens = model().generate_ids([prompt()], **EXACTLY)[0]
    unit = found.direction(one) / found.direction(one).norm()
    assert torch.equal(tokens, wanted)
    assert not torch.equal(tokens, generated())
    assert torch.allclose(seen["evil"].steps[:, 1, 0], torch.cat(rows) @ unit, atol=1e-5)


def test_a_generation_that_transformers_started_is_steered_alike():
    with newest_rows(1, COEFF * vector().direction(pv.resid_post(1))):
        wanted = generated()
    with model().steer(pv.Add(vector(), coeff=COEFF, layers=[1])):
        assert torch.equal(generated(), wanted)


def test_a_prompt_alone_is_not_the_reply():
    with model().steer(pv.Add(vector(), coeff=COEFF, layers=[1], span="last_prompt_token")):
        first = model().generate_ids([prompt()], **EXACTLY)[0]
    with model().steer(pv.Add(vector(), coeff=COEFF, layers=[1])):
        every = model().generate_ids([prompt()], **EXACTLY)[0]
    assert int(first[0]) == int(every[0])
    assert not torch.equal(first, every)


def test_a_state_filled_elsewhere_is_refused():
    ids = prompt()[None]
    with torch.no_grad():
        state = model().hf(ids, use_cache=True).cache_params
        with (
            pytest.raises(pv.PvcoreError, match="how many tokens it has seen"),
            model().steer(pv.Add(vector(), coeff=COEFF, layers=[1], span="all")),
        ):
            model().hf(ids[:, -1:], cache_params=state, use_cache=True)
