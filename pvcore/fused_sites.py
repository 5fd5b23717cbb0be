"""Fused sites: where a block's last add, the steering after it and the next RMSNorm are one op.

A block runs its own forward. Its MLP hands it a tensor that is added to like any other, except that
the op makes the sum, and with it the rows of the norm that reads it. What a block does with its
MLP's output but adding it stays ordinary arithmetic. Whether the block gives back that very sum,
and the next norm is given that very tensor, is looked at every time; else both go the ordinary way.
"""

from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from pvcore.frames import Frame
from pvcore.hooks import NO_BACKWARD, RECORDED, Post, Pre, Tapped
from pvcore.programs import Shift, SiteProgram
from pvcore.rms_norms import RmsNorm
from pvcore.runs import Run
from pvcore.sessions import Rows
from pvcore.sites import resid_post
from pvcore_kernels.routes import ops

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_current_backward = torch._C._current_graph_task_id
_modes = torch._C._len_torch_dispatch_stack
_transform = torch._C._functorch.maybe_current_level
_tracing = torch._C._get_tracing_state


class FusedNorms:
    """What a `fused_norms` block has done: `norms` counts those that the op made."""

    def __init__(self) -> None:
        self.norms = 0


class Move(NamedTuple):
    """What the op adds: `delta[row]`, and nothing to a row whose number is -1."""

    delta: Float[Tensor, "request d_model"]
    row: Int[Tensor, " rows"]
    steers: bool


class Made(NamedTuple):
    """What the op gave at a site: the residual, its normed rows, and the residual's version."""

    site: "FusedSite"
    moved: Rows
    normed: Rows
    version: int | None

    def holds(self, h: object) -> bool:
        """Whether `h` is that residual, and nobody has written into it."""
        return h is self.moved and _version(self.moved) == self.version


class Under:
    """A block under way in this context: what the one before it made, and what its own add makes.

    Once it is closed its MLP's output is a tensor like any other.
    """

    __slots__ = ("closed", "given", "made", "run", "site", "steered", "tally")

    def __init__(
        self, site: "FusedSite", given: Made | None, run: Run | None, tally: FusedNorms
    ) -> None:
        self.site, self.given, self.run, self.tally = site, given, run, tally
        self.made: Made | None = None
        self.steered = self.closed = False


UNDER: ContextVar[Under | None] = ContextVar("pvcore_fused_block", default=None)


class Late(Tensor):
    """An MLP's output, whose sum with a residual the op makes."""

    under: Under
    # All else gives plain tensors.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __add__(self, other: Any) -> Any:
        total = self.under.site.add(self, other, self.under)
        return Tensor.__add__(self, other) if total is None else total

    __radd__ = __add__


class FusedSite:
    """A block, its MLP, and the norm that reads its output."""

    def __init__(self, taps: Tapped, layer: int, mlp: nn.Module, norm: RmsNorm) -> None:
        self.block, self.mlp, self.norm, self.layer = taps.decoder.blocks[layer], mlp, norm, layer
        self.taps, self.key, self.depth = taps, taps.key, resid_post(layer).depth
        self._idle: tuple[object, Move] | None = None

    def post(self) -> Post | None:
        """The block's tap, where that is the only hook on its output."""
        hooks = tuple(self.block._forward_hooks.values())
        first = hooks[0] if len(hooks) == 1 else None
        return first if isinstance(first, Post) and first.taps is self.taps else None

    def is_free(self, run: Run | None) -> bool:
        """Whether nobody but taps looks at the block, and autograd does not record it."""
        block = self.block
        return not (
            block.training
            or torch.is_grad_enabled()
            or is_changed(block, taps=self.taps)
            or _current_backward() != NO_BACKWARD
            or (run.ended or run.frame.recorded if run else self._is_recorded())
            or torch_module._has_any_global_hook()  # type: ignore[no-untyped-call]
            or _tracing()
            or _modes()
            or _transform() is not None
            or torch._C._is_any_autocast_enabled()
        )

    def _is_recorded(self) -> bool:
        """Whether autograd records the forward with nothing armed, in which patches are known."""
        return bool(self.taps.recomputes.runs) and RECORDED.get()

    def add(self, x: Late, residual: Any, under: Under) -> Tensor | None:
        """The block's output, made by the op; None where an ordinary sum has to make it."""
        weight = self.norm.weight
        if (
            under.closed
            or under.made is not None
            or type(residual) is not Tensor
            or type(weight) is not nn.Parameter
            or residual.ndim != 3
            or (residual.shape, residual.dtype, residual.device) != (x.shape, x.dtype, x.device)
            or (weight.dtype, weight.device) != (x.dtype, x.device)
            or is_changed(self.norm.module)
        ):
            return None
        move = self._move(residual, under.run)
        if move is None:
            return None
        flat = x.as_subclass(Tensor).reshape(-1, x.shape[-1])
        normed, moved, _scores = ops().add_rmsnorm_steer_project.default(
            *(flat, residual.reshape(flat.shape), weight, self.norm.eps),
            *(move.delta, move.row, flat[:0], self.norm.offset),
        )
        total: Tensor = moved.view(x.shape)
        under.made = Made(self, total, normed.view(x.shape), _version(total))
        under.steered = move.steers
        return total

    def _move(self, h: Rows, run: Run | None) -> Move | None:
        """What the armed plan adds here; None where it does something else, or several do."""
        if run is None or self.depth not in run.session.work:
            return self._nothing(h)
        (programs, looks), frame = run.session.work[self.depth], run.frame
        if not programs:
            return self._nothing(h)
        if (
            len(programs) > 1
            # Those derived from it do more than they resolve to.
            or type(programs[0]) is not SiteProgram
            or any(look.before for look in looks)
            or h.shape[:2] != (frame.batch, frame.width)
        ):
            return None
        if not frame.steady:
            return self._resolved(programs[0], h, frame)
        key = (self, programs[0])
        if key not in frame.call.steady:
            frame.call.steady[key] = self._resolved(programs[0], h, frame)
        move: Move | None = frame.call.steady[key]
        return move

    def _resolved(self, program: SiteProgram, h: Rows, frame: Frame) -> Move | None:
        found = program.resolve(h.device, h.dtype, frame)
        if found is None:
            return self._nothing(h)
        return adding(found, h) if isinstance(found, Shift) else None

    def _nothing(self, h: Rows) -> Move:
        idle, key = self._idle, (h.shape, h.device)
        if idle is None or idle[0] != key:
            row = torch.full((h.shape[0] * h.shape[1],), -1, dtype=torch.int32, device=h.device)
            idle = key, Move(torch.zeros(1, h.shape[2], device=h.device), row, False)
            self._idle = idle
        return idle[1]


def adding(shift: Shift, h: Rows) -> Move:
    """A program that only adds, as the op takes it: each different row once."""
    batch, pos = shift.total.shape[:2]
    row = torch.arange(batch * pos, dtype=torch.int32, device=h.device).view(batch, pos)
    if shift.touched is not None:
        row = torch.where(shift.touched[..., 0], row, -1)
    row = row.expand(h.shape[:2]).to(torch.int32)
    return Move(shift.total.reshape(-1, h.shape[2]), row.reshape(-1).contiguous(), True)


def _version(h: Tensor) -> int | None:
    """How often a tensor was written into, which one of inference mode does not say."""
    return None if h.is_inference() else h._version


def is_changed(module: nn.Module, taps: Tapped | None = None) -> bool:
    """Whether a call of a module does more than its class's forward, and what these taps do."""
    own = module.__dict__
    if "forward" in own:
        return True
    hooks = [hook for name in _HOOKS for hook in tuple(own[name].values())]
    return not all(isinstance(hook, Post | Pre) and hook.taps is taps for hook in hooks)
