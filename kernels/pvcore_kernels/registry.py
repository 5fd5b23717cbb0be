"""How an op gets into torch: one schema, a fake, one implementation per device, its gradients.

To torch.compile an op is opaque: nothing traces into Triton, so no GPU is needed to compile.
`Library` schemas rather than `custom_op`: a call on small rows costs 12 us instead of 27 us. What
is called most goes past even that on the CPU: see `direct`.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.autograd.graph import increment_version

_LIBRARY = torch.library.Library("pvcore", "FRAGMENT")  # type: ignore[no-untyped-call]


def register(
    schema: str,
    *,
    run: Callable[..., Any],
    fake: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., Any] | None = None,
) -> OpOverload[..., Any]:
    """Define `pvcore::<schema>`; ops that write into their arguments have no `backward`.

    `run` is the implementation on every device: which path it takes is `paths.path`'s to say.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))  # type: ignore[no-untyped-call]
    op: OpOverload[..., Any] = getattr(torch.ops.pvcore, name).default
    written = [
        place
        for place, argument in enumerate(op._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    for device in ("CPU", "CUDA"):
        _LIBRARY.impl(name, _counted(run, written) if written else run, device)  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"pvcore::{name}", fake, lib=_LIBRARY)
    if backward is not None:
        torch.library.register_autograd(
            f"pvcore::{name}", backward, setup_context=setup_context, lib=_LIBRARY
        )
    return op


def _counted(run: Callable[..., Any], written: list[int]) -> Callable[..., Any]:
    """`run`, and torch told what it wrote: autograd then refuses a tensor saved before.

    A kernel writes to an address, which torch cannot see. Tensors of inference mode have no count.
    """

    @wraps(run)
    def counted(*args: Any) -> Any:
        made = run(*args)
        for place in written:
            if not args[place].is_inference():
                increment_version(args[place])
        return made

    return counted


def refuse_gradients(op: str, *tensors: Tensor) -> None:
    """An op that writes into its arguments would lose their gradients without a word."""
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        raise RuntimeError(
            f"pvcore::{op} writes in place and got a tensor that requires grad; it has no "
            f"gradients. Call it under torch.no_grad(), or call the functional op."
        )
