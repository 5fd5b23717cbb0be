"""Resident moves: what a plan does at one site, as buffers that a compiled decode step works on.

The arithmetic is that of `pvcore_kernels.reference`, in ops that inductor fuses with the norms
around a site, which an opaque op would keep it from; only a joint step is worth one. Functions
that a compiler traces carry `no_type_check`: the run-time type checker of the tests would break
the graph.
"""

from collections.abc import Callable, Sequence
from typing import no_type_check

import torch
from torch import Tensor

import pvcore_kernels as kernels
from pvcore.dials import Dial
from pvcore.frames import Call
from pvcore.programs import FarGate, Joint, Link, Shift
from pvcore.sites import Site
from pvcore_kernels import routes
from pvcore_kernels.landing import interval, lands
from pvcore_kernels.reference import exact


def fixed(like: Tensor, *shape: int) -> Tensor:
    """A zeroed buffer whose address compilers and graphs may rely on."""
    buffer = like.new_zeros(shape)
    torch._dynamo.mark_static_address(buffer)
    return buffer


@no_type_check
def _times(h, m):
    return h.to(m.dtype) @ m


def times_on(device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
    """How a traced step multiplies: on CUDA by an op, as what is traced may be rounded to TF32."""
    times: Callable[[Tensor, Tensor], Tensor] = _times
    if device.type == "cuda":
        times = routes.ops().product.default
    return times


class Shifts:
    """`h + delta`, rounded once; a row of zeros leaves its row as it is."""

    def __init__(self, move: Shift, batch: int) -> None:
        self.delta = fixed(move.total, batch, 1, move.total.shape[-1])

    def write(self, move: Shift) -> None:
        self.delta.copy_(move.total.expand_as(self.delta))

    @no_type_check
    def __call__(self, h):
        return (h + self.delta).to(h.dtype)


class _AddsUnits:
    """A step that adds to the coefficients of the unit rows."""

    def __init__(self, like: Tensor, batch: int, n_vec: int) -> None:
        self.shift = fixed(like, batch, 1, n_vec)

    def write(self, step: kernels.Step) -> None:
        assert isinstance(step, kernels.AddStep)
        self.shift.copy_(step.shift.expand_as(self.shift))

    @no_type_check
    def __call__(self, scores, total, gram):
        return self.shift


class _Clips:
    """A joint step: projections sent into `[low, high]`; ablation is the interval `[0, 0]`."""

    def __init__(self, like: Tensor, batch: int, n_step: int) -> None:
        self._times = times_on(like.device)
        self.index = torch.zeros(n_step, dtype=torch.long, device=like.device)
        torch._dynamo.mark_static_address(self.index)
        self.inverse = fixed(like, n_step, n_step)
        self.low, self.high = fixed(like, batch, 1, 1), fixed(like, batch, 1, 1)

    def write(self, step: kernels.Step) -> None:
        assert not isinstance(step, kernels.AddStep)
        self.index.copy_(torch.tensor(step.index))
        self.inverse.copy_(step.gram_inverse)
        for buffer, bound in zip((self.low, self.high), interval(step), strict=True):
            buffer.copy_(torch.as_tensor(bound))

    @no_type_check
    def __call__(self, scores, total, gram):
        now = (scores + self._times(total, gram)).index_select(-1, self.index)
        change = torch.minimum(torch.maximum(now, self.low), self.high) - now
        moved = self._times(change, self.inverse)
        return torch.zeros_like(scores).index_copy(-1, self.index, moved)


Gauges = dict[tuple[Link | None, Site], Tensor]


class _Gates:
    """What opens a step: signs and bounds for its projections, here and as read before."""

    def __init__(
        self, step: kernels.Step, far: Sequence[FarGate], like: Tensor, batch: int
    ) -> None:
        self.here = tuple(_Bound(like, batch) for _ in step.gates)
        self.far = tuple(_Bound(like, batch) for _ in far)

    def write(self, step: kernels.Step, far: Sequence[FarGate]) -> None:
        gates = (*step.gates, *(one.gate for one in far))
        for bound, gate in zip((*self.here, *self.far), gates, strict=True):
            bound.write(gate)

    @no_type_check
    def __call__(self, now, read):
        """Which rows pass all gates; `read` gives the projections each far one looks at."""
        passed = torch.ones_like(now[..., :1], dtype=torch.bool)
        for bound in self.here:
            passed = passed & bound.passed(now)
        for bound, scores in zip(self.far, read, strict=True):
            passed = passed & bound.passed(scores)
        return passed.to(now.dtype)


class _Bound:
    """One gate: `sign * (projection - bound) > 0`."""

    def __init__(self, like: Tensor, batch: int) -> None:
        self.index = torch.zeros(1, dtype=torch.long, device=like.device)
        torch._dynamo.mark_static_address(self.index)
        self.sign, self.bound = fixed(like, 1), fixed(like, batch, 1, 1)

    def write(self, gate: kernels.Gate) -> None:
        self.index.fill_(gate.index)
        self.sign.fill_(gate.sign)
        self.bound.copy_(torch.as_tensor(gate.bound))

    @no_type_check
    def passed(self, scores):
        return self.sign * (scores.index_select(-1, self.index) - self.bound) > 0


class Joints:
    """One read of `h`, the steps in projection space, one write.

    `gauges` are the buffers of all that earlier sites have read for others, by plan and site; this
    site's own joins them.
    """

    def __init__(self, move: Joint, batch: int, gauges: Gauges) -> None:
        n_vec, d_model = move.units.shape
        self._times = times_on(move.units.device)
        self.units, self.gram = fixed(move.units, n_vec, d_model), fixed(move.gram, n_vec, n_vec)
        self.steps = tuple(
            _AddsUnits(move.units, batch, n_vec)
            if isinstance(step, kernels.AddStep)
            else _Clips(move.units, batch, len(step.index))
            for step in move.steps
        )
        self.gates = tuple(
            _Gates(*pair, move.units, batch) for pair in zip(move.steps, move.far, strict=True)
        )
        self.read = tuple(tuple(gauges[move.link, one.site] for one in far) for far in move.far)
        self.levels = tuple(
            None if dial is None else fixed(move.units, batch, 1, 1) for dial in move.dials
        )
        self._dials: tuple[Dial | None, ...] = ()
        self._turned: list[Tensor | None] = []
        self.asked = self.answer = None
        if move.gauge is not None:
            self.asked = fixed(move.units, len(move.gauge), d_model)
            self.answer = fixed(move.units, batch, 1, len(move.gauge))

    def write(self, move: Joint) -> None:
        self.units.copy_(move.units)
        self.gram.copy_(move.gram)
        for buffers, step in zip(self.steps, move.steps, strict=True):
            buffers.write(step)
        for gates, step, far in zip(self.gates, move.steps, move.far, strict=True):
            gates.write(step, far)
        if self.asked is not None and move.gauge is not None:
            self.asked.copy_(move.gauge)
        self._dials, self._turned = move.dials, [None] * len(move.dials)

    def turn(self, call: Call) -> None:
        """Take over the dials' newest levels."""
        for place, (dial, buffer) in enumerate(zip(self._dials, self.levels, strict=True)):
            if dial is None or buffer is None:
                continue
            levels = dial.now(call)
            if levels is not self._turned[place]:
                buffer.copy_(levels[:, None, None])
                self._turned[place] = levels

    @no_type_check
    def __call__(self, h):
        with exact(self.units.device):
            moved = self._moved(h) if self.steps else h
            if self.asked is not None:
                self.answer.copy_(self._times(moved, self.asked.mT))
        return moved

    @no_type_check
    def look(self, h):
        """Read anew what later sites ask about: moves of plans armed inside have followed."""
        with exact(self.units.device):
            self.answer.copy_(self._times(h, self.asked.mT))

    @no_type_check
    def _moved(self, h):
        scores = self._times(h, self.units.mT)
        total = torch.zeros_like(scores)
        parts = zip(self.steps, self.gates, self.read, self.levels, strict=True)
        for step, gates, read, level in parts:
            change = step(scores, total, self.gram)
            if gates.here or gates.far:
                change = change * gates(scores + self._times(total, self.gram), read)
            if level is not None:
                change = change * level
            total = total + change
        return (h + self._times(total, self.units)).to(h.dtype)


def is_landing(move: Joint, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether one kernel does all of a program, on rows of a dtype; nothing else may read it."""
    free = move.gauge is None and not any(move.far) and not any(move.dials)
    return free and lands(move.steps, len(move.units), device, dtype)


class Landings:
    """A joint step as one launch between the block's last add and the next norm.

    As torch operations it would be a dozen, of which inductor fuses what lies between products.
    """

    def __init__(self, move: Joint, batch: int) -> None:
        routes.ops()
        n_vec, d_model = move.units.shape
        self.units = fixed(move.units, n_vec, d_model)
        self.inverse = fixed(move.units, n_vec, n_vec)
        self.low, self.high = (fixed(move.units, batch, n_vec) for _ in range(2))
        self.row = torch.arange(batch, dtype=torch.int32, device=move.units.device)
        torch._dynamo.mark_static_address(self.row)

    def write(self, move: Joint) -> None:
        (step,) = move.steps
        assert not isinstance(step, kernels.AddStep)
        self.units.copy_(move.units[list(step.index)])
        self.inverse.copy_(step.gram_inverse)
        for buffer, bound in zip((self.low, self.high), interval(step), strict=True):
            buffer.copy_(torch.as_tensor(bound).reshape(-1, 1))

    @no_type_check
    def __call__(self, h):
        moved, _scores = torch.ops.pvcore.intervene.default(
            h.reshape(-1, h.shape[-1]), self.units, self.low, self.high, self.row, self.inverse
        )
        return moved.view(h.shape)
