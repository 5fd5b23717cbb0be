"""Inputs and float64 bounds shared by the tests of the kernels, in the interpreter and on a GPU."""

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Rounding once costs half an ulp; the rest is the float32 sum over d_model (measured 2e-7).
TOLERANCE = {torch.float32: 5e-7, torch.float16: 1e-3, torch.bfloat16: 4e-3}
SCORE_TOLERANCE = 1e-6  # times |h||v|: a score near zero has no relative error worth naming


def residual(rows: int, width: int, dtype: torch.dtype, *, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, width, generator=generator).to(dtype)


def unit_rows(n_vec: int, width: int, dtype: torch.dtype, *, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    v = torch.randn(n_vec, width, generator=generator, dtype=torch.float64)
    return (v / v.norm(dim=1, keepdim=True)).to(dtype)


def requests(rows: int, n_requests: int, *, seed: int = 2) -> Tensor:
    """A request index for every row, about a third of them -1."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(-n_requests // 2, n_requests, (rows,), generator=generator)
    return drawn.clamp(min=-1).to(torch.int32)


def same_bits(got: Tensor, wanted: Tensor) -> bool:
    """Equal to the bit, the sign of zero and the payload of NaN included."""
    return got.dtype == wanted.dtype and torch.equal(
        got.contiguous().view(torch.uint8), wanted.contiguous().view(torch.uint8)
    )


def assert_close(got: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    """By the norm of the error; `wanted` is float64 and made from the same rounded inputs."""
    assert got.shape == wanted.shape
    assert got.isfinite().all()
    error = (got.double().cpu() - wanted).norm()
    assert error <= TOLERANCE[dtype] * wanted.norm(), f"off by {float(error / wanted.norm()):.2e}"


def assert_scores(got: Tensor, h: Tensor, v: Tensor) -> None:
    """Against float64 of the same rounded `h` and `v`, by `|h||v|` per score."""
    rows, units = h.double().cpu(), v.double().cpu()
    bound = SCORE_TOLERANCE * rows.norm(dim=1)[:, None] * units.norm(dim=1)
    assert got.dtype == torch.float32
    error = (got.double().cpu() - rows @ units.T).abs()
    assert got.shape == error.shape
    assert (error <= bound).all(), f"off by {float((error / bound).max()):.1f} bounds"


def bounds(n_requests: int, n_vec: int, *, size: float = 1.0) -> tuple[Tensor, Tensor]:
    """Intervals `[request, vector]` around 0: scores of order one fall on both sides and between.

    A small `size` leaves hardly a score where it is.
    """
    generator = torch.Generator().manual_seed(8)
    low = -size * torch.rand(n_requests, n_vec, generator=generator)
    return low, low + size * (0.2 + torch.rand(n_requests, n_vec, generator=generator))


def clipped(
    h: Tensor, v: Tensor, low: Tensor, high: Tensor, row: Tensor, inverse: Tensor
) -> Tensor:
    """One joint step in float64, from the description: each score sent into its interval."""
    rows, units, at = h.cpu().double(), v.cpu().double(), row.cpu().clamp(min=0).long()
    scores = rows @ units.T
    wanted = torch.minimum(torch.maximum(scores, low.cpu().double()[at]), high.cpu().double()[at])
    change = (wanted - scores) * (row.cpu() >= 0)[:, None]
    return rows + change @ inverse.cpu() @ units
