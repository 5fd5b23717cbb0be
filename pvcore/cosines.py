"""Cosines: how alike the vectors of different traits are, at each site."""

import torch
from jaxtyping import Float
from torch import Tensor

from pvcore.vectors import VectorBank


def cosine_matrices(bank: VectorBank) -> Float[Tensor, "n_sites n_vec n_vec"]:
    """The cosine of every vector with every other, in the order of the bank's traits."""
    units = bank.units.double()
    return torch.einsum("skd,sjd->skj", units, units).clamp(-1.0, 1.0).float()
