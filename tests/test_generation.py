"""Generation: settings are those that transformers itself would use."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import GenerationConfig, Qwen2Config, Qwen2Model

import pvcore as pv
from pvcore.errors import ModelError
from tests.families import build, tokenizer
from tests.test_plan import vector

CHATS = ["Is it 3?", "well"]
BANK = pv.VectorBank([vector()])


def ending(extra: Any = None) -> tuple[pv.HookedModel, int, list[torch.Tensor]]:
    """A model whose own config ends a reply after a few tokens, and its replies without that."""
    hf = build("qwen2")
    model = pv.HookedModel(hf, tokenizer())
    free = model.generate_ids(CHATS, max_new_tokens=12, do_sample=False, eos_token_id=None)
    end = int(free[0][3])
    hf.generation_config.eos_token_id = end
    hf.generation_config.pad_token_id = 0
    return model, end, free


def test_a_config_without_its_own_end_ends_as_the_model_does() -> None:
    model, end, free = ending()
    config = GenerationConfig(max_new_tokens=12, do_sample=False)
    with model.monitor(BANK) as seen:
        ids = model.generate_ids(CHATS, generation_config=config)
    with model.monitor(BANK) as wanted:
        plain = model.generate_ids(CHATS, max_new_tokens=12, do_sample=False)
    assert all(map(torch.equal, ids, plain))
    first = free[0].tolist().index(end) + 1
    assert len(ids[0]) == first < 12
    assert torch.equal(seen["evil"].steps.isnan(), wanted["evil"].steps.isnan())
    assert seen["evil"].steps[first:, :, 0].isnan().all()
    steps = list(model.stream(CHATS, BANK, generation_config=config))
    assert all(step.projections["evil"][:, 0].isnan().all() for step in steps[first:])


def test_the_model_s_own_beams_count_under_another_config() -> None:
    model, _, _ = ending()
    model.hf.generation_config.num_beams = 2
    config = GenerationConfig(max_new_tokens=4, do_sample=False)
    with model.monitor(BANK) as seen:
        ids = model.generate_ids(CHATS, generation_config=config)
    assert len(ids) == 2
    assert seen["evil"].steps.shape[-1] == 2


def test_a_model_without_a_head_says_that_it_does_not_generate() -> None:
    config = Qwen2Config(
        vocab_size=128, hidden_size=64, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2,
    )  # fmt: skip
    model = pv.HookedModel(Qwen2Model(config).eval(), tokenizer(), model_id="")
    with pytest.raises(ModelError, match="no head to generate with"):
        model.generate_ids(CHATS, max_new_tokens=2)
    assert model.read(CHATS, sites=[pv.resid_post(1)], span="all").values.shape == (1, 2, 64)


@pytest.mark.parametrize("engine", ["eager", pv.Graph(backend="eager")], ids=["eager", "graph"])
def test_scores_seen_from_a_stopping_criterion_grow_with_the_reply(engine: Any) -> None:
    model = pv.HookedModel(build("qwen2"), tokenizer())
    lengths: list[int] = []
    newest: list[torch.Tensor] = []

    def look(ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        lengths.append(len(seen["evil"].steps))
        newest.append(seen.newest()[..., 0])
        return torch.zeros(len(ids), dtype=torch.bool)

    with model.monitor(BANK) as seen:
        model.generate_ids(
            CHATS, max_new_tokens=4, do_sample=False, stopping_criteria=[look], engine=engine
        )
    assert lengths == [1, 2, 3, 4]
    told = seen["evil"].steps
    for step, scores in enumerate(newest):
        known = ~told[step].isnan()
        assert torch.equal(scores[known], told[step][known])
    assert not torch.equal(newest[0], newest[3])


def test_autocast_rounds_the_model_and_not_the_projections() -> None:
    model = pv.HookedModel(build("qwen2"), tokenizer())
    rows: list[torch.Tensor] = []
    handle = model.hf.model.layers[1].register_forward_hook(
        lambda _module, _args, output: rows.append(output.detach().double())
    )
    ids = torch.tensor([[5, 9, 3, 12]])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        with model.monitor(pv.VectorBank([vector()], layers=[1])) as seen:
            model.hf(ids)
        with model.steer(pv.Ablate(vector(), layers=[1])):
            model.hf(ids)
    handle.remove()
    unit = vector().direction(pv.resid_post(1)).double()
    unit /= unit.norm()
    scores = seen["evil"].prompt[:, 0, 0]
    torch.testing.assert_close(scores.double(), rows[0][0] @ unit, rtol=1e-5, atol=1e-5)
    assert float((rows[1][0] @ unit).abs().max()) < 1e-5 * float(rows[1][0].norm(dim=-1).max())
    assert float((rows[0][0] @ unit).abs().min()) > 1e-3
