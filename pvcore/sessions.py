"""Sessions: armed plans, and what they do in a forward. Found in context variables, never shared.

A session belongs to the thread or task that armed it; a run of it belongs to one forward.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from pvcore.errors import PlanError
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


class Columns:
    """For each site a list that is given its residual in every step, and how many were taken out.

    Only whole steps are taken out, also while one is under way.
    """

    __slots__ = ("rows", "taken")

    def __init__(self, n_sites: int) -> None:
        self.rows: list[list[Tensor]] = [[] for _ in range(n_sites)]
        self.taken = 0

    def take(self) -> list[tuple[Tensor, ...]]:
        """The rows of every whole step that is kept, step by step."""
        count = min(map(len, self.rows))
        steps = list(zip(*(rows[:count] for rows in self.rows), strict=True))
        for rows in self.rows:
            del rows[:count]
        self.taken += count
        return steps


class Copies(list[Tensor]):
    """Rows of a model that goes on writing where they lie."""

    def append(self, row: Tensor) -> None:
        super().append(row.clone())


@runtime_checkable
class Collector(Reader, Protocol):
    """A reader that keeps the newest rows of decode steps until somebody wants them."""

    def columns(self, frame: Frame) -> "Columns":
        """What takes the residuals of this call's decode steps, the same for all of them."""


@runtime_checkable
class Scorer(Reader, Protocol):
    """A reader that wants projections only, which a compiled decode step can make for it."""

    @property
    def n_vec(self) -> int: ...

    def units(
        self, device: torch.device, dtype: torch.dtype
    ) -> Float[Tensor, "site n_vec d_model"]: ...

    def settle(self, call: Call, fetch: Callable[[], None]) -> None:
        """The prompt of a call is done: what it showed may leave the device.

        `fetch` brings the scores of all steps made so far, for one who cannot wait for them.
        """

    def receive(self, call: Call, steps: Float[Tensor, "step site batch n_vec"]) -> None:
        """Scores of the next decode steps of a call, on the CPU."""


@runtime_checkable
class Folder(Scorer, Protocol):
    """A scorer that may want its scores summed up where they are made."""

    @property
    def folds(self) -> bool:
        """Whether it does, and takes them by `fold` in place of `receive`."""

    def fold(self, call: Call, steps: Float[Tensor, "step site batch n_vec"]) -> None:
        """Scores of the next decode steps of a call, on their device. They are written over later
        on: it may keep none of them, and must not wait for the device.
        """


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
        self.identity, self._acted = object(), [False]
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
        self.settles: bool = (
            stop_at is None
            and lapsed is None
            and (outer is None or outer.settles)
            and all(isinstance(one, Collector) and not one.before for one in readers)
        )

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
        session.identity, session._acted = self.identity, self._acted
        return session

    @property
    def acted(self) -> bool:
        """Whether a forward ran under it to its end."""
        return self._acted[0]

    def note_forward(self) -> None:
        self._acted[0] = True
        if self.outer is not None:
            self.outer.note_forward()

    def check_rows(self, frame: Frame) -> None:
        for n_rows in self.row_counts - {frame.call.n_chats}:
            raise PlanError(
                f"got {n_rows} per-row coefficients for a batch of {frame.call.n_chats}; give one "
                "number for all rows, or one for each"
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


def session_on(owner: int) -> Session | None:
    """The session armed on decoder `owner` in this context; one that has lapsed is none."""
    session = (ARMED.get() or {}).get(owner)
    while session is not None and session.lapsed is not None and session.lapsed():
        session = session.outer
    return session


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
