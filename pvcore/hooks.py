"""Hooks: what torch calls at a tapped module, and how that finds the plan to run.

An idle hook costs one context-variable read. Registering them is `taps`' work.
"""

from collections.abc import Callable
from contextvars import ContextVar
from itertools import count
from typing import Any, no_type_check

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from pvcore.blocks import Decoder
from pvcore.errors import HookError
from pvcore.frames import begin_frame, goes_on, tokens_of
from pvcore.recomputes import Recomputes, node_number
from pvcore.resident import Resident, traces
from pvcore.runs import RUN, Run
from pvcore.sessions import ARMED, ARMINGS, session_on
from pvcore.sites import Site, resid_post, resid_pre

_KEYS = count()


class Tapped:
    """What the hooks of one decoder share."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self.key = next(_KEYS)
        self.recomputes = Recomputes()
        # What a compiled decode step traces into; the engine that compiles puts it here.
        self.resident: Resident | None = None


def _inert(*_: Any, **__: Any) -> None:
    """What a tap becomes in a copied or unpickled model: that model has not been tapped."""


class Hook:
    """A hook that copies and pickles as one that does nothing.

    Every block of every token passes through `__call__`, so a subclass keeps to few steps there.
    """

    __slots__ = ("depth", "key", "name", "recomputes", "site", "taps")

    def __init__(self, taps: Tapped, site: Site) -> None:
        self.taps, self.site, self.depth, self.name = taps, site, site.depth, str(site)
        self.key, self.recomputes = taps.key, taps.recomputes

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return _inert_hook, ()

    def _run(self, args: tuple[Any, ...]) -> Run | None:
        """The run this hook acts for, if any: in a backward pass, that of the block's forward."""
        if _current_backward() != NO_BACKWARD:
            patched = self.recomputes.find(self.site, args[0]) if args else None
            if patched is None:
                self.recomputes.refuse_copy(self.site)
            return patched
        run = RUN.get()
        if run is not None and run.owner != self.key:
            run = None
        known = RECORDED.get() if run is None else run.frame.recorded
        if not args or not (known or torch.is_grad_enabled()):
            return run
        if run is not None and self.site in run.session.programs:
            # Whoever checkpoints need not say so; where nothing is recomputed, nothing asks.
            self.recomputes.remember(self.site, args[0], run)
        elif self.recomputes.runs:
            self.recomputes.forget(self.site, args[0])
        return run


def _inert_hook() -> Any:
    return _inert


# Whether autograd records the forward that began last with nothing armed; told from the decoder's
# own hook, as reentrant checkpointing turns gradients off around each block.
RECORDED: ContextVar[bool] = ContextVar("pvcore_recorded", default=False)
_current_backward = torch._C._current_graph_task_id
NO_BACKWARD = -1


@no_type_check
def _asleep():
    """Traced: nothing can be armed. With gradients a backward pass may still recompute a patch."""
    return ARMINGS.idle and not torch.is_grad_enabled()


class Post(Hook):
    """On a block's output, a bare tensor or the first item of a tuple."""

    @no_type_check
    def __call__(self, block: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if is_dynamo_compiling():
            if traces(self.key, self.name):
                return self._traced(output)
            return None if _asleep() else _outside_graph(self._act, args, output)
        if not self.recomputes.runs and not block.training:
            run = RUN.get()
            if run is None or self.depth not in run.session.work:
                return None
        return self._act(args, output)

    @no_type_check
    def _traced(self, output):
        if isinstance(output, Tensor):
            return self.taps.resident.fire(self.name, output)
        moved = self.taps.resident.fire(self.name, output[0])
        return None if moved is None else (moved, *output[1:])

    def _act(self, args: tuple[Any, ...], output: Any) -> Any:
        run = self._run(args)
        if run is None:
            return None
        if isinstance(output, Tensor):
            return run.fire(self.depth, output)
        if not (isinstance(output, tuple) and output and torch.is_tensor(output[0])):
            raise HookError(f"got a block output of type {type(output).__name__}; wanted a tensor")
        moved = run.fire(self.depth, output[0])
        return None if moved is None else (moved, *output[1:])


class Pre(Hook):
    """On a block's input, its first positional argument or `hidden_states`."""

    @no_type_check
    def __call__(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if is_dynamo_compiling():
            if traces(self.key, self.name):
                return self._traced(args, kwargs)
            return None if _asleep() else _outside_graph(self._act, args, kwargs)
        if RUN.get() is None and not self.recomputes.runs and not block.training:
            return None
        return self._act(args, kwargs)

    @no_type_check
    def _traced(self, args, kwargs):
        moved = self.taps.resident.fire(self.name, args[0] if args else kwargs["hidden_states"])
        if moved is None:
            return None
        return ((moved, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": moved})

    def _act(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        run = self._run(args)
        if run is None:
            return None
        moved = run.fire(self.depth, args[0] if args else kwargs["hidden_states"])
        if moved is None:
            return None
        after = resid_post(self.site.layer)
        if _current_backward() != NO_BACKWARD and after in run.session.programs:
            # A recomputed block that is patched at both ends meets its own patched input there.
            self.recomputes.remember(after, moved, run)
        return ((moved, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": moved})


class Mid(Hook):
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
        if run is None or run.owner != self.key or _current_backward() != NO_BACKWARD:
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


class Begin(Hook):
    """On the decoder itself: opens a frame where a session is armed."""

    __slots__ = ("names",)

    def __init__(self, taps: Tapped, names: tuple[str, ...]) -> None:
        super().__init__(taps, resid_pre(0))
        self.names = names

    @no_type_check
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if is_dynamo_compiling():
            if not traces(self.key, "begin") and not _asleep():
                _outside_graph(self._act, module, args, kwargs)
            return
        run = RUN.get()
        if run is not None and run.owner == self.key and not args and run.goes_on(kwargs):
            return
        if run is not None or ARMED.get() is not None or self.recomputes.runs:
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
        tokens = tokens_of(given)
        if _current_backward() != NO_BACKWARD:
            self._refuse_recompute(tokens)
        elif self.recomputes.runs:
            self.recomputes.prune()
            RECORDED.set(torch.is_grad_enabled())
            if tokens is not None:
                self.recomputes.forget("decoder", tokens)
        within = last if last is not None and last.owner != self.key and not last.ended else None
        RUN.set(within)
        if session is None:
            return
        packed = session.takes_packed(module.training)
        frame = begin_frame(self.key, given, training=module.training, packed=packed)
        session.check_rows(frame)
        run = Run(session, frame, self.key, within)
        if frame.recorded and session.programs and tokens is not None:
            self.recomputes.remember("decoder", tokens, run)
        run.began = node_number()
        RUN.set(run)

    def _refuse_recompute(self, tokens: Tensor | None) -> None:
        """A checkpoint around the decoder runs every block on tensors of its own: none is known."""
        if tokens is not None and self.recomputes.find("decoder", tokens) is not None:
            raise HookError(
                "got a steered forward that a checkpoint around the whole decoder runs again, where"
                " it cannot be steered alike; checkpoint its blocks instead, as "
                "gradient_checkpointing_enable() does"
            )


class End(Hook):
    """On the decoder itself: closes the frame."""

    @no_type_check
    def __call__(self, _module: nn.Module, _args: Any, _output: Any) -> None:
        if is_dynamo_compiling():
            if traces(self.key, "end"):
                self.taps.resident.finish()
            elif not _asleep():
                _outside_graph(self._act)
            return
        run = RUN.get()
        if run is None:
            return
        if run.straight is not None and run.owner == self.key:
            run.end_step()
        else:
            self._act()

    def _act(self) -> None:
        run = RUN.get()
        while run is not None and run.owner != self.key:
            run = run.within  # a forward inside this one failed, and its error was swallowed
        if run is None or run.ended:
            return
        RUN.set(run)
        run.end()
        if run.frame.recorded and run.session.programs and _current_backward() == NO_BACKWARD:
            self.recomputes.note(run.began, run.session.programs)
        if run.within is not None:
            RUN.set(run.within)


def _outside_graph(act: Callable[..., Any], *args: Any) -> Any:
    """Call `act` between the graphs of a compiled model, where plans stay ordinary data."""
    return torch.compiler.disable(act)(*args)  # type: ignore[no-untyped-call]
