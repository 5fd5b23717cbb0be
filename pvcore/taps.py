"""Taps: permanent hooks on a decoder's blocks. What they do is data, found in a context variable.

A hook is put on once and never taken off, so arming a plan touches no module: threads and
concurrent requests never see each other's plans, and nothing can be left behind. An idle tap
costs one context-variable read. This is the only module that registers torch hooks.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from inspect import signature
from itertools import count
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pvcore.blocks import Decoder
from pvcore.errors import HookError, PlanError
from pvcore.frames import Call, Frame, Outcome, begin_frame, running
from pvcore.programs import SiteProgram
from pvcore.sites import Site, resid_post, resid_pre

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


class _Running:
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


_ARMED: ContextVar[Mapping[int, Session] | None] = ContextVar("pvcore_armed", default=None)
_RUNNING: ContextVar[_Running | None] = ContextVar("pvcore_running", default=None)


def _session(owner: int) -> Session | None:
    """The session armed on a decoder in this context."""
    return (_ARMED.get() or {}).get(owner)


def _inert(*_: Any, **__: Any) -> None:
    """What a tap becomes in a copied or unpickled model: that model has not been tapped."""


class _Hook:
    """A hook that copies and pickles as one that does nothing."""

    __slots__ = ("owner", "site")

    def __init__(self, owner: int, site: Site) -> None:
        self.owner, self.site = owner, site

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return _inert_hook, ()

    def _fire(self, h: Tensor) -> Tensor | None:
        running = _RUNNING.get()
        if running is None or running.owner != self.owner:
            return None
        return running.fire(self.site, h)


def _inert_hook() -> Any:
    return _inert


class _Post(_Hook):
    """On a block's output, a bare tensor or the first item of a tuple."""

    def __call__(self, _module: nn.Module, _args: Any, output: Any) -> Any:
        return None if _RUNNING.get() is None else _outside_graph(self._act, output)

    def _act(self, output: Any) -> Any:
        if torch.is_tensor(output):
            return self._fire(output)
        if not (isinstance(output, tuple) and output and torch.is_tensor(output[0])):
            raise HookError(f"got a block output of type {type(output).__name__}; wanted a tensor")
        moved = self._fire(output[0])
        return None if moved is None else (moved, *output[1:])


class _Pre(_Hook):
    """On a block's input, its first positional argument or `hidden_states`."""

    def __call__(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return None if _RUNNING.get() is None else _outside_graph(self._act, args, kwargs)

    def _act(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        moved = self._fire(args[0] if args else kwargs["hidden_states"])
        if moved is None:
            return None
        return ((moved, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": moved})


class _Mid(_Hook):
    """On the input of the norm before the MLP.

    The block keeps that same tensor as its residual branch, so the patch is written in place: a
    replaced input would change only what the MLP sees.
    """

    def __call__(self, _module: nn.Module, args: tuple[Any, ...]) -> None:
        if _RUNNING.get() is not None:
            _outside_graph(self._act, args[0])

    def _act(self, h: Tensor) -> None:
        moved = self._fire(h)
        if moved is not None:
            h.copy_(moved)


class _Begin(_Hook):
    """On the decoder itself: opens a frame where a session is armed."""

    __slots__ = ("names", "taps")

    def __init__(self, taps: "Taps", names: tuple[str, ...]) -> None:
        super().__init__(taps.key, resid_pre(0))
        self.taps, self.names = taps, names

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if _ARMED.get() is not None or _RUNNING.get() is not None:
            _outside_graph(self._act, module, args, kwargs)

    def _act(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        _RUNNING.set(None)
        session = _session(self.owner)
        if session is None:
            return
        given = dict(zip(self.names, args, strict=False)) | kwargs
        frame = begin_frame(self.owner, given, training=module.training)
        session.check_rows(frame)
        for reader in session.readers:
            reader.begin(frame)
        _RUNNING.set(_Running(session, frame, self.owner))


class _End(_Hook):
    """On the decoder itself: closes the frame."""

    def __call__(self, _module: nn.Module, _args: Any, _output: Any) -> None:
        if _RUNNING.get() is not None:
            _outside_graph(self._act)

    def _act(self) -> None:
        running = _RUNNING.get()
        if running is not None and running.owner == self.owner and not running.ended:
            running.end()


def _outside_graph(act: Callable[..., Any], *args: Any) -> Any:
    """Call `act`; in a compiled model outside the graph, where plans stay ordinary data."""
    if torch.compiler.is_compiling():
        return torch.compiler.disable(act)(*args)  # type: ignore[no-untyped-call]
    return act(*args)


_KEYS = count()


class Taps:
    """The permanent hooks of one decoder."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self.key = next(_KEYS)
        self._tapped: set[Site] = set()
        self._refuse_compiled("this model")
        names = tuple(signature(decoder.owner.forward).parameters)
        decoder.owner.register_forward_pre_hook(_Begin(self, names), with_kwargs=True)
        decoder.owner.register_forward_hook(_End(self.key, resid_pre(0)))
        for layer, block in enumerate(decoder.blocks):
            block.register_forward_hook(_Post(self.key, resid_post(layer)))
            self._tapped.add(resid_post(layer))

    def tap(self, site: Site) -> None:
        """Make sure a site can fire. `SiteError` where the model lacks it."""
        self.decoder.require(site)
        if site in self._tapped:
            return
        self._refuse_compiled(str(site))
        hooked: nn.Module
        if site.kind == "resid_mid":
            hooked = self.decoder.mid_norm(site.layer)
            hooked.register_forward_pre_hook(_Mid(self.key, site))
        else:
            hooked = self.decoder.blocks[site.layer]
            hooked.register_forward_pre_hook(_Pre(self.key, site), with_kwargs=True)
        self._tapped.add(site)

    def _refuse_compiled(self, what: str) -> None:
        """A compiled module ignores hooks that come later, without a word: raise instead."""
        for module in self.decoder.root.modules():
            forward = module.__dict__.get("forward")
            if module._compiled_call_impl is not None or hasattr(
                forward, "_torchdynamo_orig_callable"
            ):
                raise HookError(
                    f"got {what} untapped in a model that is already compiled, which would ignore "
                    "it; make the HookedModel, and arm resid_pre and resid_mid sites once, before "
                    "torch.compile"
                )

    @contextmanager
    def armed(
        self,
        programs: Mapping[Site, SiteProgram],
        *,
        readers: Sequence[Reader] = (),
        row_counts: frozenset[int] = frozenset(),
        stop_at: Site | None = None,
    ) -> Iterator[Session]:
        """Run programs and readers in every forward of this decoder inside the block.

        Raises `HookError` on leaving if no forward ran, unless an error is already on its way.
        """
        for site in {*programs, *(site for reader in readers for site in reader.sites)}:
            self.tap(site)
        session = Session(
            programs,
            readers=readers,
            row_counts=row_counts,
            stop_at=stop_at,
            outer=_session(self.key),
        )
        token = _ARMED.set({**(_ARMED.get() or {}), self.key: session})
        try:
            yield session
        finally:
            _ARMED.reset(token)
            _RUNNING.set(None)
        if session.forwards == 0:
            raise HookError(
                "got an armed plan and no forward of the model inside its block; run the model "
                "inside it (a copy, or a compiled twin made earlier, does not count)"
            )

    @contextmanager
    def calling(self, call: Call) -> Iterator[list[Outcome]]:
        """Declare the call of the forwards inside the block, and close it for every reader.

        A generation puts its outcome into the list.
        """
        session = _session(self.key)
        readers = session.readers if session else ()
        outcomes: list[Outcome] = []
        finished = False
        try:
            with running(self.key, call):
                yield outcomes
            finished = True
        finally:
            for reader in readers:
                reader.close(call, outcomes[0] if finished and outcomes else None)

    def is_armed(self) -> bool:
        """Whether a plan is armed on this decoder in the current context."""
        return _session(self.key) is not None


def taps_of(decoder: Decoder) -> Taps:
    """The taps of a decoder, put on the first time it is seen."""
    for hook in decoder.owner._forward_pre_hooks.values():
        if isinstance(hook, _Begin):
            return hook.taps
    return Taps(decoder)
