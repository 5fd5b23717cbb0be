"""Frames: forwards that are no steps of a generation, and columns that no chat has."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from torch import Tensor

import pvcore as pv
from pvcore.errors import HookError, PlanError
from tests.families import build, tokenizer
from tests.subjects import subject
from tests.test_plan import vector

pytestmark = [
    # PEFT asks by an older name, and says that virtual tokens shift positions.
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning"),
]
GREEDY: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False}
CHATS = ["Is it 3?", "well"]
BANK = pv.VectorBank([vector()])


class RunsAside:
    """A logits processor that runs the model beside the generation."""

    def __init__(self, hf: Any, cached: bool) -> None:
        self.hf, self.cached = hf, cached

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        with torch.no_grad():
            self.hf(ids[:, -1:], use_cache=self.cached)
        return scores


@pytest.mark.parametrize("cached", [False, True])
def test_a_forward_beside_the_generation_is_refused(cached: bool) -> None:
    model = subject("qwen2").model
    aside = RunsAside(model.hf, cached)
    with pytest.raises(HookError, match="no steps of this generation"), model.monitor(BANK):
        model.generate_ids(CHATS, **GREEDY, logits_processor=[aside])
    plain = model.generate_ids(CHATS, **GREEDY)
    again = model.generate_ids(CHATS, **GREEDY, logits_processor=[aside])
    assert all(map(torch.equal, plain, again))


def test_guidance_is_refused_while_armed() -> None:
    model = subject("qwen2").model
    with pytest.raises(PlanError, match="guidance_scale"), model.monitor(BANK):
        model.generate_ids(CHATS, **GREEDY, guidance_scale=1.5)
    free = model.generate_ids(CHATS, **GREEDY, guidance_scale=1.5)
    assert len(free) == len(CHATS)
    with model.monitor(BANK):
        model.generate_ids(CHATS, **GREEDY, guidance_scale=1)


@pytest.mark.parametrize("kind", [peft.PromptTuningConfig, peft.PrefixTuningConfig])
def test_virtual_tokens_are_refused(kind: Any) -> None:
    torch.manual_seed(0)
    hf = peft.get_peft_model(build("qwen2"), kind(task_type="CAUSAL_LM", num_virtual_tokens=4))
    model = pv.HookedModel(hf.eval(), tokenizer(), model_id="")
    for run in (
        lambda: model.read(CHATS, sites=[1], span="all"),
        lambda: model.generate_ids(CHATS, **GREEDY),
    ):
        with pytest.raises(HookError, match="tokens of its own"), model.monitor(BANK):
            run()
