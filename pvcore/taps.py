"""Taps: permanent hooks on a decoder's blocks. What they do is data, found in a context variable.

A hook is put on once and never taken off, so arming a plan touches no module: threads and
concurrent requests never see each other's plans, and nothing can be left behind. An idle tap
costs one context-variable read. This is the only module that registers torch hooks.
"""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from inspect import signature
from itertools import count
from typing import Any, no_type_check

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from pvcore.blocks import Decoder
from pvcore.errors import HookError
from pvcore.frames import Call, Outcome, begin_frame, goes_on, running
from pvcore.programs import SiteProgram
from pvcore.resident import Resident, traces
from pvcore.sessions import ARMED, ARMINGS, RUN, Reader, Recomputes, Run, Session, session_on
from pvcore.sessions import hold as hold_session
from pvcore.sites import Site, resid_post, resid_pre
from pvcore.turns import Turn


def _inert(*_: Any, **__: Any) -> None:
    """What a tap becomes in a copied or unpickled model: that model has not been tapped."""


class _Hook:
    """A hook that copies and pickles as one that does nothing.

    Every block of every token passes through `__call__`, so a subclass keeps to few steps there.
    """

    __slots__ = ("depth", "key", "name", "recomputes", "site", "taps")

    def __init__(self, taps: "Taps", site: Site) -> None:
        self.taps, self.site, self.depth, self.name = taps, site, site.depth, str(site)
        self.key, self.recomputes = taps.key, taps.recomputes

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return _inert_hook, ()

    def _run(self, block: nn.Module, args: tuple[Any, ...]) -> Run | None:
        """The run this hook acts for, if any: in a backward pass, that of the block's forward."""
        if _current_backward() != _NO_BACKWARD:
            return self.recomputes.find(self.site, args[0]) if args else None
        run = RUN.get()
        if run is not None and run.owner != self.key:
            run = None
        if block.training and args and getattr(block, "gradient_checkpointing", False):
            if run is not None and self.site in run.session.programs:
                self.recomputes.remember(self.site, args[0], run)
            else:
                self.recomputes.forget(self.site, args[0])
        return run


def _inert_hook() -> Any:
    return _inert


_current_backward = torch._C._current_graph_task_id
_NO_BACKWARD = -1


@no_type_check
def _asleep():
    """Traced: nothing can be armed. With gradients a backward pass may still recompute a patch."""
    return ARMINGS.idle and not torch.is_grad_enabled()


class _Post(_Hook):
    """On a block's output, a bare tensor or the first item of a tuple."""

    @no_type_check
    def __call__(self, block: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if is_dynamo_compiling():
            if traces(self.key, self.name):
                return self._traced(output)
            return None if _asleep() else _outside_graph(self._act, block, args, output)
        if not self.recomputes.runs and not block.training:
            run = RUN.get()
            if run is None or self.depth not in run.session.work:
                return None
        return self._act(block, args, output)

    @no_type_check
    def _traced(self, output):
        if isinstance(output, Tensor):
            return self.taps.resident.fire(self.name, output)
        moved = self.taps.resident.fire(self.name, output[0])
        return None if moved is None else (moved, *output[1:])

    def _act(self, block: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        run = self._run(block, args)
        if run is None:
            return None
        if isinstance(output, Tensor):
            return run.fire(self.depth, output)
        if not (isinstance(output, tuple) and output and torch.is_tensor(output[0])):
            raise HookError(f"got a block output of type {type(output).__name__}; wanted a tensor")
        moved = run.fire(self.depth, output[0])
        return None if moved is None else (moved, *output[1:])


class _Pre(_Hook):
    """On a block's input, its first positional argument or `hidden_states`."""

    @no_type_check
    def __call__(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if is_dynamo_compiling():
            if traces(self.key, self.name):
                return self._traced(args, kwargs)
            return None if _asleep() else _outside_graph(self._act, block, args, kwargs)
        if RUN.get() is None and not self.recomputes.runs:
            return None
        return self._act(block, args, kwargs)

    @no_type_check
    def _traced(self, args, kwargs):
        moved = self.taps.resident.fire(self.name, args[0] if args else kwargs["hidden_states"])
        if moved is None:
            return None
        return ((moved, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": moved})

    def _act(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        run = self._run(block, args)
        if run is None:
            return None
        moved = run.fire(self.depth, args[0] if args else kwargs["hidden_states"])
        if moved is None:
            return None
        after = resid_post(self.site.layer)
        if _current_backward() != _NO_BACKWARD and after in run.session.programs:
            # A recomputed block that is patched at both ends meets its own patched input there.
            self.recomputes.remember(after, moved, run)
        return ((moved, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": moved})


class _Mid(_Hook):
    """On the input of the norm before the MLP.

    The block keeps that same tensor as its residual branch, so the patch is written in place: a
    replaced input would change only what the MLP sees.
    """

    @no_type_check
    def __call__(self, _norm: nn.Module, args: tuple[Any, ...]) -> None:
        if is_dynamo_compiling():
            if traces(self.key, self.name):
                moved = self.taps.resident.fire(self.name, args[0])
                if moved is not None:
                    args[0].copy_(moved)
            elif not _asleep():
                _outside_graph(self._act, args[0])
        elif RUN.get() is not None:
            self._act(args[0])

    def _act(self, h: Tensor) -> None:
        run = RUN.get()
        if run is None or run.owner != self.key or _current_backward() != _NO_BACKWARD:
            return
        block = self.taps.decoder.blocks[self.site.layer]
        checkpointed = block.training and getattr(block, "gradient_checkpointing", False)
        if checkpointed and self.site in run.session.programs:
            raise HookError(
                f"got an intervention at {self.site} under gradient checkpointing, whose recompute "
                "would miss it; act at resid_pre or resid_post, or turn checkpointing off"
            )
        moved = run.fire(self.depth, h)
        if moved is not None:
            h.copy_(moved)


class _Begin(_Hook):
    """On the decoder itself: opens a frame where a session is armed."""

    __slots__ = ("names",)

    def __init__(self, taps: "Taps", names: tuple[str, ...]) -> None:
        super().__init__(taps, resid_pre(0))
        self.names = names

    @no_type_check
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if is_dynamo_compiling():
            if not traces(self.key, "begin") and not _asleep():
                _outside_graph(self._act, module, args, kwargs)
        elif ARMED.get() is not None or RUN.get() is not None:
            self._act(module, args, kwargs)

    def _act(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        session, last = session_on(self.key), RUN.get()
        given = dict(zip(self.names, args, strict=False)) | kwargs if args else kwargs
        if (
            last is not None
            and last.ended
            and last.session is session
            and last.owner == self.key
            and goes_on(last.frame, self.key, given)
        ):
            last.begin_step()
            return
        RUN.set(None)
        if session is None:
            return
        frame = begin_frame(self.key, given, training=module.training)
        session.check_rows(frame)
        RUN.set(Run(session, frame, self.key))


class _End(_Hook):
    """On the decoder itself: closes the frame."""

    @no_type_check
    def __call__(self, _module: nn.Module, _args: Any, _output: Any) -> None:
        if is_dynamo_compiling():
            if traces(self.key, "end"):
                self.taps.resident.finish()
            elif not _asleep():
                _outside_graph(self._act)
        elif RUN.get() is not None:
            self._act()

    def _act(self) -> None:
        run = RUN.get()
        if run is not None and run.owner == self.key and not run.ended:
            run.end()


def _outside_graph(act: Callable[..., Any], *args: Any) -> Any:
    """Call `act` between the graphs of a compiled model, where plans stay ordinary data."""
    return torch.compiler.disable(act)(*args)  # type: ignore[no-untyped-call]


_KEYS = count()
_TAPPING = threading.Lock()


class Taps:
    """The permanent hooks of one decoder."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self.key = next(_KEYS)
        self.recomputes = Recomputes()
        # What a compiled decode step traces into; the engine that compiles puts it here.
        self.resident: Resident | None = None
        self.turn = Turn()
        self._lock = threading.Lock()
        self._tapped: set[Site] = set()
        self._refuse_compiled("this model")
        torch.compiler.assume_constant_result(traces)  # type: ignore[no-untyped-call]
        names = tuple(signature(decoder.owner.forward).parameters)
        with ExitStack() as undo:
            for layer, block in enumerate(decoder.blocks):
                site = resid_post(layer)
                undo.callback(block.register_forward_hook(_Post(self, site)).remove)
                self._tapped.add(site)
            undo.callback(decoder.owner.register_forward_hook(_End(self, resid_pre(0))).remove)
            # Last, because `taps_of` knows a tapped decoder by this hook.
            begin = _Begin(self, names)
            decoder.owner.register_forward_pre_hook(begin, with_kwargs=True)
            undo.pop_all()

    def tap(self, site: Site) -> None:
        """Make sure a site can fire. `SiteError` where the model lacks it."""
        self.decoder.require(site)
        with self._lock:
            if site in self._tapped:
                return
            self._refuse_compiled(str(site))
            if site.kind == "resid_mid":
                norm = self.decoder.mid_norm(site.layer)
                norm.register_forward_pre_hook(_Mid(self, site))
            else:
                block = self.decoder.blocks[site.layer]
                block.register_forward_pre_hook(_Pre(self, site), with_kwargs=True)
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
        session = self._session(programs, readers, row_counts, stop_at)
        token = ARMED.set({**(ARMED.get() or {}), self.key: session})
        ARMINGS.count(1)
        try:
            yield session
        finally:
            ARMINGS.count(-1)
            ARMED.reset(token)
            RUN.set(None)
        if session.forwards == 0:
            raise HookError(
                "got an armed plan and no forward of the model inside its block; run the model "
                "inside it (a copy, or a compiled twin made earlier, does not count)"
            )

    def hold(
        self,
        programs: Mapping[Site, SiteProgram],
        *,
        lapsed: Callable[[], bool],
        readers: Sequence[Reader] = (),
        row_counts: frozenset[int] = frozenset(),
    ) -> Callable[[], None]:
        """Arm programs that act with gradients on until `lapsed`, or until the result is called."""
        return hold_session(self._session(programs, readers, row_counts, lapsed=lapsed), self.key)

    def _session(
        self,
        programs: Mapping[Site, SiteProgram],
        readers: Sequence[Reader] = (),
        row_counts: frozenset[int] = frozenset(),
        stop_at: Site | None = None,
        lapsed: Callable[[], bool] | None = None,
    ) -> Session:
        """A session on top of the one there is, with a tap at every site of it."""
        for site in {*programs, *(site for reader in readers for site in reader.sites)}:
            self.tap(site)
        return Session(
            programs,
            readers=readers,
            row_counts=row_counts,
            stop_at=stop_at,
            lapsed=lapsed,
            outer=session_on(self.key),
        )

    @contextmanager
    def calling(self, call: Call) -> Iterator[list[Outcome]]:
        """Declare the call of the forwards inside the block, and close it for every reader.

        A generation puts its outcome into the list.
        """
        session = session_on(self.key)
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
        return session_on(self.key) is not None


def taps_of(decoder: Decoder) -> Taps:
    """The taps of a decoder, put on the first time it is seen."""
    with _TAPPING:
        return _taps_on(decoder) or Taps(decoder)


def is_tapped(decoder: Decoder) -> bool:
    """Whether a decoder has its taps already."""
    with _TAPPING:
        return _taps_on(decoder) is not None


def _taps_on(decoder: Decoder) -> Taps | None:
    begins = (h for h in decoder.owner._forward_pre_hooks.values() if isinstance(h, _Begin))
    return next((begin.taps for begin in begins), None)
