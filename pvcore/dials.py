"""Dials: how strongly an intervention acts on each row, turned between two tokens of a call."""

from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from pvcore.frames import Call, Frame


@dataclass(slots=True, kw_only=True, eq=False)
class _Setting:
    """Levels of all rows from one column on, and copies of them where they were needed."""

    start: int
    levels: Float[Tensor, " batch"]
    silent: bool
    placed: dict[tuple[torch.device, torch.dtype], Tensor] = field(default_factory=dict)

    def like(self, tensor: Tensor) -> Float[Tensor, "batch 1 1"]:
        key = (tensor.device, tensor.dtype)
        if key not in self.placed:
            self.placed[key] = self.levels.to(*key)[:, None, None]
        return self.placed[key]


class Dial:
    """Multiplies what an intervention changes: 0 rests, 1 acts as written.

    Every call begins at `initial`. The levels of a call are kept with it, so that calls in other
    threads have their own; those set before stay in force for the columns they were set for, which
    a forward without a cache computes again.
    """

    def __init__(self, initial: float = 0.0) -> None:
        self.initial = initial

    def turn(self, call: Call, row: int, level: float, column: int) -> None:
        """Set the level of one row from a column on, which no forward has reached yet."""
        settings = self._settings(call)
        levels = settings[-1].levels.clone()
        levels[row] = level
        if settings[-1].start == column:
            settings.pop()
        settings.append(_Setting(start=column, levels=levels, silent=not bool(levels.any())))

    def now(self, call: Call) -> Float[Tensor, " batch"]:
        """The newest levels, on the CPU; a new tensor after every turn."""
        return self._settings(call)[-1].levels

    def mask(self, frame: Frame, like: Tensor) -> Float[Tensor, "#batch #pos 1"] | None:
        """The levels of a frame's tokens, placed like a tensor; None where all are 0."""
        settings = self._settings(frame.call)
        if frame.steady:
            return None if settings[-1].silent else settings[-1].like(like)
        end = frame.start + frame.width
        if all(one.silent for one in settings if one.start < end):
            return None
        levels = like.new_zeros(frame.batch, frame.width, 1)
        for one in settings:
            levels[:, max(one.start - frame.start, 0) :] = one.like(like)
        return levels

    def _settings(self, call: Call) -> list[_Setting]:
        if self not in call.steady:
            levels = torch.full((len(call.rows),), self.initial, dtype=torch.float64)
            call.steady[self] = [_Setting(start=0, levels=levels, silent=self.initial == 0)]
        settings: list[_Setting] = call.steady[self]
        return settings
