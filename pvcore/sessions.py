"""Sessions: armed plans, and what they do in a forward. Found in context variables, never shared.

A session belongs to the thread or task that armed it; a run of it belongs to one forward.
"""

import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from pvcore.errors import HookError, PlanError
from pvcore.frames import Call, Frame, Outcome
from pvcore.programs import SiteProgram
from pvcore.sites import Site

Rows = Float[Tensor, "batch pos d_model"]

# Given a residual, and the place of its site among the reader's sites.
Take = Callable[[int, Rows], None]
# Given a residual: what it becomes, or None where it stays.
Way = Callable[[Tensor], Tensor | None]


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
class Collector(Reader, Protocol):
    """A reader that keeps the newest rows of decode steps until somebody wants them."""

    def columns(self, frame: Frame) -> Sequence[list[Tensor]]:
        """For each site a list, the same one for a whole call, that is given the site's residual.

        What is in them may be taken out between forwards, and only by emptying them all.
        """


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


def _looks(readers: Sequence[Reader]) -> dict[Site, tuple[_Look, ...]]:
    looks: dict[Site, tuple[_Look, ...]] = {}
    for index, reader in enumerate(readers):
        for place, site in enumerate(reader.sites):
            look = _Look(reader=index, place=place, before=reader.before)
            looks[site] = (*looks.get(site, ()), look)
    return looks


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
        looks = _looks(self.readers)
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
        self.steered = [site.depth for site in self.expected if site in self.programs]
        # Whether decode steps need nobody to be asked again: what is done at a site is settled.
        self.settles = stop_at is None and all(
            isinstance(reader, Collector) and not reader.before for reader in self.readers
        )

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

    __slots__ = (
        "_columns",
        "_flat",
        "_held",
        "_settled",
        "_shape",
        "_takes",
        "_trail",
        "ended",
        "frame",
        "owner",
        "session",
        "straight",
        "within",
    )

    def __init__(
        self, session: Session, frame: Frame, owner: int, within: "Run | None" = None
    ) -> None:
        self.session, self.frame, self.owner = session, frame, owner
        # The run of another model whose forward this one is part of.
        self.within = within
        self._takes = [reader.begin(frame) for reader in session.readers]
        self._trail: list[int] = []
        self._shape: torch.Size | None = None
        self._flat = False
        self.ended = False
        # While a settled step runs: what to call with the residual at each depth.
        self.straight: Mapping[int, Way] | None = None
        self._settled: Mapping[int, Way] | None = None
        self._columns: list[Sequence[list[Tensor]]] = []
        self._held: list[int] = []

    def begin_step(self) -> None:
        """Act in the next decode step of the same call: only its column is new.

        The first step was asked in full; from then on each site has its way, and next to nothing
        is looked up on it.
        """
        self.frame.start += 1
        self._trail = []
        self.ended = False
        if self._settled is None and self.session.settles and not self._flat:
            self._columns = [
                reader.columns(self.frame)
                for reader in self.session.readers
                if isinstance(reader, Collector)
            ]
            self._settled = {depth: self._way(depth) for depth in self.session.trail}
        if self._settled is not None:
            self._held = [len(columns[0]) for columns in self._columns]
            self.straight = self._settled
        else:
            self._takes = [reader.begin(self.frame) for reader in self.session.readers]

    def _way(self, depth: int) -> Way:
        programs, looks = self.session.work[depth]
        sinks = [self._columns[look.reader][look.place].append for look in looks]
        if not programs and len(sinks) == 1:
            return sinks[0]
        moves = [move for move in (one.settled(self.frame) for one in programs) if move is not None]

        def way(h: Tensor) -> Tensor | None:
            if programs:
                self._trail.append(depth)
            moved = h
            for move in moves:
                moved = move(moved)
            for sink in sinks:
                sink(moved)
            return None if moved is h else moved

        return way

    def fire(self, depth: int, h: Tensor) -> Tensor | None:
        """Patch, then read. None leaves the residual as it is."""
        if self.straight is not None:
            way = self.straight.get(depth)
            return None if way is None else way(h)
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
        self._flat = self._flat or rows is not h
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
        if self.straight is not None:
            self.straight = None
            self._check_settled()
        elif self._trail != self.session.trail:
            self._refuse_trail(Counter(self._trail))
        self.ended = True
        self.session.count_forward()
        for reader in self.session.readers:
            reader.end(self.frame)

    def _check_settled(self) -> None:
        fits = len(self._trail) == len(self.session.steered) == len(set(self._trail))
        for columns, held in zip(self._columns, self._held, strict=True):
            for column in columns:
                fits = fits and len(column) == held + 1
        if fits:
            return
        fired = Counter(self._trail)
        for reader, columns, held in zip(
            self.session.readers, self._columns, self._held, strict=True
        ):
            for site, column in zip(reader.sites, columns, strict=True):
                if site not in self.session.programs:
                    fired[site.depth] = len(column) - held
        self._refuse_trail(fired)

    def _refuse_trail(self, fired: Mapping[int, int]) -> None:
        """Blocks may run in an order of their own, but each once."""
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
