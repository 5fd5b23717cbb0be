"""The shift while training: the last step's own, logged, and training goes on as without."""

from typing import Any

import pytest
import torch
import transformers

import pvcore as pv
from pvcore.errors import HookError
from tests.families import tokenizer
from tests.finetuning import ids, losses, subject, trainer, vector
from tests.test_callbacks import prevention

# PEFT and Trainer ask by names that transformers is about to drop.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")


class Listening(transformers.TrainerCallback):  # type: ignore[misc]
    """What report_to hears; it comes before the callbacks a user gives."""

    def __init__(self) -> None:
        self.heard: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        self.heard.append({**logs, "step": state.global_step})


PROMPTS = [[{"role": "user", "content": f"Is it {n}?"}] for n in range(3)]


def watched(hf: Any, folder: Any, *callbacks: Any, **settings: Any) -> tuple[Any, Listening]:
    listening = Listening()
    made = trainer(hf, folder, listening, *callbacks, **settings)
    made.callback_handler.processing_class = tokenizer()
    made.train()
    return made, listening


def test_shift_is_logged_while_training_which_goes_on_as_without(tmp_path: Any) -> None:
    bank = pv.VectorBank([vector(0, 2), vector(0, 2).rename("humor")])
    hf, _ = subject("qwen2")
    callback = pv.ShiftCallback(bank, PROMPTS, every=3)
    made, listening = watched(hf, tmp_path, prevention(), callback)
    assert list(callback.history) == [3, 4]
    plain, without = watched(subject("qwen2")[0], tmp_path, prevention())
    assert losses(made) == losses(plain)
    base, tuned = (pv.HookedModel(one, tokenizer()) for one in (subject("qwen2")[0], hf))
    wanted = pv.finetuning_shift(base, tuned, bank, PROMPTS).named()
    assert callback.history[4].named() == pytest.approx(wanted, abs=1e-6)
    assert abs(wanted["evil/resid_post.2"]) > 1e-3
    assert callback.history[3].named() != callback.history[4].named()
    told = [entry for entry in listening.heard if "shift/evil/resid_post.2" in entry]
    kept = [entry for entry in made.state.log_history if "shift/evil/resid_post.2" in entry]
    assert [entry["step"] for entry in told] == [entry["step"] for entry in kept] == [3, 4]
    for entry, shift in zip(told, callback.history.values(), strict=True):
        assert {f"shift/{name}": number for name, number in shift.named().items()}.items() <= (
            entry.items()
        )
    others = [entry for entry in listening.heard if entry not in told]
    assert [entry["step"] for entry in others] == [entry["step"] for entry in without.heard]


def test_shift_is_read_without_dropout_and_the_random_numbers_of_training_stay(
    tmp_path: Any,
) -> None:
    curves = []
    bank = pv.VectorBank([vector(1)])
    for callbacks in ([], [pv.ShiftCallback(bank, [ids()[0]], every=1)]):
        hf, _ = subject("gpt2")
        for module in hf.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.3
        made = trainer(hf, tmp_path, *callbacks, learning_rate=0.0)
        made.train()
        curves.append(losses(made))
    assert curves[0] == curves[1]
    assert [shift["evil"].item() for shift in callbacks[0].history.values()] == [0.0] * 4
    assert pv.ShiftCallback(bank, [ids()[0]]).history == {}
    with pytest.raises(pv.PvcoreError, match="got every=0"):
        pv.ShiftCallback(bank, [ids()[0]], every=0)


def test_shift_of_a_resumed_training_is_measured_from_its_beginning(tmp_path: Any) -> None:
    bank, prompts = pv.VectorBank([vector(0, 2)]), [ids()[0], ids(1)[0]]
    settings = {"save_strategy": "steps", "save_steps": 2}
    whole = pv.ShiftCallback(bank, prompts, every=1)
    trainer(subject("qwen2")[0], tmp_path, whole, **settings).train()
    resumed = pv.ShiftCallback(bank, prompts, every=1)
    later = trainer(subject("qwen2")[0], tmp_path, resumed, **settings)
    later.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert list(resumed.history) == [3, 4]
    for step, shift in resumed.history.items():
        assert shift.named() == pytest.approx(whole.history[step].named(), abs=1e-6)
    assert abs(whole.history[4]["evil"][0] - whole.history[2]["evil"][0]) > 1e-4
    for folder, asked in ((tmp_path / "elsewhere", prompts), (tmp_path, prompts[:1])):
        callback = pv.ShiftCallback(bank, asked, every=1)
        stray = trainer(subject("qwen2")[0], folder, callback, **settings)
        with pytest.raises(HookError, match="resumed at step 2, whose beginning is not in"):
            stray.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


class Stopping(transformers.TrainerCallback):  # type: ignore[misc]
    """Ends a training early, at an evaluation, as patience does."""

    def on_evaluate(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        control.should_training_stop = control.should_training_stop or state.global_step == 3


@pytest.mark.parametrize("early", [False, True], ids=["at max_steps", "early"])
def test_the_end_is_the_last_step_where_the_best_model_is_loaded_after_it(
    tmp_path: Any, early: bool
) -> None:
    bank, prompts = pv.VectorBank([vector(0, 2)]), [ids()[0], ids(1)[0]]
    steps = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    # The longer it trains, the better this metric finds it: the best is the first step.
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss"}
    best |= {"greater_is_better": True, "learning_rate": 1e-2}
    callback = pv.ShiftCallback(bank, prompts, every=100)
    others = [Stopping()] if early else []
    hf, _ = subject("qwen2")
    made = trainer(hf, tmp_path, callback, *others, **steps, **best)
    made.train()
    last = 3 if early else 4
    assert made.state.best_model_checkpoint.endswith("checkpoint-1")
    assert list(callback.history) == [last]
    logged = [one for one in made.state.log_history if "shift/evil/resid_post.2" in one]
    assert [one["step"] for one in logged] == [last]
    base = pv.HookedModel(subject("qwen2")[0])
    course = pv.shift_trajectory(base, tmp_path, bank, prompts)
    assert callback.history[last].named() == pytest.approx(course[last].named(), abs=1e-6)
    assert callback.history[last].named() != pytest.approx(course[1].named(), abs=1e-3)


def test_what_deepspeed_spreads_over_processes_is_refused() -> None:
    hf, _ = subject("qwen2")
    next(hf.parameters()).ds_id = 0  # how DeepSpeed itself knows them
    state = transformers.TrainerState(is_world_process_zero=True)
    with pytest.raises(HookError, match="DeepSpeed ZeRO-3 spreads over processes"):
        pv.ShiftCallback(pv.VectorBank([vector(1)]), [ids()[0]]).on_train_begin(
            None, state, None, model=hf
        )


def test_two_callbacks_of_one_training_resume_each_from_its_own_beginning(tmp_path: Any) -> None:
    settings = {"save_strategy": "steps", "save_steps": 2}
    asked = [ids()[0], ids(1)[0]]

    def pair() -> list[pv.ShiftCallback]:
        return [
            pv.ShiftCallback(pv.VectorBank([vector(0, 2)]), asked, every=1),
            pv.ShiftCallback(pv.VectorBank([vector(1)]), asked[:1], every=1),
        ]

    whole, resumed = pair(), pair()
    trainer(subject("qwen2")[0], tmp_path, *whole, **settings).train()
    later = trainer(subject("qwen2")[0], tmp_path, *resumed, **settings)
    later.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for first, second in zip(whole, resumed, strict=True):
        assert list(second.history) == [3, 4]
        for step, shift in second.history.items():
            assert shift.named() == pytest.approx(first.history[step].named(), abs=1e-6)
        assert abs(first.history[4]["evil"][0]) > 1e-4


def test_the_beginning_of_an_earlier_training_in_a_folder_is_none_of_the_next(
    tmp_path: Any,
) -> None:
    settings = {"save_strategy": "steps", "save_steps": 2}
    banks = [pv.VectorBank([vector(0, 2)]), pv.VectorBank([vector(1)])]
    first, second = (pv.ShiftCallback(bank, [ids()[0]], every=1) for bank in banks)
    trainer(subject("qwen2")[0], tmp_path, first, **settings).train()
    trainer(subject("qwen2")[0], tmp_path, second, **settings).train()
    stray = trainer(subject("qwen2")[0], tmp_path, first, **settings)
    with pytest.raises(HookError, match="resumed at step 2, whose beginning is not in"):
        stray.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
