"""Resident alarms: thresholds with hysteresis as buffers that a compiled decode step judges.

The host is told one truth for each row and fetches more only where it rang. All numbers are
written in place, so that other thresholds compile nothing. Functions that a compiler traces carry
`no_type_check`: the run-time type checker of the tests would break the graph.
"""

from typing import NamedTuple, Protocol, no_type_check, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pvcore.alarms import Bounds
from pvcore.frames import Call
from pvcore.resident_moves import fixed
from pvcore.sessions import Scorer


class Rung(NamedTuple):
    """What rang of some rows in one step, and all their scores."""

    ringing: Bool[Tensor, "site chat n_vec"]
    scores: Float[Tensor, "site chat n_vec"]


class Bells:
    """Thresholds of all vectors at all sites, what has rung, and a ring of what rang in each step.

    `scores` is the ring of the same steps that the watch keeps.
    """

    def __init__(self, scores: Float[Tensor, "slot site batch n_vec"]) -> None:
        slots, n_sites, batch, n_vec = scores.shape
        truth = torch.empty(0, dtype=torch.bool, device=scores.device)
        self.scores = scores
        self.high, self.floor = (fixed(scores, n_sites, 1, n_vec) for _ in range(2))
        self.rung = fixed(truth, n_sites, batch, n_vec)
        self.ring = fixed(truth, slots, n_sites, batch, n_vec)
        self.rows = fixed(truth, batch)
        self._host = torch.empty(batch, dtype=torch.bool, device="cpu", pin_memory=scores.is_cuda)

    @property
    def nbytes(self) -> int:
        """Bytes of device memory."""
        buffers = (self.high, self.floor, self.rung, self.ring, self.rows)
        return sum(t.numel() * t.element_size() for t in buffers)

    def write(self, bounds: Bounds) -> None:
        """Take over the thresholds."""
        for buffer, bound in ((self.high, bounds.high), (self.floor, bounds.floor)):
            buffer.copy_(rounded_down(bound, buffer.dtype)[:, None])

    def begin(self, rung: Bool[Tensor, "site batch n_vec"]) -> None:
        """Go on from what has rung before the first decode step."""
        self.rung.copy_(rung)
        self.rows.zero_()

    @no_type_check
    def judge(self, scores, slot):
        """Traced after a step was scored: `AlarmBell.ring` on all vectors at once."""
        ringing = (scores > self.high) & ~self.rung
        self.rung.copy_((self.rung | ringing) & ~(scores <= self.floor))
        self.ring.index_copy_(0, slot, ringing[None])
        self.rows.copy_(ringing.any(-1).any(0))

    def rows_rung(self) -> Bool[Tensor, " batch"]:
        """Which rows rang in the step just launched; waits for it, and carries nothing else."""
        self._host.copy_(self.rows, non_blocking=self._host.is_pinned())
        if self.rows.is_cuda:
            torch.cuda.current_stream(self.rows.device).synchronize()
        return self._host.clone()

    def fetch(self, step: int, rows: Int[Tensor, " chat"]) -> Rung:
        """What a decode step, counted from 0, showed of some rows, while it is in the ring."""
        slot, chosen = step % len(self.ring), rows.to(self.ring.device)
        ringing, scores = (
            ring[slot].index_select(1, chosen).cpu() for ring in (self.ring, self.scores)
        )
        return Rung(ringing, scores)


@runtime_checkable
class Sounder(Scorer, Protocol):
    """A scorer with alarms, which a compiled decode step can judge for it."""

    @property
    def sounds(self) -> bool: ...

    def bounds(self) -> Bounds:
        """The thresholds of all its vectors."""

    def hand_over(self, call: Call, bells: Bells) -> bool:
        """From here on the decode steps of a call judge.

        True if what they found has to come to `receive_rung`; one who asks the bells after every
        step has no need of it.
        """

    def receive_rung(self, call: Call, steps: Bool[Tensor, "step site batch n_vec"]) -> None:
        """What rang in the next decode steps of a call, on the CPU."""


def sounds(scorer: Scorer) -> bool:
    """Whether a scorer has alarms to judge."""
    return isinstance(scorer, Sounder) and scorer.sounds


def rounded_down(bound: Float[Tensor, "*shape"], dtype: torch.dtype) -> Float[Tensor, "*shape"]:
    """The largest numbers of a dtype that are not above float64 bounds.

    A score of that dtype is above, or at or below, such a number exactly when it is so of the
    bound: compared in its own precision it gets the verdict of float64.
    """
    near = bound.to(dtype)
    below = torch.nextafter(near, torch.full_like(near, -torch.inf))
    return torch.where(near.double() > bound, below, near)
