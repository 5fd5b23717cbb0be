"""Step tables: rows and calls of different lengths put together, NaN where one ends early."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor


def ragged(
    parts: Sequence[Float[Tensor, "n_vec _ site"]],
) -> Float[Tensor, "n_vec longest site row"]:
    """Rows of different lengths as one table, NaN after the end of each."""
    longest = max(part.shape[1] for part in parts)
    padded = [
        torch.nn.functional.pad(part, (0, 0, 0, longest - part.shape[1]), value=torch.nan)
        for part in parts
    ]
    return torch.stack(padded, dim=-1)


def beside_each_other(
    parts: Sequence[Float[Tensor, "_ site _"]],
) -> Float[Tensor, "longest site chat"]:
    """Tables of different lengths next to each other, NaN where one ends early."""
    longest = max(len(part) for part in parts)
    return torch.cat(
        [
            torch.nn.functional.pad(part, (0, 0, 0, 0, 0, longest - len(part)), value=torch.nan)
            for part in parts
        ],
        dim=-1,
    )
