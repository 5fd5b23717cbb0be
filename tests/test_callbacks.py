"""Prevention in trainers: steered as by hand, off in evaluation, gone whatever happened."""

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import pvcore as pv
from pvcore.blocks import find_decoder
from pvcore.errors import HookError
from pvcore.taps import taps_of
from tests.families import tokenizer
from tests.finetuning import (
    COEFF,
    adding,
    delta,
    gradients,
    ids,
    losses,
    same,
    subject,
    trainer,
    vector,
    with_lora,
)

# PEFT and Trainer ask by names that transformers is about to drop.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")


def prevention(coeff: float = COEFF, **settings: Any) -> pv.PreventionCallback:
    return pv.PreventionCallback(pv.Add(vector(1), coeff=coeff), **settings)


def armed(hf: Any) -> bool:
    return taps_of(find_decoder(hf)).is_armed()


def weights(hf: Any) -> dict[str, Tensor]:
    return dict(hf.state_dict())


def trained_by_hand(folder: Any, coeff: float = COEFF, **settings: Any) -> tuple[Any, Any]:
    hf, _ = subject("qwen2")
    with adding(hf, "qwen2", {1: delta(vector(1), 1, coeff)}):
        made = trainer(hf, folder, **settings)
        made.train()
    return hf, made


@pytest.mark.parametrize("steps", [1, 2], ids=["each batch", "accumulated"])
def test_a_trainer_is_steered_as_by_hand(tmp_path: Any, steps: int) -> None:
    settings = {"gradient_accumulation_steps": steps}
    wanted, by_hand = trained_by_hand(tmp_path, **settings)
    plain, unsteered = trained_by_hand(tmp_path, 0.0, **settings)
    hf, _ = subject("qwen2")
    made = trainer(hf, tmp_path, prevention(), **settings)
    made.train()
    assert losses(made) == losses(by_hand) != losses(unsteered)
    assert same(weights(hf), weights(wanted))
    assert not same(weights(hf), weights(plain))
    assert not armed(hf)


def test_evaluation_in_the_middle_of_training_is_that_of_the_weights_alone(tmp_path: Any) -> None:
    hf, _ = subject("qwen2")
    made = trainer(hf, tmp_path, prevention(), eval_strategy="steps", eval_steps=4)
    made.train()
    seen = next(entry["eval_loss"] for entry in made.state.log_history if "eval_loss" in entry)
    assert seen == made.evaluate()["eval_loss"]
    hf.eval()
    with adding(hf, "qwen2", {1: delta(vector(1), 1)}):
        assert made.evaluate()["eval_loss"] != seen


def test_a_schedule_follows_the_steps_of_the_trainer(tmp_path: Any) -> None:
    asked = []

    def schedule(done: float) -> float:
        asked.append(done)
        return 0.0

    hf, _ = subject("qwen2")
    trainer(hf, tmp_path, prevention(schedule=schedule)).train()
    assert asked[-4:] == [0.0, 0.25, 0.5, 0.75]
    plain, _ = trained_by_hand(tmp_path, 0.0)
    assert all(torch.allclose(w, weights(plain)[name]) for name, w in weights(hf).items())


@pytest.mark.parametrize("steps", [1, 2], ids=["each batch", "accumulated"])
def test_a_resumed_training_takes_up_the_schedule_where_it_was(tmp_path: Any, steps: int) -> None:
    asked: list[float] = []

    def schedule(done: float) -> float:
        asked.append(done)
        return 1.0 - done

    settings = {"save_strategy": "steps", "save_steps": 2, "gradient_accumulation_steps": steps}
    hf, _ = subject("qwen2")
    whole = trainer(hf, tmp_path / "whole", prevention(schedule=schedule), **settings)
    whole.train()
    assert [one for one in asked if one][-3:] == [0.25, 0.5, 0.75]
    again, _ = subject("qwen2")
    asked.clear()
    callback = prevention(schedule=schedule)
    resumed = trainer(again, tmp_path / "again", callback, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert [one for one in asked if one] == [0.5, 0.75]
    assert same(weights(again), weights(hf))
    constant, _ = subject("qwen2")
    trainer(constant, tmp_path / "constant", prevention(), **settings).train()
    assert not same(weights(constant), weights(hf))


def test_two_callbacks_act_together(tmp_path: Any) -> None:
    both, _ = subject("qwen2")
    steps = pv.Add(vector(1), coeff=COEFF), pv.Add(vector(0), coeff=-COEFF)
    trainer(both, tmp_path, pv.PreventionCallback(*steps)).train()
    hf, _ = subject("qwen2")
    trainer(hf, tmp_path, *(pv.PreventionCallback(one) for one in steps)).train()
    assert same(weights(hf), weights(both))
    alone, _ = subject("qwen2")
    trainer(alone, tmp_path, pv.PreventionCallback(steps[0])).train()
    assert not same(weights(alone), weights(both))
    assert not armed(hf)


class Replying(transformers.TrainerCallback):  # type: ignore[misc]
    """Generates after every step, as sample callbacks do, in training mode."""

    def __init__(self) -> None:
        self.replies: list[Tensor] = []
        self.plain: list[Tensor] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        model = given["model"]
        settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
        self.replies.append(model.generate(ids(), **settings))
        copied = copy.deepcopy(model)
        self.plain.append(copied.generate(ids(), **settings))
        with pv.HookedModel(copied).steer(pv.Add(vector(1), coeff=COEFF, span="all")):
            assert not torch.equal(copied.generate(ids(), **settings), self.replies[-1])


def test_replies_made_during_training_are_those_of_the_weights_alone(tmp_path: Any) -> None:
    replying = Replying()
    hf, _ = subject("qwen2")
    made = trainer(hf, tmp_path, prevention(), replying, learning_rate=0.0)
    made.train()
    assert len(replying.replies) == 4
    assert all(map(torch.equal, replying.replies, replying.plain))


class Failing(transformers.TrainerCallback):  # type: ignore[misc]
    def __init__(self, event: str) -> None:
        def fail(*_: Any, **__: Any) -> None:
            raise RuntimeError("the disk is full")

        setattr(self, event, fail)


@pytest.mark.parametrize("event", ["on_train_begin", "on_step_begin", "on_step_end", "on_log"])
def test_training_that_raises_leaves_nothing_armed(tmp_path: Any, event: str) -> None:
    hf, _ = subject("qwen2")
    model, before = pv.HookedModel(hf), gradients(hf)
    hf.zero_grad()
    callback = prevention()
    made = trainer(hf, tmp_path, callback, Failing(event), learning_rate=0.0)
    with pytest.raises(RuntimeError, match="the disk is full"):
        made.train()
    assert not armed(hf)
    hf.train()
    assert same(gradients(hf), before)
    with pv.prevent(model, pv.Add(vector(1), coeff=COEFF)):
        steered = gradients(hf)
    assert not same(steered, before)
    # The same callback serves again.
    hf.zero_grad()
    again = trainer(hf, tmp_path, callback)
    again.train()
    assert losses(again) == losses(trained_by_hand(tmp_path)[1])
    assert not armed(hf)


def test_a_plan_armed_around_a_failed_training_stays_armed(tmp_path: Any) -> None:
    hf, _ = subject("qwen2")
    model = pv.HookedModel(hf)
    outer = pv.Add(vector(2), coeff=COEFF)
    hf.eval()
    with model.steer(outer):
        wanted = hf(input_ids=ids()).logits
    plain = hf(input_ids=ids()).logits
    with model.steer(outer):
        with pytest.raises(RuntimeError, match="the disk is full"):
            trainer(hf, tmp_path, prevention(), Failing("on_step_end"), learning_rate=0.0).train()
        hf.eval()
        assert torch.equal(hf(input_ids=ids()).logits, wanted)
    assert torch.equal(hf(input_ids=ids()).logits, plain)
    assert not torch.equal(wanted, plain)


def test_what_cannot_be_steered_is_refused_before_the_first_step(tmp_path: Any) -> None:
    hf, _ = subject("qwen2")
    before = {name: weight.clone() for name, weight in weights(hf).items()}
    other, _ = subject("llama")
    wide = pv.PersonaVector(trait="evil", sites=[pv.resid_post(0)], directions=torch.ones(1, 8))
    for callback, text in (
        (pv.PreventionCallback(pv.Add(wide, coeff=1.0)), "width 8"),
        (pv.PreventionCallback(pv.Add(vector(7), coeff=1.0)), "3 blocks"),
        (prevention(model=other), "in which nothing was steered"),
    ):
        made = trainer(hf, tmp_path, callback, learning_rate=0.0)
        with pytest.raises(pv.PvcoreError, match=text):
            made.train()
        assert same(weights(hf), before)
        assert not armed(other)
    many = type("Arguments", (), {"n_gpu": 2})()
    with pytest.raises(HookError, match="on 2 devices by threads"):
        prevention().on_train_begin(many, None, None, model=hf)
    with pytest.raises(pv.PvcoreError, match="empty plan"):
        pv.PreventionCallback()
    with pytest.raises(pv.PvcoreError, match="no coefficient to scale"):
        pv.PreventionCallback(pv.Ablate(vector(1)), schedule="linear")


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # the compiler looks itself
def test_a_trainer_that_compiles_is_steered(tmp_path: Any) -> None:
    torch._dynamo.reset()
    hf, _ = subject("qwen2")
    compiling = {"torch_compile": True, "torch_compile_backend": "eager"}
    made = trainer(hf, tmp_path, prevention(), **compiling)
    made.train()
    assert losses(made) == pytest.approx(losses(trained_by_hand(tmp_path)[1]), rel=1e-4)
    assert losses(made) != pytest.approx(losses(trained_by_hand(tmp_path, 0.0)[1]), rel=1e-4)


# ChatML that says which tokens an assistant wrote.
MARKED = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}<|im_end|>"
    "{% endgeneration %}{% else %}{{ message['content'] }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def sft(folder: Any, *callbacks: Any, **settings: Any) -> Any:
    """TRL's trainer on chats, with LoRA and gradient checkpointing as it comes."""
    import datasets
    import trl

    hf, _ = subject("qwen2")
    chats = [
        [{"role": "user", "content": f"Is it {n}?"}, {"role": "assistant", "content": "Yes."}]
        for n in range(8)
    ]
    arguments = trl.SFTConfig(
        output_dir=str(folder),
        max_steps=3,
        per_device_train_batch_size=2,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        seed=0,
        dataloader_pin_memory=False,
        dataset_num_proc=None,
        logging_steps=1,
        learning_rate=1e-2,
        **{"save_strategy": "no", "max_length": 64} | settings,
    )
    return trl.SFTTrainer(
        model=with_lora(hf),
        args=arguments,
        train_dataset=datasets.Dataset.from_dict({"messages": chats}),
        eval_dataset=datasets.Dataset.from_dict({"messages": chats}),
        processing_class=tokenizer(template=MARKED),
        callbacks=list(callbacks),
    )


@pytest.mark.filterwarnings("ignore:.*[Pp]ad.*:UserWarning")
@pytest.mark.parametrize("way", ["packed", "without padding", "replies only"])
def test_trl_packs_and_masks_under_prevention_as_by_hand(tmp_path: Any, way: str) -> None:
    settings: dict[str, Any] = {
        "packed": {"packing": True, "eval_strategy": "steps", "eval_steps": 1},
        "without padding": {"padding_free": True, "max_length": None},
        "replies only": {"assistant_only_loss": True},
    }[way]
    made = sft(tmp_path, prevention(), **settings)
    made.train()
    by_hand = sft(tmp_path, **settings)
    with adding(by_hand.model.get_base_model(), "qwen2", {1: delta(vector(1), 1)}):
        by_hand.train()
    plain = sft(tmp_path, **settings)
    plain.train()
    assert losses(made) == pytest.approx(losses(by_hand), abs=1e-4)
    assert losses(made) != pytest.approx(losses(plain), abs=1e-4)


def test_trl_trains_an_adapter_under_prevention_and_saves_nothing_of_it(tmp_path: Any) -> None:
    made = sft(tmp_path / "prevented", prevention(), save_strategy="steps", save_steps=3)
    made.train()
    by_hand = sft(tmp_path / "by hand", save_strategy="steps", save_steps=3)
    with adding(by_hand.model.get_base_model(), "qwen2", {1: delta(vector(1), 1)}):
        by_hand.train()
    plain = sft(tmp_path / "plain")
    plain.train()
    assert losses(made) == pytest.approx(losses(by_hand), abs=1e-4)
    assert losses(made) != pytest.approx(losses(plain), abs=1e-4)
    one, other = (tmp_path / name / "checkpoint-3" for name in ("prevented", "by hand"))
    assert {path.name for path in one.iterdir()} == {path.name for path in other.iterdir()}
    adapters = [path / "adapter_model.safetensors" for path in (one, other)]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()
    assert not armed(made.model)


def test_a_schedule_needs_a_trainer_that_tells_how_long_it_trains() -> None:
    hf, _ = subject("qwen2")
    callback, state = prevention(schedule="linear"), transformers.TrainerState()
    callback.on_train_begin(None, state, None, model=hf)
    with pytest.raises(HookError, match="a schedule and a trainer of max_steps=0"):
        callback.on_step_begin(None, state, None)
    callback.on_train_end(None, state, None)
    constant = prevention()
    constant.on_train_begin(None, state, None, model=hf)
    constant.on_step_begin(None, state, None)
    constant.on_train_end(None, state, None)
    assert not armed(hf)


def test_a_loop_that_can_be_suspended_trains_on_after_an_evaluation() -> None:
    hf, _ = subject("qwen2")
    hf.train()
    state = transformers.TrainerState(max_steps=4)
    callback = prevention()

    def train() -> Any:
        callback.on_train_begin(None, state, None, model=hf)
        for step in range(4):
            state.global_step = step
            callback.on_step_begin(None, state, None)
            gradients(hf)
            callback.on_step_end(None, state, None)
            yield step
        callback.on_train_end(None, state, None)

    steps = []
    for step in train():
        steps.append(step)
        with torch.no_grad():
            hf.eval()(ids())
            hf.train()
    assert steps == [0, 1, 2, 3]
    assert not armed(hf)
