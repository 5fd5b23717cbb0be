"""Prevention: every training forward is steered as by raw hooks, no other one is, nothing stays."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import pvcore as pv
from tests.families import FAMILIES, build

# PEFT and Trainer ask by names that transformers is about to drop.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
COEFF = 1.5
SIX = ("qwen2", "llama", "gemma2", "gpt2", "gpt_neox", "mistral")
CHECKPOINTING = {"off": None, "reentrant": True, "without reentry": False}


def vector(*layers: int) -> pv.PersonaVector:
    directions = torch.randn(len(layers), 64, generator=torch.Generator().manual_seed(5))
    sites = [pv.resid_post(layer) for layer in layers]
    return pv.PersonaVector(trait="evil", sites=sites, directions=directions, model_id="")


def ids(seed: int = 0) -> Tensor:
    return torch.randint(3, 128, (2, 9), generator=torch.Generator().manual_seed(seed))


def subject(name: str, checkpointing: str = "off", *, lora: bool = False) -> tuple[Any, Any]:
    """A model in training mode and what is called: the model, or PEFT's wrapper around it."""
    hf = build(name).train()
    called = hf
    if lora:
        import peft

        torch.manual_seed(3)
        settings = peft.LoraConfig(
            r=4,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
            fan_in_fan_out=name == "gpt2",
        )
        called = peft.get_peft_model(hf, settings)
        for weight_name, weight in called.named_parameters():
            if "lora_B" in weight_name:
                nn.init.normal_(weight, std=0.1)
    reentrant = CHECKPOINTING[checkpointing]
    if reentrant is not None:
        hf.gradient_checkpointing_enable({"use_reentrant": reentrant})
        hf.enable_input_require_grads()
    return hf, called


@contextmanager
def adding(hf: Any, name: str, deltas: dict[int, Tensor]) -> Iterator[None]:
    """The same by hand: blocks whose forward adds a constant."""
    blocks = hf.get_submodule(FAMILIES[name].blocks)

    def wrap(block: Any, delta: Tensor) -> Callable[..., Any]:
        plain = block.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            output = plain(*args, **kwargs)
            if isinstance(output, tuple):
                return ((output[0] + delta), *output[1:])
            return output + delta

        return forward

    for layer, delta in deltas.items():
        blocks[layer].forward = wrap(blocks[layer], delta)
    try:
        yield
    finally:
        for layer in deltas:
            del blocks[layer].forward


def gradients(called: Any, seed: int = 0) -> dict[str, Tensor]:
    called.zero_grad()
    called(input_ids=ids(seed), labels=ids(seed), use_cache=False).loss.backward()
    return {n: p.grad.clone() for n, p in called.named_parameters() if p.grad is not None}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


@pytest.mark.parametrize("lora", [False, True], ids=["all weights", "LoRA"])
@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("name", SIX)
def test_gradients_are_those_of_a_constant_added_by_hand(
    name: str, checkpointing: str, lora: bool
) -> None:
    hf, called = subject(name, checkpointing, lora=lora)
    evil = vector(0, 2)
    deltas = {layer: COEFF * evil.direction(pv.resid_post(layer)) for layer in (0, 2)}
    with adding(hf, name, deltas):
        wanted = gradients(called)
    plain = gradients(called)
    with pv.prevent(called, pv.Add(evil, coeff=COEFF)):
        got = gradients(called)
    assert same(got, wanted)
    assert not same(got, plain)
    assert same(gradients(called), plain)


def test_twenty_steps_follow_the_same_curve_and_end_at_the_same_weights() -> None:
    evil = vector(1)
    curves, weights = [], []
    for way in ("by hand", "prevent", "plain"):
        hf, _ = subject("qwen2")
        optimizer = torch.optim.AdamW(hf.parameters(), lr=1e-2)
        delta = {1: COEFF * evil.direction(pv.resid_post(1))}
        if way == "prevent":
            steering: Any = pv.prevent(hf, pv.Add(evil, coeff=COEFF))
        else:
            steering = adding(hf, "qwen2", delta if way == "by hand" else {})
        losses = []
        with steering:
            for step in range(20):
                loss = hf(input_ids=ids(step % 4), labels=ids(step % 4)).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.item())
        curves.append(losses)
        weights.append({name: p.detach().clone() for name, p in hf.state_dict().items()})
    assert curves[0] == curves[1]
    assert same(weights[0], weights[1])
    assert curves[1] != curves[2]
    assert curves[1][-1] < curves[1][0]


def test_only_forwards_that_train_are_steered() -> None:
    hf, _ = subject("qwen2")
    model = pv.HookedModel(hf)
    evil = vector(1)

    def logits() -> Tensor:
        output: Tensor = hf(input_ids=ids()).logits
        return output.detach()

    trained = logits()
    hf.eval()
    with torch.no_grad():
        plain = logits()
        reply = model.generate_ids([ids()[0]], max_new_tokens=4, do_sample=False)
    with pv.prevent(model, pv.Add(evil, coeff=COEFF)):
        hf.train()
        assert not torch.equal(logits(), trained)
        with torch.no_grad():
            assert torch.equal(logits(), trained)
        hf.eval()
        assert torch.equal(logits(), plain)
        again = model.generate_ids([ids()[0]], max_new_tokens=4, do_sample=False)
        graph = model.generate_ids([ids()[0]], max_new_tokens=4, do_sample=False, engine="graph")
    assert torch.equal(again[0], reply[0])
    assert torch.equal(graph[0], reply[0])


def test_ablation_while_training_is_that_of_raw_hooks() -> None:
    hf, _ = subject("llama")
    evil = vector(1)
    unit = evil.direction(pv.resid_post(1)) / evil.direction(pv.resid_post(1)).norm()
    hook = hf.model.layers[1].register_forward_hook(
        lambda _m, _a, h: h - (h @ unit)[..., None] * unit
    )
    wanted = gradients(hf)
    hook.remove()
    with pv.prevent(hf, pv.Ablate(evil)):
        got = gradients(hf)
    plain = gradients(hf)
    for name in wanted:
        assert torch.allclose(got[name], wanted[name], rtol=1e-4, atol=1e-6)
    assert not same(got, plain)


def test_a_schedule_scales_the_coefficient() -> None:
    hf, _ = subject("qwen2")
    evil = vector(1)
    add = pv.Add(evil, coeff={1: COEFF})
    with pv.prevent(hf, pv.Add(evil, coeff=COEFF / 2)):
        half = gradients(hf)
    with pv.prevent(hf, add, schedule=lambda done: 1 - done) as prevention:
        full = gradients(hf)
        prevention.advance(0.5)
        assert same(gradients(hf), half)
        prevention.advance(1.0)
        none = gradients(hf)
    assert not same(full, half)
    assert same(none, gradients(hf))
    with pytest.raises(pv.PvcoreError, match="wanted the share of the training"):
        prevention.advance(1.5)
    with (
        pytest.raises(pv.PvcoreError, match="no coefficient to scale"),
        pv.prevent(hf, pv.Ablate(evil), schedule=lambda done: done),
    ):
        pass


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # the compiler looks itself
def test_a_compiled_model_hooked_before_is_steered() -> None:
    torch._dynamo.reset()
    hf, _ = subject("qwen2")
    model, evil = pv.HookedModel(hf), vector(1)
    with pv.prevent(model, pv.Add(evil, coeff=COEFF)):
        wanted = gradients(hf)
    compiled = torch.compile(hf, backend="eager")
    plain = gradients(compiled)
    with pv.prevent(model, pv.Add(evil, coeff=COEFF)):
        got = gradients(compiled)
    bare = {name.removeprefix("_orig_mod."): one for name, one in got.items()}
    assert bare.keys() == wanted.keys()
    assert all(torch.allclose(bare[name], wanted[name], atol=1e-5) for name in wanted)
    assert not same(got, plain)


def test_what_does_not_fit_is_refused_before_anything_is_armed() -> None:
    hf, _ = subject("qwen2")
    plain = gradients(hf)
    wide = pv.PersonaVector(trait="evil", sites=[pv.resid_post(0)], directions=torch.ones(1, 8))
    for wrong, text in (
        (pv.Add(wide, coeff=1.0), "width 8"),
        (pv.Add(vector(7), coeff=1.0), "3 blocks"),
    ):
        with pytest.raises(pv.PvcoreError, match=text), pv.prevent(hf, wrong):
            pass
    with pytest.raises(pv.PvcoreError, match="empty plan"):
        pv.PreventionCallback()
    with pytest.raises(pv.PvcoreError, match="no forward"), pv.prevent(hf, pv.Ablate(vector(0))):
        pass
    assert same(gradients(hf), plain)


class Rows(torch.utils.data.Dataset):  # type: ignore[type-arg]
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = ids(index)[0]
        return {"input_ids": row, "labels": row}


def trainer(hf: Any, folder: Any, *callbacks: Any, **settings: Any) -> Any:
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=4,
        per_device_train_batch_size=2,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        seed=0,
        dataloader_pin_memory=False,
        **{"save_strategy": "no", "logging_steps": 1, "learning_rate": 1e-2} | settings,
    )
    return transformers.Trainer(
        model=hf,
        args=arguments,
        train_dataset=Rows(),
        eval_dataset=Rows(),
        callbacks=list(callbacks),
    )


def losses(made: Any) -> list[float]:
    return [entry["loss"] for entry in made.state.log_history if "loss" in entry]


def test_a_trainer_is_steered_by_the_callback_and_its_evaluation_is_not(tmp_path: Any) -> None:
    evil = vector(1)
    by_hand, _ = subject("qwen2")
    with adding(by_hand, "qwen2", {1: COEFF * evil.direction(pv.resid_post(1))}):
        first = trainer(by_hand, tmp_path)
        first.train()
    hf, _ = subject("qwen2")
    made = trainer(hf, tmp_path, pv.PreventionCallback(pv.Add(evil, coeff=COEFF)))
    made.train()
    assert losses(made) == losses(first)
    assert same(dict(hf.state_dict()), dict(by_hand.state_dict()))
    plain, _ = subject("qwen2")
    unsteered = trainer(plain, tmp_path)
    unsteered.train()
    assert losses(unsteered) != losses(made)
    # Evaluated in the middle of training: what the weights give without any steering.
    hf2, _ = subject("qwen2")
    watched = trainer(
        hf2,
        tmp_path,
        pv.PreventionCallback(pv.Add(evil, coeff=COEFF)),
        eval_strategy="steps",
        eval_steps=4,
    )
    watched.train()
    seen = next(e["eval_loss"] for e in watched.state.log_history if "eval_loss" in e)
    assert seen == pytest.approx(watched.evaluate()["eval_loss"], abs=1e-6)


def test_training_that_raises_leaves_later_training_unsteered(tmp_path: Any) -> None:
    class Failing(transformers.TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            raise RuntimeError("the disk is full")

    hf, _ = subject("qwen2")
    before = gradients(hf)
    hf.zero_grad()
    made = trainer(
        hf, tmp_path, pv.PreventionCallback(pv.Add(vector(1), coeff=COEFF)), Failing(),
        learning_rate=0.0,
    )  # fmt: skip
    with pytest.raises(RuntimeError, match="the disk is full"):
        made.train()
    assert same(gradients(hf), before)


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
