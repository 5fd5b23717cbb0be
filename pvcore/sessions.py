"""Sessions: armed plans, and what they do in a forward. Found in context variables, never shared.

A session belongs to the thread or task that armed it; a run of it belongs to one forward.
"""

import threading
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from pvcore.errors import HookError, PlanError
from pvcore.frames import Call, Frame, Outcome
from pvcore.programs import SiteProgram
from pvcore.sites import Site

Rows = Float[Tensor, "batch pos d_model"]


@runtime_checkable
class Reader(Protocol):
    """Something that looks at residuals. `before` asks for them ahead of all interventions."""

    @property
    def sites(self) -> tuple[Site, ...]: ...

    @property
    def before(self) -> bool: ...

    def begin(self, frame: Frame) -> None: ...

    def take(self, site: Site, h: Rows, frame: Frame) -> None: ...

    def end(self, frame: Frame) -> None: ...

    def close(self, call: Call, outcome: Outcome | None) -> None:
        """The call is over; None when it failed."""


@runtime_checkable
class Scorer(Reader, Protocol):
    """A reader that wants projections only, which a compiled decode step can make for it."""

    @property
    def n_vec(self) -> int: ...

    def units(
        self, device: torch.device, dtype: torch.dtype
    ) -> Float[Tensor, "site n_vec d_model"]: ...

    def settle(self, call: Call) -> None:
        """The prompt of a call is done: what it showed may leave the device."""

    def receive(self, call: Call, steps: Float[Tensor, "step site batch n_vec"]) -> None:
        """Scores of the next decode steps of a call, on the CPU."""


class ForwardStopped(Exception):
    """Ends a forward at the deepest site that anybody asked for."""


class Session:
    """One armed plan: its programs and readers, on top of the sessions armed before it."""

    def __init__(
        self,
        programs: Mapping[Site, SiteProgram],
        *,
        readers: Sequence[Reader] = (),
        row_counts: frozenset[int] = frozenset(),
        stop_at: Site | None = None,
        outer: "Session | None" = None,
    ) -> None:
        self.outer = outer
        self.row_counts: frozenset[int] = row_counts | (outer.row_counts if outer else frozenset())
        self.readers: tuple[Reader, ...] = (*(outer.readers if outer else ()), *readers)
        self.programs: dict[Site, tuple[SiteProgram, ...]] = dict(outer.programs) if outer else {}
        for site, program in programs.items():
            self.programs[site] = (*self.programs.get(site, ()), program)
        at: dict[Site, tuple[Reader, ...]] = {}
        for reader in self.readers:
            for site in reader.sites:
                at[site] = (*at.get(site, ()), reader)
        self.work = {
            site: (self.programs.get(site, ()), at.get(site, ())) for site in {*self.programs, *at}
        }
        # A monitor armed outside may look deeper than the read that wants to stop.
        self.stop_at = None if stop_at is None else max(stop_at, *at)
        self.expected = frozenset(
            site for site in self.work if self.stop_at is None or site <= self.stop_at
        )
        self.forwards = 0

    def count_forward(self) -> None:
        self.forwards += 1
        if self.outer is not None:
            self.outer.count_forward()

    def check_rows(self, frame: Frame) -> None:
        for n_rows in self.row_counts - {frame.call.n_chats}:
            raise PlanError(
                f"got {n_rows} per-row coefficients for a batch of {frame.call.n_chats}; give one "
                "number for all rows, or one for each"
            )


class Run:
    """A session acting in one forward."""

    __slots__ = ("ended", "fired", "frame", "owner", "session")

    def __init__(self, session: Session, frame: Frame, owner: int) -> None:
        self.session, self.frame, self.owner = session, frame, owner
        self.fired: Counter[Site] = Counter()
        self.ended = False

    def fire(self, site: Site, h: Tensor) -> Tensor | None:
        """Patch, then read. None leaves the residual as it is."""
        session, frame = self.session, self.frame
        work = session.work.get(site)
        if work is None:
            return None
        programs, readers = work
        rows = h if h.ndim == 3 else h.reshape(frame.batch, -1, h.shape[-1])
        if rows.shape[:2] != (frame.batch, frame.width):
            raise HookError(
                f"got rows {list(h.shape)} at {site} in a forward of {frame.batch} rows and "
                f"{frame.width} columns; packed rows cannot be told apart"
            )
        moved = rows
        for program in programs:
            moved = program.apply(moved, frame)
        if not self.ended:
            # A block that runs again after its forward is a checkpoint being recomputed: the
            # patch belongs to it, counts and readings were made the first time.
            self.fired[site] += 1
            for reader in readers:
                reader.take(site, rows if reader.before else moved, frame)
        if site == session.stop_at:
            self.end()
            raise ForwardStopped
        return None if moved is rows else moved.view(h.shape)

    def end(self) -> None:
        """Check that every site fired exactly once, then let the readers finish."""
        wrong = {site for site in self.session.expected if self.fired[site] != 1}
        if wrong:
            counts = ", ".join(f"{site}: {self.fired[site]}" for site in sorted(wrong))
            raise HookError(
                f"got a forward in which armed sites did not fire once each ({counts}); the model "
                "skipped or repeated blocks (layer drop, early exit): turn that off"
            )
        self.ended = True
        self.session.count_forward()
        for reader in self.session.readers:
            reader.end(self.frame)


class Armings:
    """Whether any plan is armed anywhere in the process.

    Compilers cannot look into a context variable, but they can guard a plain attribute: a model
    compiled while all is idle is compiled whole, and again when a plan is armed.
    """

    def __init__(self) -> None:
        self.idle = True
        self._count = 0
        self._lock = threading.Lock()

    def count(self, change: int) -> None:
        with self._lock:
            self._count += change
            self.idle = self._count == 0


ARMINGS = Armings()
ARMED: ContextVar[Mapping[int, Session] | None] = ContextVar("pvcore_armed", default=None)
RUN: ContextVar[Run | None] = ContextVar("pvcore_run", default=None)


def session_on(owner: int) -> Session | None:
    """The session armed on decoder `owner` in this context."""
    return (ARMED.get() or {}).get(owner)


class Recomputes:
    """Which run patched a checkpointed block, for the backward pass that recomputes it.

    Backward passes run later, in other threads and in any order, so neither a context variable
    nor the newest forward tells. The block is given the very tensor it was given before: its
    address does. Entries whose backward never comes are forgotten, the oldest first.
    """

    LIMIT = 1 << 16

    def __init__(self) -> None:
        self._runs: OrderedDict[tuple[Site, int], Run] = OrderedDict()
        self._lock = threading.Lock()

    def __bool__(self) -> bool:
        return bool(self._runs)

    def remember(self, site: Site, given: Tensor, run: Run) -> None:
        with self._lock:
            self._runs[site, given.data_ptr()] = run
            self._runs.move_to_end((site, given.data_ptr()))
            if len(self._runs) > self.LIMIT:
                self._runs.popitem(last=False)

    def find(self, site: Site, given: Tensor) -> Run | None:
        """The run that patched the block given this tensor; None where nothing did."""
        return self._runs.get((site, given.data_ptr()))

    def forget(self, site: Site, given: Tensor) -> None:
        """An unpatched forward was given this address: what was there before is gone."""
        with self._lock:
            self._runs.pop((site, given.data_ptr()), None)
