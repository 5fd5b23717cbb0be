"""Taps: put on once, and anew where a decoder's blocks are others than they were."""

from __future__ import annotations

import torch
from torch import nn

import pvcore as pv
from pvcore.lanes import has_lane
from tests.families import build

IDS = torch.tensor([[5, 9, 3, 12]])


def outputs(hf: nn.Module, layer: int) -> torch.Tensor:
    kept: list[torch.Tensor] = []
    handle = hf.get_submodule("model.layers")[layer].register_forward_hook(
        lambda _module, _args, output: kept.append(output)
    )
    with torch.no_grad():
        hf(IDS, use_cache=False)
    handle.remove()
    return kept[0]


def test_a_model_that_lost_a_block_is_tapped_anew() -> None:
    hf = build("qwen2")
    first = pv.HookedModel(hf)
    before = outputs(hf, 1)
    hf.model.layers = nn.ModuleList(list(hf.model.layers)[1:])
    hf.config.num_hidden_layers -= 1
    for layer, block in enumerate(hf.model.layers):
        block.self_attn.layer_idx = layer
    second = pv.HookedModel(hf)
    assert second._taps is not first._taps
    assert second.n_layers == first.n_layers - 1
    wanted = outputs(hf, 0)
    mean = second.read([IDS[0]], sites=[pv.resid_post(0)], span="all").values[0, 0]
    torch.testing.assert_close(mean, wanted[0].mean(0))
    assert not torch.allclose(wanted, before)
    assert all(len(block._forward_hooks) == 1 for block in hf.model.layers)


def test_hooks_that_somebody_cleared_are_put_on_again() -> None:
    hf = build("qwen2")
    pv.HookedModel(hf)
    for block in hf.model.layers:
        block._forward_hooks.clear()
    model = pv.HookedModel(hf)
    mean = model.read([IDS[0]], sites=[pv.resid_post(1)], span="all").values[0, 0]
    torch.testing.assert_close(mean, outputs(hf, 1)[0].mean(0))
    assert all(map(has_lane, hf.model.layers))


def test_the_same_blocks_keep_their_taps() -> None:
    hf = build("qwen2")
    assert pv.HookedModel(hf)._taps is pv.HookedModel(hf)._taps


def test_no_lanes_where_replicas_would_share_them(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    hf = build("qwen2")
    model = pv.HookedModel(hf)
    assert not any(map(has_lane, hf.modules()))
    mean = model.read([IDS[0]], sites=[pv.resid_post(1)], span="all").values[0, 0]
    torch.testing.assert_close(mean, outputs(hf, 1)[0].mean(0))
