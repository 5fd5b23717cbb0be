"""Lanes: the short way through a tapped module.

torch leads a module with any hook through a path that costs several times what an idle tap does.
A lane sits in the slot of `Module.__call__` that `Module.compile` fills: it runs the forward and
the taps itself while those are the module's only hooks, and hands over to torch for all else. The
hooks stay where they are, and act wherever there is no lane: in compiled code, beside somebody
else's hooks, after the slot was given to another. torch drops the slot when it copies or pickles a
module, as a copy is untapped.
"""

from collections.abc import Callable, Mapping
from typing import Any, Protocol, no_type_check

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling
from torch.nn.modules.module import (
    _global_backward_hooks,
    _global_backward_pre_hooks,
    _global_forward_hooks,
    _global_forward_pre_hooks,
)
from torch.utils.hooks import RemovableHandle

_tracing = torch._C._get_tracing_state
# On every function of pvcore's in the slot: what has it is not compiled.
MARK = "pvcore_lane"


def safe() -> bool:
    """Whether lanes stay with their modules.

    `DataParallel`, which a trainer uses by itself where there are several GPUs, copies the slot
    into its replicas: their lanes would lead to the original.
    """
    return torch.cuda.device_count() <= 1


def has_lane(module: nn.Module) -> bool:
    """Whether calls of a module take a lane."""
    return hasattr(module._compiled_call_impl, MARK)


def is_compiled(module: nn.Module) -> bool:
    """Whether somebody compiled a module in place."""
    compiled = module._compiled_call_impl is not None and not has_lane(module)
    return compiled or hasattr(module.__dict__.get("forward"), "_torchdynamo_orig_callable")


def give_lane(
    module: nn.Module,
    *,
    before: tuple[RemovableHandle, Callable[..., Any]] | None = None,
    after: tuple[RemovableHandle, Callable[..., Any]],
) -> None:
    """Lead calls of `module` past torch's hooks where it has only these.

    `before` is a pre-hook that takes keyword arguments and changes none, `after` a forward hook,
    both with their handles.
    """
    last, end = after[0].id, after[1]
    first, begin = (None, None) if before is None else (before[0].id, before[1])

    @no_type_check
    def lane(*args, **kwargs):
        pre, post = module._forward_pre_hooks, module._forward_hooks
        if (
            is_dynamo_compiling()
            or len(post) != 1
            or last not in post
            or (len(pre) != 1 or first not in pre if begin else pre)
            or module._backward_hooks
            or module._backward_pre_hooks
            or _global_forward_hooks
            or _global_forward_pre_hooks
            or _global_backward_hooks
            or _global_backward_pre_hooks
            or _tracing()
        ):
            return module._call_impl(*args, **kwargs)
        if begin:
            begin(module, args, kwargs)
        output = module.forward(*args, **kwargs)
        moved = end(module, args, output)
        return output if moved is None else moved

    setattr(lane, MARK, True)
    module._compiled_call_impl = lane


class Straight(Protocol):
    """A run of a plan, and where in it something can be done straight away."""

    owner: int
    straight: Mapping[int, Callable[[Tensor], Tensor | None]] | None


def give_block_lane(
    block: nn.Module,
    *,
    after: tuple[RemovableHandle, Callable[..., Any]],
    place: tuple[int, int],
    running: Callable[[], Straight | None],
    recomputes: Mapping[Any, Any],
) -> None:
    """Lead calls of a block past torch's hooks where `after` is its only one.

    `place` is the decoder's key and the depth of the block's output. What a run does there straight
    away is done here: between two blocks a model's weights drive all else out of the processor's
    caches, so that each object looked at costs more than what is done with it. The hook itself is
    called where there is more to see to.
    """
    lane = _block_lane(block, after[0].id, after[1], *place, running, recomputes)
    setattr(lane, MARK, True)
    block._compiled_call_impl = lane


@no_type_check
def _block_lane(block, last, end, key, depth, running, recomputes):
    def lane(*args, **kwargs):
        post = block._forward_hooks
        if (
            is_dynamo_compiling()
            or len(post) != 1
            or last not in post
            or block._forward_pre_hooks
            or block._backward_hooks
            or block._backward_pre_hooks
            or _global_forward_hooks
            or _global_forward_pre_hooks
            or _global_backward_hooks
            or _global_backward_pre_hooks
            or _tracing()
        ):
            return block._call_impl(*args, **kwargs)
        output = block.forward(*args, **kwargs)
        run = running()
        if not block.training:
            if run is None:
                if not recomputes:
                    return output
            elif run.straight is not None and run.owner == key and type(output) is Tensor:
                way = run.straight.get(depth)
                moved = None if way is None else way(output)
                return output if moved is None else moved
        moved = end(block, args, output)
        return output if moved is None else moved

    return lane
