"""A bank of vectors as kernels want them: unit rows, padded and aligned once, norms apart."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from pvcore_kernels.layout import round_up


@dataclass(frozen=True, slots=True, kw_only=True)
class Bank:
    """`units[k] * norms[k]` is the vector `k`.

    `padded` holds `units` and rows of zeros up to a multiple of 16; `units` is a view of it.
    """

    units: Float[Tensor, "n_vec d_model"]
    norms: Float[Tensor, " n_vec"]
    padded: Float[Tensor, "n_padded width"]


def bank(v: Float[Tensor, "n_vec d_model"], *, dtype: torch.dtype = torch.float32) -> Bank:
    """Divide by the norms in float64 and round once to `dtype`; norms are at least float32."""
    if v.ndim != 2 or v.shape[0] == 0 or v.shape[1] == 0:
        raise ValueError(f"A bank is made of vectors [n_vec, d_model]; got {tuple(v.shape)}.")
    norms = v.double().norm(dim=1)
    lost = (~norms.isfinite() | (norms == 0)).nonzero()[:, 0].tolist()
    if lost:
        raise ValueError(
            f"Vectors {lost} have norm zero or not finite and so no direction. Leave them out."
        )
    n_vec, d_model = v.shape
    padded = v.new_zeros(round_up(n_vec), round_up(d_model), dtype=dtype)
    units = padded[:n_vec, :d_model]
    units.copy_(v.double() / norms[:, None])
    kept = torch.float64 if dtype == torch.float64 else torch.float32
    return Bank(units=units, norms=norms.to(kept), padded=padded)
