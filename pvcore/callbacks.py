"""Callbacks for `transformers.Trainer`, TRL's trainers, and whatever calls back as they do."""

import inspect
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

from torch import Tensor, nn

from pvcore import shift_start
from pvcore.blocks import is_sharded
from pvcore.chats import Chats
from pvcore.errors import HookError, PlanError
from pvcore.interventions import Intervention
from pvcore.model import HookedModel
from pvcore.plan import Plan
from pvcore.shift import FinetuningShift, Standing, prompt_ids, standing
from pvcore.training import Prevention, Schedule
from pvcore.vectors import VectorBank
from pvcore.wrappers import as_hooked, refuse_partitions, refuse_replicas, refuse_virtual_tokens

_SUSPENDS = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR


class Callback:
    """Hears every event of a trainer and does nothing; newer trainers have more events."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name.startswith("on_"):
            return lambda *_, **__: None
        raise AttributeError(name)


class PreventionCallback(Callback):
    """Preventative steering (paper, section 5.2): `prevent` from when training begins to its end.

    Nothing is armed after that, also if training ends by an exception. `model` is by default the
    trainer's. Raises what `prevent` raises before the first step, `HookError` after a step in
    which nothing was steered, and before one whose trainer tells no `max_steps` to a schedule.
    """

    def __init__(
        self,
        *interventions: Intervention,
        model: HookedModel | nn.Module | None = None,
        schedule: Schedule | str = "constant",
        check_model: bool = True,
    ) -> None:
        self._plan = Plan(*interventions)  # refuses an empty one here, not hours later
        Prevention(interventions, schedule)
        self._model, self._schedule, self._check_model = model, schedule, check_model
        self._prevention: Prevention | None = None
        self._release: Callable[[], None] | None = None
        self._steered = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self._leave()
        refuse_replicas(getattr(args, "n_gpu", 1))
        loop = _Loop()
        prevention = Prevention(self._plan.interventions, self._schedule, loop.ended)
        hooked = as_hooked(given["model"] if self._model is None else self._model)
        self._release = hooked.hold_programs(
            self._plan, prevention.gates(), lapsed=loop.ended, check_model=self._check_model
        )
        self._prevention = prevention

    def on_step_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        if self._prevention is not None:
            self._steered = self._prevention.steered
            if state.max_steps > 0:
                self._prevention.advance(min(state.global_step / state.max_steps, 1.0))
            elif self._prevention.stands_still:
                raise HookError(
                    f"got a schedule and a trainer of max_steps={state.max_steps}, which does not "
                    "say how far the training is; set max_steps, or leave the schedule out"
                )

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        if self._prevention is not None and self._prevention.steered == self._steered:
            raise HookError(
                "got a training step in which nothing was steered; train the very model the "
                "callback was given, hooked before it is compiled, in the trainer's own thread"
            )

    def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self._leave()

    def _leave(self) -> None:
        release, self._release, self._prevention = self._release, None, None
        if release is not None:
            release()


class ShiftCallback(Callback):
    """The finetuning shift (paper, section 4.2) while a model is trained, against its beginning.

    Every `every` steps, and at the end, `shift/evil/resid_post.19` and its like go wherever the
    trainer's own figures go: `report_to` and `state.log_history`. `history` keeps them by step.
    The model is read in evaluation mode, by the first process only (by all where they share its
    weights), and trains on as if it had not been. The beginning is kept in the trainer's output
    folder, so that a resumed training goes on measuring from it; `HookError` where it is not there.
    The end is the last step: a best model that is loaded after it is not measured.
    """

    def __init__(
        self,
        bank: VectorBank,
        prompts: Chats,
        *,
        every: int = 100,
        batch_size: int = 16,
        model: HookedModel | nn.Module | None = None,
        check_model: bool = True,
    ) -> None:
        if every < 1:
            raise PlanError(f"got every={every}; wanted a number of steps, from 1")
        self.history: dict[int, FinetuningShift] = {}
        self._bank, self._prompts, self._every = bank, prompts, every
        self._batch_size, self._model, self._check_model = batch_size, model, check_model
        self._hooked: HookedModel | None = None
        self._before: Standing | None = None
        self._ids: list[Tensor] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self.history = {}
        self._hooked = self._before = None
        model = given["model"] if self._model is None else self._model
        bare = model.hf if isinstance(model, HookedModel) else model
        refuse_virtual_tokens(bare)
        refuse_partitions(bare)
        if not (state.is_world_process_zero or is_sharded(bare)):
            return
        self._hooked = as_hooked(model, given.get("processing_class"))
        self._hooked.check(Plan(monitor=self._bank), check_model=self._check_model)
        self._ids = prompt_ids(self._hooked, self._prompts)
        self._before = self._beginning(self._hooked, args, state)

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        if state.global_step % self._every == 0:
            self._measure(args, state, control)
        self._measure_end(args, state, control)

    def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        best = getattr(args, "load_best_model_at_end", False) and state.best_model_checkpoint
        if not best and state.global_step not in self.history:
            self._measure(args, state, control)
        self._hooked = None

    def _measure_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Measure the last step once it is known to be that: a best model may replace it."""
        over = getattr(control, "should_training_stop", False)
        over = over or 0 < state.max_steps <= state.global_step
        if over and state.global_step not in self.history:
            self._measure(args, state, control)

    # What makes a training stop early may do so in any of these.
    on_epoch_end = on_evaluate = on_save = _measure_end

    def _beginning(self, model: HookedModel, args: Any, state: Any) -> Standing:
        """Where the training begins, or began before it was stopped and resumed."""
        folder = getattr(args, "output_dir", None)
        read = shift_start.read_at(self._bank.sites, self._ids)
        if state.global_step > 0:
            return shift_start.kept(folder, read, len(self._ids), state.global_step)
        start = self._standing(model)
        if folder is not None and state.is_world_process_zero:
            shift_start.keep(folder, start, read, state)
        return start

    def _standing(self, model: HookedModel) -> Standing:
        return standing(model, self._bank, self._ids, self._batch_size)

    def _measure(self, args: Any, state: Any, control: Any) -> None:
        if self._hooked is None or self._before is None:
            return
        shift = self._before.shift_to(self._standing(self._hooked), self._bank)
        self.history[state.global_step] = shift
        if not state.is_world_process_zero:
            return
        logs = {f"shift/{name}": number for name, number in shift.named().items()}
        state.log_history.append({**logs, "epoch": state.epoch, "step": state.global_step})
        event = _caller("call_event")
        if event is not None:
            # Not by the trainer's `log`, which some trainers empty their own averages into.
            event.f_locals["self"].call_event("on_log", args, state, control, logs=logs)


class _Loop:
    """The trainer's function that called back. No event tells of its end by an exception."""

    def __init__(self) -> None:
        frame = _caller("_inner_training_loop") or _caller("train")
        # One that can be suspended is not asked whether it has ended: that would end it.
        suspends = frame is not None and frame.f_code.co_flags & _SUSPENDS
        self._frame = None if suspends else frame
        self._ended = False

    def ended(self) -> bool:
        if self._frame is not None:
            try:
                # Python's own way to let go of what a failed function held; refused while it runs.
                self._frame.clear()
            except RuntimeError:
                return False
            self._frame, self._ended = None, True
        return self._ended


def _caller(name: str) -> FrameType | None:
    """The nearest function of this name that is running, if any."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_name != name:
        frame = frame.f_back
    return frame
