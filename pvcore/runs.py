"""Runs: an armed session acting in one forward, or in the decode steps of one call."""

from collections import Counter
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from pvcore.errors import HookError
from pvcore.frames import DECLARED, Frame, columns_unseen
from pvcore.sessions import ARMED, Collector, ForwardStopped, Rows, Session

# Given a residual: what it becomes, or None where it stays.
Way = Callable[[Tensor], Tensor | None]


class Run:
    """A session acting in one forward."""

    __slots__ = (
        "_armed",
        "_calls",
        "_columns",
        "_flat",
        "_held",
        "_settled",
        "_shape",
        "_step",
        "_takes",
        "_trail",
        "began",
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
        # The number of the first autograd node that it may record.
        self.began = 0
        self._takes = [reader.begin(frame) for reader in session.readers]
        self._trail: list[int] = []
        self._shape: torch.Size | None = None
        self._flat = False
        self.ended = False
        # While a settled step runs: what to call with the residual at each depth.
        self.straight: Mapping[int, Way] | None = None
        self._settled: Mapping[int, Way] | None = None

    def begin_step(self) -> None:
        """Act in the next decode step of the same call: only its column is new."""
        self.frame.start += 1
        self._trail.clear()
        self.ended = False
        if self.session.settles and not self._flat:
            self._settle()
        else:
            self._takes = [reader.begin(self.frame) for reader in self.session.readers]

    def _settle(self) -> None:
        """Work out what is done at each site, now that a decode step was asked in full.

        The steps that follow look at next to nothing else.
        """
        if self._settled is None:
            self._columns = [
                reader.columns(self.frame)
                for reader in self.session.readers
                if isinstance(reader, Collector)
            ]
            self._step = torch.Size((self.frame.batch, 1))
            self._settled = {depth: self._way(depth) for depth in self.session.trail}
        self._armed, self._calls = ARMED.get(), DECLARED.get()
        self._held = [one.taken + len(one.rows[0]) for one in self._columns]
        self.straight = self._settled

    def goes_on(self, given: Mapping[str, Any]) -> bool:
        """Begin the next settled step, if that is what a forward of these arguments is."""
        if (
            self._settled is None
            or not self.ended
            or ARMED.get() is not self._armed
            or DECLARED.get() is not self._calls
        ):
            return False
        tokens = given.get("input_ids")
        if tokens is None or tokens.shape != self._step:
            return False
        if given.get("past_key_values") is not self.frame.cache:
            return False
        self.frame.start += 1
        self._held = [one.taken + len(one.rows[0]) for one in self._columns]
        self._trail.clear()
        self.ended = False
        self.straight = self._settled
        return True

    def end_step(self) -> None:
        """The end of a settled step."""
        self.straight = None
        steered = self.session.steered
        if self._trail != steered and sorted(self._trail) != steered:
            self._refuse_settled()
        for columns, held in zip(self._columns, self._held, strict=True):
            wanted = held + 1 - columns.taken
            for rows in columns.rows:
                if len(rows) != wanted:
                    self._refuse_settled()
        self.ended = True
        for reader in self.session.readers:
            reader.end(self.frame)

    def _way(self, depth: int) -> Way:
        programs, looks = self.session.work[depth]
        trail = self._trail
        sinks = [self._columns[look.reader].rows[look.place].append for look in looks]
        if not programs and len(sinks) == 1:
            return sinks[0]
        moves = [move for move in (one.settled(self.frame) for one in programs) if move is not None]

        def way(h: Tensor) -> Tensor | None:
            if programs:
                trail.append(depth)
            moved = h
            for move in moves:
                moved = move(moved)
            for program in programs[:-1]:
                program.look(moved, self.frame)
            for sink in sinks:
                sink(moved)
            return None if moved is h else moved

        return way

    def fire(self, depth: int, h: Tensor, *, patched: bool = False) -> Tensor | None:
        """Patch, then read. None leaves the residual as it is, one that comes `patched` always."""
        if self.straight is not None:
            if patched:
                self._read_settled(depth, h)
                return None
            way = self.straight.get(depth)
            return None if way is None else way(h)
        work = self.session.work.get(depth)
        if work is None:
            return None
        programs, looks = work
        rows = h if h.shape == self._shape else self._rows(depth, h)
        moved = rows
        for program in () if patched else programs:
            moved = program.apply(moved, self.frame)
        if len(programs) > 1 and not patched:
            for program in programs[:-1]:
                program.look(moved, self.frame)
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

    def _read_settled(self, depth: int, h: Tensor) -> None:
        """What a settled way does after its moves."""
        programs, looks = self.session.work.get(depth, ((), ()))
        if programs:
            self._trail.append(depth)
        for look in looks:
            self._columns[look.reader].rows[look.place].append(h)

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
            self.end_step()
            return
        if self._trail != self.session.trail:
            self._refuse_trail(Counter(self._trail))
        self.ended = True
        self.session.note_forward()
        for reader in self.session.readers:
            reader.end(self.frame)

    def _refuse_settled(self) -> None:
        fired = Counter(self._trail)
        for reader, columns, held in zip(
            self.session.readers, self._columns, self._held, strict=True
        ):
            for site, rows in zip(reader.sites, columns.rows, strict=True):
                if site not in self.session.programs:
                    fired[site.depth] = columns.taken + len(rows) - held
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


RUN: ContextVar[Run | None] = ContextVar("pvcore_run", default=None)


def unseen(session: Session, owner: int) -> int:
    """How many columns came into the newest forward's cache that a session did not see."""
    run = RUN.get()
    if run is None or run.owner != owner or not run.ended:
        return 0
    own: Session | None = run.session
    while own is not None and own.identity is not session.identity:
        own = own.outer
    return 0 if own is None else columns_unseen(run.frame)


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
