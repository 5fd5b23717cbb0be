"""Training: it learns, resumes to the same weights, and its own forward is the model's."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from pvcore import world
from pvcore.errors import ModelError
from pvcore.world import batches, tokenizer
from pvcore.world.manifest import check_files
from pvcore.world.noise import batch_loss, draw_noise, final_hidden
from pvcore.world.optimizers import Muon, orthogonalised, schedule
from pvcore.world.train import Recipe, build_model, train

TINY = Recipe(
    seed=3,
    steps=50,
    noise_steps=10,
    max_tokens=256,
    vocab_size=320,
    hidden_size=32,
    intermediate_size=64,
    n_layers=2,
    n_heads=2,
    n_key_value_heads=1,
)


class Stopped(Exception):
    pass


@pytest.fixture(autouse=True)
def _little_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "_N_CHATS", 100)
    monkeypatch.setattr(batches, "_POOL", 64)


def test_training_lowers_the_loss_and_resumes_to_the_same_weights(tmp_path: Path) -> None:
    straight = train(tmp_path / "straight", TINY)
    assert len(straight) == 60
    assert sum(straight[-5:]) < 0.85 * sum(straight[:5])

    def stop(step: int, loss: float) -> None:
        if step == 57:
            raise Stopped

    with pytest.raises(Stopped):
        train(tmp_path / "stopped", TINY, checkpoint_every=25, on_step=stop)
    assert not (tmp_path / "stopped" / "model.safetensors").exists()
    seen: list[int] = []
    resumed = train(tmp_path / "stopped", TINY, on_step=lambda step, loss: seen.append(step))
    assert seen == list(range(50, 60))
    assert resumed == straight
    first, second = (load_file(tmp_path / n / "model.safetensors") for n in ("straight", "stopped"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert {value.dtype for value in first.values()} == {torch.bfloat16}
    check_files(tmp_path / "straight")
    manifest = json.loads((tmp_path / "straight" / "manifest.json").read_text())
    assert manifest["recipe"]["seed"] == 3
    with pytest.raises(ModelError, match="another --out"):
        train(tmp_path / "stopped", replace(TINY, steps=51))


def test_a_changed_file_is_refused(tmp_path: Path) -> None:
    for file in world.path().iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    check_files(tmp_path)
    content = bytearray((tmp_path / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match=r"model\.safetensors .* SHA-256"):
        check_files(tmp_path)


def test_the_forward_under_noise_is_the_models_own_without_it() -> None:
    model = build_model(TINY).eval()
    ids = torch.randint(0, TINY.vocab_size, (3, 11))
    with torch.no_grad():
        own = model.model(input_ids=ids).last_hidden_state
        torch.testing.assert_close(final_hidden(model, ids, None), own)
        noise = draw_noise(3, TINY.hidden_size, TINY.n_layers, "test")
        assert not torch.allclose(final_hidden(model, ids, noise), own)
        silent = replace(noise, share=torch.zeros(3))
        torch.testing.assert_close(final_hidden(model, ids, silent), own)
    assert torch.equal(
        noise.directions, draw_noise(3, TINY.hidden_size, TINY.n_layers, "test").directions
    )
    torch.testing.assert_close(noise.directions.norm(dim=-1), torch.ones(3))


def test_loss_counts_learned_tokens_only() -> None:
    model = build_model(TINY).eval()
    ids = torch.randint(0, TINY.vocab_size, (2, 9))
    learned = torch.zeros(2, 9, dtype=torch.bool)
    learned[0, 4] = learned[1, 7] = True
    with torch.no_grad():
        scores = model(input_ids=ids).logits.log_softmax(-1)
        wanted = -(scores[0, 3, ids[0, 4]] + scores[1, 6, ids[1, 7]]) / 2
        torch.testing.assert_close(
            batch_loss(model, batches.Batch(ids=ids, learned=learned)), wanted
        )


def test_muon_follows_torchs_own_but_in_float32() -> None:
    torch.testing.assert_close(
        orthogonalised(torch.randn(6, 40)).norm(), torch.tensor(6**0.5), atol=0.6, rtol=0.0
    )
    weight = torch.randn(12, 20)
    ours, theirs = (nn.Parameter(weight.clone()) for _ in range(2))
    pair = (
        Muon([ours], lr=0.1),
        torch.optim.Muon([theirs], lr=0.1, momentum=0.95, weight_decay=0.01, ns_steps=5),
    )
    for _ in range(3):
        gradient = torch.randn(12, 20)
        for parameter, optimizer in zip((ours, theirs), pair, strict=True):
            parameter.grad = gradient.clone()
            optimizer.step()
    # torch iterates in bfloat16 (8 bits): each of 3 steps of lr .1 is good to about .1 * 2**-6.
    torch.testing.assert_close(ours, theirs, atol=3 * 0.1 * 2**-6, rtol=0.0)
    assert (ours - weight).abs().max() > 0.05


def test_schedule_warms_up_holds_decays_and_starts_a_lower_cycle() -> None:
    shares = [schedule(at, 1000, 200) for at in range(1200)]
    assert shares[0] < 0.05
    assert shares[100] == shares[500] == 1.0
    assert 0.02 <= shares[999] < 0.03
    assert shares[999] < max(shares[1000:]) < 0.6
    assert shares[1199] < 0.01
