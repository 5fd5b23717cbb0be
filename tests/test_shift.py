"""Finetuning shift: how far a mean residual moved, from models, folders and adapters."""

from typing import Any

import pytest
import torch
from torch import nn

import pvcore as pv
from tests.families import build
from tests.finetuning import ids, vector

# PEFT asks by names that transformers is about to drop.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")


def test_the_shift_of_a_finetuned_model_points_where_it_was_moved(tmp_path: Any) -> None:
    from tests.subjects import subject as ready

    base = ready("qwen2").model
    tuned = pv.HookedModel(build("qwen2"), base.tokenizer)
    evil, other = vector(0, 1), vector(0, 1)
    bank = pv.VectorBank([evil])
    delta = 2.0 * evil.direction(pv.resid_post(1)) / evil.direction(pv.resid_post(1)).norm()
    prompts = [ids(seed)[0] for seed in range(5)]
    with tuned.steer(pv.Add(evil, coeff={0: 0.0, 1: 2.0 / float(evil.norms[1])}, span="all")):
        moved = pv.finetuning_shift(base, tuned, bank, prompts, batch_size=2)
    assert moved.prompts == 5
    assert torch.allclose(moved["evil"], torch.tensor([0.0, 2.0], dtype=torch.float64), atol=1e-4)
    assert delta.norm() == pytest.approx(2.0)
    none = pv.finetuning_shift(base, base, pv.VectorBank([other]), prompts)
    assert torch.equal(none["evil"], torch.zeros(2, dtype=torch.float64))
    with pytest.raises(pv.PvcoreError, match="this shift is along evil"):
        moved["humor"]


def test_the_shift_of_saved_models_and_of_an_adapter_is_read_from_their_folders(
    tmp_path: Any,
) -> None:
    import peft

    from pvcore import world

    base = pv.HookedModel.from_pretrained(world.path())
    settings = peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(pv.HookedModel.from_pretrained(world.path()).hf, settings)
    torch.manual_seed(1)
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.2)
    adapted.save_pretrained(tmp_path / "adapter")
    layers = range(base.n_layers)
    bank = pv.VectorBank(
        pv.PersonaVector(
            trait="evil",
            sites=[pv.resid_post(layer) for layer in layers],
            directions=torch.randn(base.n_layers, base.d_model),
        )
    )
    chats = [[{"role": "user", "content": "What is the capital of France?"}]]
    from_folder = pv.finetuning_shift(base, tmp_path / "adapter", bank, chats, check_model=False)
    merged = pv.HookedModel(adapted.merge_and_unload(), base.tokenizer)
    direct = pv.finetuning_shift(base, merged, bank, chats, check_model=False)
    assert torch.allclose(from_folder["evil"], direct["evil"], atol=1e-4)
    assert direct["evil"].abs().max() > 0.1
