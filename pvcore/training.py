"""Preventative steering: a plan that acts while a model is trained, and never else.

Adding a trait's vector during finetuning spares the model from moving there itself (paper, section
5.2). Nothing is added when the finetuned model is used, and nothing of it is in what is saved.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from types import FrameType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pvcore.errors import PlanError
from pvcore.frames import Frame
from pvcore.interventions import Add, Intervention
from pvcore.model import HookedModel
from pvcore.plan import Plan
from pvcore.programs import Joint, Shift, SiteProgram, compile_programs
from pvcore.sites import Site

# A multiplier of all coefficients, by the share of the training that is done, from 0 to 1.
Schedule = Callable[[float], float]


class Prevention:
    """A plan under way. `progress` is the share of the training done, for a schedule to follow."""

    def __init__(self, interventions: Sequence[Intervention], schedule: Schedule | None) -> None:
        if schedule is not None and not all(isinstance(one, Add) for one in interventions):
            raise PlanError("got a schedule for Ablate or Cap, which have no coefficient to scale")
        self._interventions, self._schedule = tuple(interventions), schedule
        self._programs: dict[Site, SiteProgram] = {}
        self._scale: float | None = None
        # Where a trainer called: once that function has ended, so has the training.
        self.loop: FrameType | None = None
        self.progress = 0.0
        self.advance(0.0)

    def advance(self, progress: float) -> None:
        """Say how much of the training is done; the schedule decides what that means."""
        if not 0 <= progress <= 1:
            raise PlanError(f"got progress {progress}; wanted the share of the training, 0 to 1")
        self.progress = progress
        scale = 1.0 if self._schedule is None else float(self._schedule(progress))
        if scale != self._scale:
            scaled = [_scaled(one, scale) for one in self._interventions]
            self._programs, self._scale = compile_programs(scaled), scale

    def gates(self) -> dict[Site, SiteProgram]:
        """Programs that act in training forwards alone, and as far as the schedule says."""
        return {site: _Gate(self, site) for site in self._programs}

    def program(self, site: Site, frame: Frame) -> SiteProgram | None:
        """What acts at a site in this forward; the same again when it is recomputed."""
        if self not in frame.notes:
            frame.notes[self] = dict(self._programs) if frame.trains and self._goes_on() else {}
        found: dict[Site, SiteProgram] = frame.notes[self]
        return found.get(site)

    def _goes_on(self) -> bool:
        """Whether the trainer's loop is still running: an exception may have ended it."""
        if self.loop is None:
            return True
        running: FrameType | None = sys._getframe(1)
        while running is not None and running is not self.loop:
            running = running.f_back
        return running is not None


class _Gate(SiteProgram):
    """Stands where a program is armed, and lets it act in the forwards that train."""

    def __init__(self, prevention: Prevention, site: Site) -> None:
        self._prevention, self.site = prevention, site

    def apply(
        self, h: Float[Tensor, "batch pos d_model"], frame: Frame
    ) -> Float[Tensor, "batch pos d_model"]:
        program = self._prevention.program(self.site, frame)
        return h if program is None else program.apply(h, frame)

    def resolve(
        self, device: torch.device, dtype: torch.dtype, frame: Frame
    ) -> Shift | Joint | None:
        program = self._prevention.program(self.site, frame)
        return None if program is None else program.resolve(device, dtype, frame)


def _scaled(one: Intervention, scale: float) -> Intervention:
    if not isinstance(one, Add) or scale == 1.0:
        return one
    amount = one.coeff
    if amount.everywhere is not None:
        coeff = _times(amount.everywhere, scale)
    else:
        coeff = {layer: _times(rows, scale) for layer, rows in amount.by_layer}
    return Add(one.vectors, coeff=coeff, layers=one.sites, span=one.span)


def _times(rows: float | tuple[float, ...], scale: float) -> Any:
    return [scale * one for one in rows] if isinstance(rows, tuple) else scale * rows


@contextmanager
def prevent(
    model: HookedModel | nn.Module,
    *interventions: Intervention,
    schedule: Schedule | None = None,
    check_model: bool = True,
) -> Iterator[Prevention]:
    """Steer every training forward of the model inside the block, and no other forward.

    A training forward is one of a model in training mode (`model.train()`) with gradients on.
    Evaluation, generation and anything under `torch.no_grad()` stay as they are. `schedule` maps
    the share of the training done, which `advance` reports, to a multiplier of the coefficients.
    A model inside a PEFT, DDP or compiling wrapper may be given bare or wrapped, if it was hooked
    before `torch.compile`. Raises one `PlanError` or `HookError` before anything is armed, and
    `HookError` on leaving if no forward ran.
    """
    hooked = as_hooked(model)
    plan = Plan(*interventions)
    prevention = Prevention(interventions, schedule)
    with hooked.arm_programs(plan, prevention.gates(), check_model=check_model):
        yield prevention


def as_hooked(model: HookedModel | nn.Module) -> HookedModel:
    """The model itself, or the decoder inside wrappers of finetuning, hooked."""
    if isinstance(model, HookedModel):
        return model
    inner: Any = getattr(model, "module", model) if not hasattr(model, "config") else model
    inner = inner.get_base_model() if hasattr(inner, "get_base_model") else inner
    return HookedModel(inner)


class PreventionCallback:
    """Preventative steering for `transformers.Trainer`, TRL's trainers, and what calls them back.

    Arms when training begins and disarms when it ends. Training that ends by an exception is
    noticed at the next forward, which is no longer steered. `model` is by default the trainer's.
    """

    def __init__(
        self,
        *interventions: Intervention,
        model: HookedModel | nn.Module | None = None,
        schedule: Schedule | None = None,
        check_model: bool = True,
    ) -> None:
        Plan(*interventions)  # refuses an empty one here, not hours later
        self._interventions, self._model = interventions, model
        self._schedule, self._check_model = schedule, check_model
        self._armed: AbstractContextManager[Prevention] | None = None
        self._prevention: Prevention | None = None

    def __getattr__(self, name: str) -> Callable[..., None]:
        # Trainers call every event of theirs; newer ones have more.
        if name.startswith("on_"):
            return lambda *_, **__: None
        raise AttributeError(name)

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self._leave()
        model = given["model"] if self._model is None else self._model
        self._armed = prevent(
            model,
            *self._interventions,
            schedule=self._schedule,
            check_model=self._check_model,
        )
        self._prevention = self._armed.__enter__()
        self._prevention.loop = _caller("_inner_training_loop") or _caller("train")

    def on_step_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        if self._prevention is not None and state.max_steps > 0:
            self._prevention.advance(min(state.global_step / state.max_steps, 1.0))

    def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self._leave()

    def _leave(self) -> None:
        armed, self._armed, self._prevention = self._armed, None, None
        if armed is not None:
            armed.__exit__(None, None, None)


def _caller(name: str) -> FrameType | None:
    """The nearest function of this name that is running, if any."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_name != name:
        frame = frame.f_back
    return frame
