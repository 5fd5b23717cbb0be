"""Preventative steering: a plan that acts while a model is trained, and never else.

Adding a trait's vector during finetuning spares the model from moving there itself (paper, section
5.2); ablating it is CAFT (appendix J.4). Nothing is changed when the finetuned model is used, and
nothing of it is in what is saved.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pvcore.errors import HookError, PlanError
from pvcore.frames import Frame
from pvcore.interventions import Add, Intervention
from pvcore.model import HookedModel
from pvcore.plan import Plan
from pvcore.programs import Joint, Shift, SiteProgram, compile_programs
from pvcore.sites import Site
from pvcore.wrappers import as_hooked

# A multiplier of all coefficients, by the share of the training that is done, from 0 to 1. The
# linear one falls from 1 to 0.
Schedule = Callable[[float], float] | Literal["constant", "linear"]
NAMED: Mapping[str, Callable[[float], float]] = {
    "constant": lambda done: 1.0,
    "linear": lambda done: 1.0 - done,
}


class Prevention:
    """A plan under way, and how many training forwards it has steered."""

    def __init__(
        self,
        interventions: Sequence[Intervention],
        schedule: Schedule | str,
        lapsed: Callable[[], bool] | None = None,
    ) -> None:
        self._interventions, self._multiplier = tuple(interventions), _multiplier(schedule)
        if schedule != "constant" and not all(isinstance(one, Add) for one in interventions):
            raise PlanError("got a schedule for Ablate or Cap, which have no coefficient to scale")
        self._lapsed = lapsed
        self._programs: dict[Site, SiteProgram] = {}
        self._scale: float | None = None
        self.progress, self.steered = 0.0, 0
        self.told, self._scheduled = False, schedule != "constant"
        self._set(0.0)

    @property
    def stands_still(self) -> bool:
        """Whether a schedule waits for progress that nobody has told of."""
        return self._scheduled and not self.told

    def advance(self, progress: float) -> None:
        """Say how much of the training is done; the schedule decides what that means."""
        if not 0 <= progress <= 1:
            raise PlanError(f"got progress {progress}; wanted the share of the training, 0 to 1")
        self.told = True
        self._set(progress)

    def _set(self, progress: float) -> None:
        self.progress = progress
        scale = float(self._multiplier(progress))
        if scale != self._scale:
            scaled = [_scaled(one, scale) for one in self._interventions]
            self._programs, self._scale = compile_programs(scaled), scale

    def gates(self) -> dict[Site, SiteProgram]:
        """Programs that act in training forwards alone, and as far as the schedule says."""
        return {site: _Gate(self, site) for site in self._programs}

    def program(self, site: Site, frame: Frame) -> SiteProgram | None:
        """What acts at a site in this forward; the same again when it is recomputed."""
        if self not in frame.notes:
            acts = frame.trains and not (self._lapsed is not None and self._lapsed())
            self.steered += acts
            frame.notes[self] = self._programs if acts else {}
        found: Mapping[Site, SiteProgram] = frame.notes[self]
        return found.get(site)


class _Gate(SiteProgram):
    """Stands where a program is armed, and lets it act in the forwards that train."""

    trains_only = True

    def __init__(self, prevention: Prevention, site: Site) -> None:
        self._prevention, self.site = prevention, site

    def apply(
        self, h: Float[Tensor, "batch pos d_model"], frame: Frame
    ) -> Float[Tensor, "batch pos d_model"]:
        program = self._prevention.program(self.site, frame)
        return h if program is None else program.apply(h, frame)

    def look(self, h: Float[Tensor, "batch pos d_model"], frame: Frame) -> None:
        program = self._prevention.program(self.site, frame)
        if program is not None:
            program.look(h, frame)

    def resolve(
        self, device: torch.device, dtype: torch.dtype, frame: Frame
    ) -> Shift | Joint | None:
        program = self._prevention.program(self.site, frame)
        return None if program is None else program.resolve(device, dtype, frame)


def _multiplier(schedule: Schedule | str) -> Callable[[float], float]:
    if callable(schedule):
        return schedule
    if schedule not in NAMED:
        raise PlanError(
            f"got schedule {schedule!r}; wanted {', '.join(NAMED)}, or a function of the share of "
            "the training that is done"
        )
    return NAMED[schedule]


def _scaled(one: Intervention, scale: float) -> Intervention:
    if not isinstance(one, Add) or scale == 1.0:
        return one
    amount = one.coeff
    if amount.everywhere is not None:
        coeff = _times(amount.everywhere, scale)
    else:
        coeff = {layer: _times(rows, scale) for layer, rows in amount.by_layer}
    return Add(one.vectors, coeff=coeff, layers=one.sites, span=one.span, when=one.when)


def _times(rows: float | tuple[float, ...], scale: float) -> Any:
    return [scale * one for one in rows] if isinstance(rows, tuple) else scale * rows


@contextmanager
def prevent(
    model: HookedModel | nn.Module,
    *interventions: Intervention,
    schedule: Schedule | str = "constant",
    check_model: bool = True,
) -> Iterator[Prevention]:
    """Steer every training forward of the model inside the block, and no other forward.

    A training forward is one of a model in training mode (`model.train()`) with gradients on, in
    this thread. Evaluation, generation and anything under `torch.no_grad()` stay as they are.
    `schedule` maps the share of the training done, which `advance` reports, to a multiplier of the
    coefficients. A model inside a PEFT, DDP or compiling wrapper may be given bare or wrapped, if
    it was hooked before `torch.compile`. Raises one `PlanError`, `SiteError` or `HookError` before
    anything is armed, and `HookError` on leaving if no training forward ran, or if a schedule was
    never told of any progress.
    """
    prevention = Prevention(interventions, schedule)
    hooked = as_hooked(model)
    with hooked.arm_programs(Plan(*interventions), prevention.gates(), check_model=check_model):
        yield prevention
    if not prevention.steered:
        raise HookError(
            "got forwards inside the block and none of them a training forward; call "
            "model.train(), which from_pretrained does not, and keep gradients on"
        )
    if prevention.stands_still:
        raise HookError(
            "got a schedule that stood still at its beginning; tell it how far the training is: "
            "`with pv.prevent(...) as prevention`, and prevention.advance(step / steps) each step"
        )
