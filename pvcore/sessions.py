"""Sessions: armed plans, and what they do in a forward. Found in context variables, never shared.

A session belongs to the thread or task that armed it; a run of it belongs to one forward.
"""

import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from pvcore.errors import HookError, PlanError
from pvcore.frames import Call, Frame, Outcome
from pvcore.programs import SiteProgram
from pvcore.sites import Site

Rows = Float[Tensor, "batch pos d_model"]

# Given a residual, and the place of its site among the reader's sites.
Take = Callable[[int, Rows], None]


@runtime_checkable
class Reader(Protocol):
    """Something that looks at residuals. `before` asks for them ahead of all interventions."""

    @property
    def sites(self) -> tuple[Site, ...]: ...

    @property
    def before(self) -> bool: ...

    def begin(self, frame: Frame) -> Take:
        """What to call with each of this forward's residuals, in the order they come."""

    def end(self, frame: Frame) -> None:
        """The forward is over, and every site was seen once."""

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


class _Look(NamedTuple):
    """Which reader looks at a site, the site's place among its sites, and whether at the start."""

    reader: int
    place: int
    before: bool


class Session:
    """One armed plan: its programs and readers, on top of the sessions armed before it."""

    def __init__(
        self,
        programs: Mapping[Site, SiteProgram],
        *,
        readers: Sequence[Reader] = (),
        row_counts: frozenset[int] = frozenset(),
        stop_at: Site | None = None,
        lapsed: Callable[[], bool] | None = None,
        outer: "Session | None" = None,
    ) -> None:
        self.outer = outer
        self._own = (programs, tuple(readers), row_counts, stop_at, lapsed)
        # Shared with what takes this session's place when one below it is taken off.
        self.identity, self._tally = object(), [0]
        # Asked where nothing else could take the session off: it counts as gone once this is true.
        self.lapsed = lapsed
        self.row_counts: frozenset[int] = row_counts | (outer.row_counts if outer else frozenset())
        self.readers: tuple[Reader, ...] = (*(outer.readers if outer else ()), *readers)
        self.programs: dict[Site, tuple[SiteProgram, ...]] = dict(outer.programs) if outer else {}
        for site, program in programs.items():
            self.programs[site] = (*self.programs.get(site, ()), program)
        looks: dict[Site, tuple[_Look, ...]] = {}
        for index, reader in enumerate(self.readers):
            for place, site in enumerate(reader.sites):
                look = _Look(reader=index, place=place, before=reader.before)
                looks[site] = (*looks.get(site, ()), look)
        sites = sorted({*self.programs, *looks})
        # By depth, because a number is found faster than a site, at every block of every token.
        self.work = {
            site.depth: (self.programs.get(site, ()), looks.get(site, ())) for site in sites
        }
        # A monitor armed outside may look deeper than the read that wants to stop.
        deepest = None if stop_at is None else max(stop_at, *looks)
        self.stop_at = None if deepest is None else deepest.depth
        self.expected = tuple(site for site in sites if deepest is None or site <= deepest)
        self.trail = [site.depth for site in self.expected]

    def takes_packed(self, training: bool) -> bool:
        """Whether nothing here needs to tell conversations apart that share a row.

        In training every token is treated alike, and spans that ask for more are refused.
        """
        programs = (one for here in self.programs.values() for one in here)
        return not self.readers and (training or all(one.trains_only for one in programs))

    def over(self, outer: "Session | None") -> "Session":
        """The same session on top of another."""
        programs, readers, row_counts, stop_at, lapsed = self._own
        session = Session(
            programs,
            readers=readers,
            row_counts=row_counts,
            stop_at=stop_at,
            lapsed=lapsed,
            outer=outer,
        )
        session.identity, session._tally = self.identity, self._tally
        return session

    @property
    def forwards(self) -> int:
        """How many forwards it acted in."""
        return self._tally[0]

    def count_forward(self) -> None:
        self._tally[0] += 1
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

    __slots__ = ("_shape", "_takes", "_trail", "ended", "frame", "owner", "session", "within")

    def __init__(
        self, session: Session, frame: Frame, owner: int, within: "Run | None" = None
    ) -> None:
        self.session, self.frame, self.owner = session, frame, owner
        # The run of another model whose forward this one is part of.
        self.within = within
        self._takes = [reader.begin(frame) for reader in session.readers]
        self._trail: list[int] = []
        self._shape: torch.Size | None = None
        self.ended = False

    def begin_step(self) -> None:
        """Act in the next decode step of the same call: only its column is new."""
        self.frame.start += 1
        self._trail = []
        self._takes = [reader.begin(self.frame) for reader in self.session.readers]
        self.ended = False

    def fire(self, depth: int, h: Tensor) -> Tensor | None:
        """Patch, then read. None leaves the residual as it is."""
        work = self.session.work.get(depth)
        if work is None:
            return None
        programs, looks = work
        rows = h if h.shape == self._shape else self._rows(depth, h)
        moved = rows
        for program in programs:
            moved = program.apply(moved, self.frame)
        if not self.ended:
            # A block that runs again after its forward is a checkpoint being recomputed: the
            # patch belongs to it, counts and readings were made the first time.
            self._trail.append(depth)
            for reader, place, before in looks:
                self._takes[reader](place, rows if before else moved)
        if depth == self.session.stop_at:
            self.end()
            raise ForwardStopped
        if moved is rows:
            return None
        return moved if rows is h else moved.view(h.shape)

    def _rows(self, depth: int, h: Tensor) -> Rows:
        """The residual as `[batch, pos, d_model]`; checked once for all that have its shape."""
        frame = self.frame
        rows = h if h.ndim == 3 else h.reshape(frame.batch, -1, h.shape[-1])
        if rows.shape[:2] != (frame.batch, frame.width):
            site = next(site for site in self.session.expected if site.depth == depth)
            raise HookError(
                f"got rows {list(h.shape)} at {site} in a forward of {frame.batch} rows and "
                f"{frame.width} columns; packed rows cannot be told apart"
            )
        self._shape = rows.shape
        return rows

    def end(self) -> None:
        """Check that every site fired exactly once, then let the readers finish."""
        if self._trail != self.session.trail:
            self._refuse_trail()
        self.ended = True
        self.session.count_forward()
        for reader in self.session.readers:
            reader.end(self.frame)

    def _refuse_trail(self) -> None:
        """Blocks may run in an order of their own, but each once."""
        fired = Counter(self._trail)
        wrong = [site for site in self.session.expected if fired[site.depth] != 1]
        if wrong:
            counts = ", ".join(f"{site}: {fired[site.depth]}" for site in wrong)
            raise HookError(
                f"got a forward in which armed sites did not fire once each ({counts}); the model "
                "skipped or repeated blocks (layer drop, early exit): turn that off"
            )


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
    """The session armed on decoder `owner` in this context; one that has lapsed is none."""
    session = (ARMED.get() or {}).get(owner)
    while session is not None and session.lapsed is not None and session.lapsed():
        session = session.outer
    return session


def disarm(session: Session, owner: int) -> bool:
    """Take a session off; those armed on top of it stay. False where this context has none."""
    above = []
    armed = ARMED.get() or {}
    top = armed.get(owner)
    while top is not None and top.identity is not session.identity:
        above.append(top)
        top = top.outer
    run = RUN.get()
    own = run is not None and run.owner == owner
    if run is not None and own and (run.ended or run.session.identity is session.identity):
        RUN.set(run.within)
    if top is None:
        return False
    left = top.outer
    for one in reversed(above):
        left = one.over(left)
    others = {key: one for key, one in armed.items() if key != owner}
    ARMED.set((others if left is None else {**others, owner: left}) or None)
    return True


def hold(session: Session, owner: int) -> Callable[[], None]:
    """Arm a session without a block, for callbacks; the result takes it off.

    Other plans may come and go meanwhile, in any order: one armed on top of it stays.
    """
    ARMED.set({**(ARMED.get() or {}), owner: session})

    def release() -> None:
        session.lapsed = lambda: True
        others = {key: one for key, one in (ARMED.get() or {}).items() if key != owner}
        left = session_on(owner)
        ARMED.set((others if left is None else {**others, owner: left}) or None)

    return release


class Recomputes:
    """Which run patched a checkpointed block, for the backward pass that recomputes it.

    Backward passes run later, in other threads and in any order, so neither a context variable
    nor the newest forward tells. The block is given the very tensor it was given before: its
    storage does, as long as that lives. Entries whose backward never comes go with it.
    """

    LIMIT = 1 << 16

    def __init__(self) -> None:
        # Public, because an idle tap looks at every block whether there are any.
        self.runs: OrderedDict[tuple[Site, int], tuple[StorageWeakRef, Run]] = OrderedDict()
        self._lock = threading.Lock()

    def remember(self, site: Site, given: Tensor, run: Run) -> None:
        storage = StorageWeakRef(given.untyped_storage())  # type: ignore[no-untyped-call]
        with self._lock:
            self.runs[site, given.data_ptr()] = storage, run
            self.runs.move_to_end((site, given.data_ptr()))
            if len(self.runs) > self.LIMIT:
                self.runs.popitem(last=False)

    def find(self, site: Site, given: Tensor) -> Run | None:
        """The run that patched the block given this tensor; None where nothing did.

        An address says nothing by itself: another tensor may have taken it over.
        """
        known = self.runs.get((site, given.data_ptr()))
        if known is None or known[0].cdata != given.untyped_storage()._cdata:
            return None
        return known[1]

    def forget(self, site: Site, given: Tensor) -> None:
        """An unpatched forward was given this address: what was there before is gone."""
        with self._lock:
            self.runs.pop((site, given.data_ptr()), None)

    def prune(self) -> None:
        """Let go of blocks whose tensors are gone: no backward pass can recompute them."""
        with self._lock:
            gone = [key for key, (storage, _) in self.runs.items() if _expired(storage)]
            for key in gone:
                del self.runs[key]


def _expired(storage: StorageWeakRef) -> bool:
    return bool(storage.expired())  # type: ignore[no-untyped-call]
