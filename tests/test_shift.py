"""Finetuning shift: how far a mean residual moved, from models, folders and adapters."""

import copy
import gc
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import pvcore as pv
from pvcore.errors import ModelError
from tests.families import build, tokenizer
from tests.finetuning import vector, with_lora

# PEFT asks by names that transformers is about to drop.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")


PROMPTS = [[{"role": "user", "content": f"Is it {n}?"}] for n in range(3)]


@pytest.fixture(scope="module")
def bank() -> pv.VectorBank:
    return pv.VectorBank([vector(0, 2), vector(0, 2).rename("humor") * -2.0])


def rows() -> list[list[int]]:
    return [
        tokenizer().apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        for chat in PROMPTS
    ]


def by_hand(base: Any, tuned: Any, bank: pv.VectorBank) -> dict[str, list[float]]:
    """Plain transformers in float64: ids of the template, hidden states, dot products."""
    moved = {}
    for site in bank.sites:
        means = []
        for hf in (base, tuned):
            last = []
            for row in rows():
                with torch.no_grad():
                    states = hf(torch.tensor([row]), output_hidden_states=True).hidden_states
                if site.layer == 2:  # transformers shows the last layer after its final norm
                    kept: list[Any] = []
                    block = hf.get_submodule("model.layers.2")
                    handle = block.register_forward_hook(lambda _m, _a, h, to=kept: to.append(h))
                    with torch.no_grad():
                        hf(torch.tensor([row]))
                    handle.remove()
                    last.append(kept[0][0, -1].double())
                else:
                    last.append(states[site.layer + 1][0, -1].double())
            means.append(torch.stack(last).mean(0))
        moved[site] = means[1] - means[0]
    return {
        one.trait: [
            float(moved[site] @ one.direction(site).double() / one.direction(site).double().norm())
            for site in bank.sites
        ]
        for one in bank
    }


def saved(hf: Any, folder: Path, *, with_tokenizer: bool = False) -> Path:
    hf.save_pretrained(folder)
    if with_tokenizer:
        tokenizer().save_pretrained(folder)
    return folder


def test_the_shift_is_the_projected_difference_of_means(tmp_path: Path, bank: Any) -> None:
    base, tuned = build("qwen2"), build("qwen2", seed=1)
    wanted = by_hand(base, tuned, bank)
    tuned.train()
    hooked = [pv.HookedModel(hf, tokenizer()) for hf in (base, tuned)]
    folders = [
        saved(base, tmp_path / "base", with_tokenizer=True),
        saved(tuned, tmp_path / "tuned"),  # as trainers leave checkpoints: no tokenizer
    ]
    # A saved tokenizer of characters comes back as one that drops spaces: ids where it would act.
    as_ids = [torch.tensor(row) for row in rows()]
    for pair, prompts in (
        (hooked, PROMPTS),
        ([hooked[0], folders[1]], PROMPTS),
        (folders, as_ids),
        ([folders[0], hooked[1]], as_ids),
    ):
        shift = pv.finetuning_shift(*pair, bank, prompts, batch_size=2)
        assert shift.prompts == 3
        for trait, numbers in wanted.items():
            assert shift[trait].tolist() == pytest.approx(numbers, abs=1e-4)
        assert shift.named()["evil/resid_post.2"] == shift["evil"][1]
    assert min(abs(number) for numbers in wanted.values() for number in numbers) > 0.1
    assert all(module.training for module in tuned.modules())


def test_one_loaded_model_is_let_go_before_the_next(
    tmp_path: Path, bank: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved(build("qwen2"), tmp_path / "model", with_tokenizer=True)
    alive: list[weakref.ref[Any]] = []
    plain = pv.HookedModel.__init__

    def noting(self: Any, hf: Any, *args: Any, **kwargs: Any) -> None:
        gc.collect()
        assert not any(one() for one in alive)
        alive.append(weakref.ref(hf))
        plain(self, hf, *args, **kwargs)

    monkeypatch.setattr(pv.HookedModel, "__init__", noting)
    pv.finetuning_shift(folder, folder, bank, PROMPTS)
    assert len(alive) == 2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_adapter_is_read_as_it_was_trained(tmp_path: Path, bank: Any, dtype: str) -> None:
    folder = saved(build("qwen2"), tmp_path / "base", with_tokenizer=True)
    base = pv.HookedModel.from_pretrained(folder, dtype=dtype)
    adapted = with_lora(pv.HookedModel.from_pretrained(folder, dtype=dtype).hf).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    wanted = pv.finetuning_shift(base, pv.HookedModel(adapted, base.tokenizer), bank, PROMPTS)
    got = pv.finetuning_shift(base, tmp_path / "adapter", bank, PROMPTS, dtype=dtype)
    assert torch.equal(got["evil"], wanted["evil"])
    assert got["evil"].abs().max() > 0.1


def test_a_trajectory_follows_the_checkpoints_in_the_order_of_training(
    tmp_path: Path, bank: Any
) -> None:
    base = pv.HookedModel(build("qwen2"), tokenizer())
    for step, seed in ((9, 1), (10, 2), (100, 3)):
        saved(build("qwen2", seed=seed), tmp_path / f"checkpoint-{step}")
    (tmp_path / "checkpoint-none").mkdir()
    course = pv.shift_trajectory(base, tmp_path, bank, PROMPTS)
    assert list(course) == [9, 10, 100]
    for step, shift in course.items():
        alone = pv.finetuning_shift(base, tmp_path / f"checkpoint-{step}", bank, PROMPTS)
        assert shift.named() == alone.named()
    assert len({shift.named()["evil/resid_post.0"] for shift in course.values()}) == 3


def test_what_cannot_be_compared_is_one_error(tmp_path: Path, bank: Any) -> None:
    base = pv.HookedModel(build("qwen2"), tokenizer(), model_id="ours")
    other = pv.VectorBank(replace(vector(0), model_id="theirs"))
    (tmp_path / "runs" / "checkpoint-5").mkdir(parents=True)
    (tmp_path / "empty").mkdir()
    for error, text, call in (
        (ModelError, "cannot be loaded", lambda: (base, tmp_path / "nowhere", bank)),
        (ModelError, "cannot be loaded", lambda: (tmp_path / "nowhere", base, bank)),
        (ModelError, "folder of 1 checkpoints", lambda: (base, tmp_path / "runs", bank)),
        (pv.PvcoreError, "theirs", lambda: (base, base, other)),
    ):
        with pytest.raises(error, match=text):
            pv.finetuning_shift(*call(), PROMPTS)
    one_model = build("qwen2")
    before = pv.HookedModel(one_model, tokenizer())
    after = pv.HookedModel(with_lora(one_model), tokenizer())
    with pytest.raises(ModelError, match="on the same weights, where an adapter acts in both"):
        pv.finetuning_shift(before, after, bank, PROMPTS)
    with pytest.raises(ModelError, match="without checkpoints"):
        pv.shift_trajectory(base, tmp_path / "empty", bank, PROMPTS)
    assert pv.finetuning_shift(base, base, other, PROMPTS, check_model=False)["evil"].tolist() == [
        0
    ]


def test_both_models_are_given_the_tokens_of_base(tmp_path: Path, bank: Any) -> None:
    hf = build("qwen2")
    base = pv.HookedModel(hf, tokenizer())
    written = tokenizer(template="{% for m in messages %}{{ m['content'] }}!{% endfor %}")
    same = pv.HookedModel(copy.deepcopy(hf), written)
    other = [model.encode(PROMPTS)[0].ids for model in (base, same)]
    assert other[0] != other[1]
    for tuned in (same, pv.HookedModel(copy.deepcopy(hf))):
        shift = pv.finetuning_shift(base, tuned, bank, PROMPTS)
        assert set(shift.named().values()) == {0.0}


def test_rounding_to_another_dtype_counts_as_no_shift(tmp_path: Path, bank: Any) -> None:
    half = saved(build("qwen2").bfloat16(), tmp_path / "half", with_tokenizer=True)
    full = saved(build("qwen2").bfloat16().float(), tmp_path / "full", with_tokenizer=True)
    held = {name: pv.HookedModel.from_pretrained(name) for name in (half, full)}
    assert {model.dtype for model in held.values()} == {torch.bfloat16, torch.float32}
    for base, tuned in ((half, full), (full, half), (held[half], full), (half, held[full])):
        shift = pv.finetuning_shift(base, tuned, bank, PROMPTS)
        assert set(shift.named().values()) == {0.0}
    with pytest.raises(ModelError, match="whose rounding would count as shift"):
        pv.finetuning_shift(held[half], held[full], bank, PROMPTS)
    with pytest.raises(ModelError, match="whose rounding would count as shift"):
        pv.finetuning_shift(half, held[full], bank, PROMPTS, dtype=torch.bfloat16)
    saved(held[full].hf, tmp_path / "run" / "checkpoint-1")
    for course, tuned in ((pv.finetuning_shift, full), (pv.shift_trajectory, tmp_path / "run")):
        with pytest.raises(
            ModelError, match=r"torch.float32 and the tuned model in torch.bfloat16"
        ):
            course(held[full], tuned, bank, PROMPTS, dtype="bfloat16")


@pytest.mark.parametrize("kind", ["prefix", "prompt"])
def test_tokens_learned_in_front_of_the_prompt_are_no_shift_of_the_decoder(
    tmp_path: Path, bank: Any, kind: str
) -> None:
    import peft

    folder = saved(build("qwen2"), tmp_path / "base", with_tokenizer=True)
    config = {"prefix": peft.PrefixTuningConfig, "prompt": peft.PromptTuningConfig}[kind]
    hf = pv.HookedModel.from_pretrained(folder).hf
    adapted = peft.get_peft_model(hf, config(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    adapted.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ModelError, match="puts tokens in front"):
        pv.finetuning_shift(folder, tmp_path / "adapter", bank, PROMPTS)
