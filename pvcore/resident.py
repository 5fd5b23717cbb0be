"""Resident plans: an armed session as buffers at fixed addresses, for compiled decode steps.

In decode every row of a forward is one reply token, so a plan is the same arithmetic at every step
and only its numbers differ: they are written in place, and neither a changed coefficient nor
another vector compiles or captures anything anew. Functions that a compiler traces carry
`no_type_check`: the run-time type checker of the tests would break the graph.
"""

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import no_type_check

import torch

import pvcore_kernels as kernels
from pvcore.errors import HookError
from pvcore.frames import Call, Frame
from pvcore.programs import Joint, Link, Shift
from pvcore.resident_alarms import Bells, Sounder, sounds
from pvcore.resident_moves import Gauges, Joints, Landings, Shifts, fixed, is_landing
from pvcore.sessions import Scorer, Session
from pvcore.sites import Site
from pvcore_kernels import paths, routes
from pvcore_kernels.reference import accumulator, exact

RING_BYTES = 32 << 20
RING_STEPS = 64
_BEGIN, _END = "begin", "end"


@dataclass(frozen=True, slots=True, kw_only=True)
class Met:
    """Where and in which precision a site's residual lives, as the prompt's forward met it."""

    device: torch.device
    dtype: torch.dtype


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Decode:
    """What a session does in each decode step of one call."""

    batch: int
    moves: Mapping[Site, tuple[Shift | Joint, ...]]
    scorers: tuple[Scorer, ...]
    met: Mapping[Site, Met]

    @classmethod
    def of(cls, session: Session | None, call: Call, met: Mapping[Site, Met]) -> "Decode":
        """The decode steps of `call` under a session.

        `HookError` for readers that are no monitors and for sites on more than one device.
        """
        batch = len(call.rows)
        sites = session.expected if session else ()
        frame = Frame(call, batch, call.mask.shape[1], 1, True)
        moves = {}
        for site in sites:
            programs = session.programs.get(site, ()) if session else ()
            found = [p.resolve(met[site].device, met[site].dtype, frame) for p in programs]
            moves[site] = tuple(one for one in found if one is not None)
        readers = session.readers if session else ()
        scorers = tuple(reader for reader in readers if isinstance(reader, Scorer))
        if len(scorers) != len(readers):
            raise HookError(
                "got a reader that keeps residuals armed around engine='graph', which returns "
                "scores only; read with model.read(...), or generate with engine='eager'"
            )
        devices = {str(one.device) for one in met.values()}
        if len(devices) > 1:
            raise HookError(
                f"got armed sites on {', '.join(sorted(devices))}; engine='graph' keeps a plan on "
                "one device: use engine='eager'"
            )
        return cls(batch=batch, moves=moves, scorers=scorers, met=met)

    def structure(self) -> Hashable:
        """What a compiled decode step depends on; plans that agree in it share one."""
        links: dict[Link | None, int] = {}
        for moves in self.moves.values():
            for move in moves:
                if isinstance(move, Joint):
                    links.setdefault(move.link, len(links))
        return (
            self.batch,
            tuple(
                (site, self.met[site], *(_shape(move, links) for move in self.moves[site]))
                for site in self.moves
            ),
            tuple((scorer.sites, scorer.n_vec, sounds(scorer)) for scorer in self.scorers),
        )


def _shape(move: Shift | Joint, links: Mapping[Link | None, int]) -> Hashable:
    if isinstance(move, Shift):
        return "shift"
    steps = (
        (
            0 if isinstance(step, kernels.AddStep) else len(step.index),
            len(step.gates),
            *(one.site for one in far),
            dial is not None,
        )
        for step, far, dial in zip(move.steps, move.far, move.dials, strict=True)
    )
    asked = 0 if move.gauge is None else len(move.gauge)
    linked = asked or any(move.far)
    return len(move.units), tuple(steps), asked, links[move.link] if linked else None


class Watch:
    """A monitor's buffers: the newest row of every site, unit rows, and a ring of scores.

    Rows are collected as the blocks pass and scored all at once when the decoder ends: by kernels
    in one launch, which writes the step's slot itself. The ring holds the newest `len(ring)` steps.
    `bells` judges them; None for a monitor without alarms.
    """

    def __init__(self, scorer: Scorer, met: Met, batch: int, d_model: int) -> None:
        n_sites, n_vec = len(scorer.sites), scorer.n_vec
        like = torch.empty(0, dtype=accumulator(met.dtype), device=met.device)
        step = n_sites * batch * n_vec * like.element_size()
        self.rows = fixed(like.to(met.dtype), n_sites, batch, d_model)
        self.units = fixed(like, n_sites, n_vec, d_model)
        slots = min(max(RING_BYTES // step, 2), RING_STEPS)
        self.ring = fixed(like, slots, n_sites, batch, n_vec)
        self.bells = Bells(self.ring) if sounds(scorer) else None
        self._fused = paths.takes_kernels(met.device, met.dtype)
        if self._fused:
            routes.ops()

    def write(self, scorer: Scorer) -> None:
        self.units.copy_(scorer.units(self.units.device, self.units.dtype))
        if self.bells is not None and isinstance(scorer, Sounder):
            self.bells.write(scorer.bounds())

    @property
    def beside_bank(self) -> int:
        """Bytes of device memory beside the unit rows."""
        rings = sum(t.numel() * t.element_size() for t in (self.rows, self.ring))
        return rings + (0 if self.bells is None else self.bells.nbytes)

    @no_type_check
    def score(self, step):
        slot = (step % self.ring.shape[0]).reshape(1)
        if self._fused:
            torch.ops.pvcore.project_stack_out.default(self.rows, self.units, self.ring, step)
        else:
            with exact(self.units.device):
                scores = torch.bmm(self.rows.to(self.units.dtype), self.units.mT)
            self.ring.index_copy_(0, slot, scores[None])
        if self.bells is not None:
            # What the host is told is judged, whatever a compiler fuses before it is written.
            self.bells.judge(self.ring.index_select(0, slot)[0], slot)


class _Spot:
    """One site: its moves in order, and where monitors want its rows."""

    def __init__(
        self, moves: Sequence[Shifts | Joints | Landings], watched: Iterable[tuple[Watch, int]]
    ) -> None:
        self.moves, self.watched = tuple(moves), tuple(watched)
        self.gauges = tuple(
            move for move in moves[:-1] if isinstance(move, Joints) and move.asked is not None
        )


class Resident:
    """The buffers of one structure, and what the taps trace into a compiled decode step."""

    def __init__(self, owner: int, plan: Decode, d_model: int, device: torch.device) -> None:
        self.owner, self.batch = owner, plan.batch
        self.step = torch.zeros((), dtype=torch.long, device=device)
        torch._dynamo.mark_static_address(self.step)
        self.watches = tuple(
            Watch(scorer, plan.met[scorer.sites[0]], plan.batch, d_model) for scorer in plan.scorers
        )
        self.spots: dict[str, _Spot] = {}
        gauges: Gauges = {}
        for site, moves in plan.moves.items():
            made: list[Shifts | Joints | Landings] = []
            met = plan.met[site]
            for move in moves:
                if isinstance(move, Shift):
                    made.append(Shifts(move, plan.batch))
                    continue
                if is_landing(move, met.device, met.dtype):
                    made.append(Landings(move, plan.batch))
                    continue
                made.append(joints := Joints(move, plan.batch, gauges))
                if joints.answer is not None:
                    gauges[move.link, site] = joints.answer
            watched = [
                (watch, scorer.sites.index(site))
                for watch, scorer in zip(self.watches, plan.scorers, strict=True)
                if site in scorer.sites
            ]
            self.spots[str(site)] = _Spot(made, watched)
        every = [move for spot in self.spots.values() for move in spot.moves]
        self.dialled = [
            move
            for move in every
            if isinstance(move, Joints) and any(one is not None for one in move.levels)
        ]
        self._passed: list[str] = []
        self._unchecked = False

    def write(self, plan: Decode) -> None:
        """Take over the numbers of a plan of the same structure."""
        for site, moves in plan.moves.items():
            for buffers, move in zip(self.spots[str(site)].moves, moves, strict=True):
                buffers.write(move)  # type: ignore[arg-type]
        for watch, scorer in zip(self.watches, plan.scorers, strict=True):
            watch.write(scorer)
        self.step.zero_()

    @no_type_check
    def fire(self, name, h):
        """Traced at every tap: patch, then collect. None leaves the residual as it is."""
        spot = self.spots.get(name)
        if spot is None:
            return None
        rows = h if h.ndim == 3 else h.reshape(self.batch, -1, h.shape[-1])
        moved = rows
        for move in spot.moves:
            moved = move(moved)
        for gauge in spot.gauges:
            gauge.look(moved)
        for watch, index in spot.watched:
            watch.rows[index].copy_(moved[:, -1])
        return None if moved is rows else moved.view(h.shape)

    @no_type_check
    def finish(self):
        """Traced where the decoder ends: score what was collected and count the step."""
        for watch in self.watches:
            watch.score(self.step)
        self.step.add_(1)

    def note(self, where: str) -> None:
        """A compiler came past a tap. A trace may start over: only its last run counts."""
        if where == _BEGIN:
            self._passed.clear()
        self._passed.append(where)
        self._unchecked = True

    def check_trace(self) -> None:
        """`HookError` unless the compiled step runs every armed site exactly once."""
        if not self._unchecked:
            return
        passed = Counter(self._passed)
        wrong = {where for where in (*self.spots, _BEGIN, _END) if passed[where] != 1}
        if wrong:
            counts = ", ".join(f"{where}: {passed[where]}" for where in sorted(wrong))
            raise HookError(
                f"got a compiled decode step in which armed sites do not fire once each ({counts});"
                " the model skips or repeats blocks: use engine='eager'"
            )
        self._unchecked = False


TRACED: ContextVar[Resident | None] = ContextVar("pvcore_traced", default=None)


@no_type_check
def traces(owner, where):
    """Whether a decode step of decoder `owner` is being traced here for a resident plan.

    Run by the compiler itself, once for each tap and trace: the answer becomes part of the graph
    (`Taps` marks it so, because the mark imports the compiler).
    """
    resident = TRACED.get()
    if resident is None or resident.owner != owner:
        return False
    resident.note(where)
    return True
