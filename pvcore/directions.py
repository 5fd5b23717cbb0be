"""Directions: float32 rows that pvcore owns, one per site, and their lengths."""

import math
from collections.abc import Mapping
from numbers import Real

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from pvcore.errors import VectorError
from pvcore.provenance import require_name
from pvcore.sites import Site

SMALLEST_NORM = torch.finfo(torch.float32).tiny
LARGEST_NORM = torch.finfo(torch.float32).max


def own_directions(
    trait: str, sites: tuple[Site, ...], values: object
) -> Float[Tensor, "n_sites d_model"]:
    """A float32 copy with one usable row per site, or a `VectorError` that names the site."""
    rows = _own(f"directions of {trait!r}", values)
    if rows.dim() != 2 or rows.shape[0] != len(sites) or rows.shape[1] == 0:
        raise VectorError(
            f"got directions of {trait!r} of shape {list(rows.shape)} for {len(sites)} sites; "
            f"wanted [{len(sites)}, d_model]: give one row per site"
        )
    _require_finite(f"directions of {trait!r}", rows, values, sites)
    lengths = norms(rows)
    zero = _named(sites, lengths < SMALLEST_NORM)
    if zero:
        raise VectorError(
            f"got a direction of {trait!r} of norm zero at {zero}; wanted directions that point "
            "somewhere: leave these sites out or extract the vector again"
        )
    huge = _named(sites, lengths > LARGEST_NORM)
    if huge:
        raise VectorError(
            f"got a direction of {trait!r} whose norm is beyond float32 at {huge}; "
            "wanted a smaller one: scale it down"
        )
    return rows


def own_statistics(
    trait: str, sites: tuple[Site, ...], statistics: object
) -> dict[str, Float[Tensor, " n_sites"]]:
    """Float32 copies in the order of their names, one finite number per site."""
    if not isinstance(statistics, Mapping):
        raise VectorError(
            f"got statistics {statistics!r:.60}; wanted a mapping from name to tensor"
        )
    owned: dict[str, Tensor] = {}
    for name in sorted(statistics, key=str):
        require_name("statistic", name)
        values = _own(f"statistic {name!r} of {trait!r}", statistics[name])
        if values.shape != (len(sites),):
            raise VectorError(
                f"got statistic {name!r} of {trait!r} of shape {list(values.shape)}; "
                f"wanted [{len(sites)}]: give one number per site"
            )
        _require_finite(f"statistic {name!r} of {trait!r}", values, statistics[name], sites)
        owned[name] = values
    return owned


def norms(rows: Float[Tensor, "... d_model"]) -> Float[Tensor, "..."]:
    """Lengths in float64, where no square of a float32 number overflows or vanishes."""
    lengths: Tensor = torch.linalg.vector_norm(rows.double(), dim=-1)
    return lengths


def unit_rows(rows: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_model"]:
    """Each row scaled to length 1, rounded once to float32."""
    return (rows.double() / norms(rows).unsqueeze(-1)).float()


def require_factor(trait: str, factor: float | int) -> float:
    """The factor as a float, or a `VectorError` where scaling by it leaves no direction."""
    try:
        number = float(factor) if isinstance(factor, Real) else math.nan
    except OverflowError:
        number = math.inf
    if number == 0 or not math.isfinite(number):
        raise VectorError(
            f"got {trait!r} scaled by {factor!r:.60}; wanted a finite number other than zero: "
            "leave the vector out instead of scaling it to nothing"
        )
    return number


def _own(what: str, values: object) -> Tensor:
    if not isinstance(values, Tensor):
        raise VectorError(f"got {what} as {type(values).__name__}; wanted a torch tensor")
    if not values.is_floating_point() or values.layout != torch.strided or values.is_meta:
        raise VectorError(
            f"got {what} as {values.dtype} ({values.layout}, {values.device}); wanted a dense "
            "floating-point tensor with numbers in it: convert it with .float()"
        )
    # A copy made in inference mode could never be saved for backward, so never make it there.
    with torch.inference_mode(False):
        return values.detach().to(
            "cpu", torch.float32, copy=True, memory_format=torch.contiguous_format
        )


def _require_finite(what: str, owned: Tensor, given: object, sites: tuple[Site, ...]) -> None:
    finite = torch.isfinite(owned).reshape(len(sites), -1).all(dim=1)
    places = _named(sites, ~finite)
    if not places:
        return
    if isinstance(given, Tensor) and given.dtype == torch.float64 and given.isfinite().all():
        raise VectorError(
            f"got {what} beyond the range of float32 at {places}; wanted smaller numbers: "
            "scale the vector down"
        )
    raise VectorError(
        f"got {what} that are NaN or infinite at {places}; wanted finite numbers: "
        "leave these sites out or extract the vector again"
    )


def _named(sites: tuple[Site, ...], chosen: Bool[Tensor, " n_sites"]) -> str:
    return ", ".join(str(site) for site, hit in zip(sites, chosen.tolist(), strict=True) if hit)
