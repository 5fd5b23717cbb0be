"""What every op on packed rows runs: plain torch, Triton or cuBLAS, by `paths.path`.

Triton is imported by the first call that launches a kernel.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pvcore_kernels import rows as plain
from pvcore_kernels.layout import empty_rows, is_aligned, require_aligned
from pvcore_kernels.paths import path
from pvcore_kernels.reference import precise

# All vectors of a row are one tile of the ops that write it: proven to fit up to here, whatever the
# crossover, which a tuner measures on `project` alone.
MOST_STEERED = 128
# Up to here one program per tile of rows would read a large bank all alone; the scores are then
# split over vectors and the add is a launch of its own.
SPLIT_ROWS, SPLIT_VECTORS = 16, 32


def project_into(
    out: Float[Tensor, "n k"],
    h: Float[Tensor, "t d_model"],
    v: Float[Tensor, "k d_model"],
    rows: Int[Tensor, " n"] | None,
) -> None:
    match path(h.device, h.dtype, len(v)):
        case "reference":
            plain.project(h, v, rows, out=out)
        case "cublas":
            picked = h if rows is None else plain.listed(h, rows, outside=torch.nan)
            _multiply_into(out, picked, v)
        case "triton":
            from pvcore_kernels.tiled.project import project

            project(h, v, rows, out)


def _multiply_into(
    out: Float[Tensor, "n k"], h: Float[Tensor, "n d_model"], v: Float[Tensor, "k d_model"]
) -> None:
    """Sums in float32; a bank of another dtype than the rows widens both."""
    if h.dtype == v.dtype and h.dtype != torch.float32:
        torch.mm(h, v.mT, out_dtype=torch.float32, out=out)
    else:
        with precise(h.device):
            torch.mm(h.float(), v.float().mT, out=out)


def segment_mean(
    h: Float[Tensor, "t d_model"], cu_seqlens: Int[Tensor, " bounds"]
) -> Float[Tensor, "segments d_model"]:
    if path(h.device, h.dtype, 0) == "reference":
        return plain.segment_mean(h, cu_seqlens)
    from pvcore_kernels.tiled.segment import segment_mean as launch

    out = h.new_empty(len(cu_seqlens) - 1, h.shape[1], dtype=torch.float32)
    launch(h, cu_seqlens, out)
    return out


def moved_like(h: Float[Tensor, "t d_model"]) -> Float[Tensor, "t d_model"]:
    """A contiguous output where plain torch or an aligned one will do, else an aligned one."""
    out = torch.empty_like(h, memory_format=torch.contiguous_format)
    if path(h.device, h.dtype, 0) == "reference" or is_aligned(out):
        return out
    return empty_rows(*h.shape, dtype=h.dtype, device=h.device)


def steer_into(
    out: Float[Tensor, "t d_model"],
    h: Float[Tensor, "t d_model"],
    delta: Float[Tensor, "b d_model"],
    row: Int[Tensor, " t"],
) -> None:
    if path(h.device, h.dtype, 0) == "reference":
        plain.steer_into(out, h, delta, row)
        return
    from pvcore_kernels.tiled.steer import steer

    require_aligned(out, "h")
    steer(h, delta, row, out)


def steer_project_into(
    out: Float[Tensor, "t d_model"],
    scores: Float[Tensor, "t k"],
    h: Float[Tensor, "t d_model"],
    v: Float[Tensor, "k d_model"],
    delta: Float[Tensor, "b d_model"],
    row: Int[Tensor, " t"],
) -> None:
    """One launch where one program can hold all vectors; else the scores, and then the add."""
    split = len(h) <= SPLIT_ROWS and len(v) > SPLIT_VECTORS
    taken = path(h.device, h.dtype, len(v))
    if taken == "reference":
        plain.steer_project_into(out, scores, h, v, delta, row)
        return
    if split or not 0 < len(v) <= MOST_STEERED or taken != "triton":
        project_into(scores, h, v, None)
        steer_into(out, h, delta, row)
        return
    from pvcore_kernels.tiled.steer import steer_project

    require_aligned(out, "h")
    steer_project(h, v, delta, row, out, scores)


def steer_project_tokens_into(
    out: Float[Tensor, "t d_model"],
    scores: Float[Tensor, "t k"],
    h: Float[Tensor, "t d_model"],
    v: Float[Tensor, "k d_model"],
    c: Float[Tensor, "t k"],
) -> None:
    taken = path(h.device, h.dtype, len(v))
    if taken == "reference":
        plain.steer_project_tokens_into(out, scores, h, v, c)
        return
    if not 0 < len(v) <= MOST_STEERED or taken != "triton":
        project_into(scores, h, v, None)
        plain.add_tokens_into(out, h, v, c)
        return
    from pvcore_kernels.tiled.steer import steer_project_tokens

    require_aligned(out, "h")
    steer_project_tokens(h, v, c, out, scores)
