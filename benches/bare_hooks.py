"""What a user would write with torch alone: hooks that watch and steer. The bar to be held to."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn


def residual(output: Any) -> Tensor:
    """The residual in a block's output, a bare tensor or the first item of a tuple."""
    h: Tensor = output[0] if isinstance(output, tuple) else output
    return h


@contextmanager
def watching(
    blocks: Sequence[nn.Module], units: Float[Tensor, "layer n_vec d_model"]
) -> Iterator[list[Tensor]]:
    """Scores `[batch, pos, n_vec]` of every block's output, in the order they are made."""
    scores: list[Tensor] = []
    hooks = [
        _watch(scores, turned, next(block.parameters()).dtype)
        for block, turned in zip(blocks, units.mT.contiguous(), strict=True)
    ]
    handles = [block.register_forward_hook(hook) for block, hook in zip(blocks, hooks, strict=True)]
    try:
        yield scores
    finally:
        for handle in handles:
            handle.remove()


def _watch(scores: list[Tensor], turned: Float[Tensor, "d_model n_vec"], dtype: torch.dtype) -> Any:
    """As lean as a hook gets: what is looked up or converted costs as much as the product."""
    if dtype == turned.dtype:
        return lambda _module, _args, output: scores.append(residual(output) @ turned)
    return lambda _module, _args, output: scores.append(residual(output).float() @ turned)


@contextmanager
def steering(block: nn.Module, delta: Float[Tensor, " d_model"]) -> Iterator[None]:
    """Add to every reply token and the last prompt token; prompts are padded on the left."""

    def steer(_module: nn.Module, _args: Any, output: Any) -> Any:
        h = residual(output)
        moved = (h + delta).to(h.dtype)
        if h.shape[1] > 1:
            moved[:, :-1] = h[:, :-1]
        return (moved, *output[1:]) if isinstance(output, tuple) else moved

    handle = block.register_forward_hook(steer)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def newest_rows(blocks: Sequence[nn.Module]) -> Iterator[list[Float[Tensor, "batch d_model"]]]:
    """The last row of every block's output, in the order they are made: for checks, not speed."""
    rows: list[Tensor] = []

    def keep(_module: nn.Module, _args: Any, output: Any) -> None:
        rows.append(residual(output)[:, -1].clone())

    handles = [block.register_forward_hook(keep) for block in blocks]
    try:
        yield rows
    finally:
        for handle in handles:
            handle.remove()
