"""Every op on packed rows `[t, d]` in plain torch: the twin of its kernel, and the CPU path.

Sums are float32, or float64 for float64 rows; `h'` is rounded once. Scores are of `h` as it came,
before it is steered. A row whose request is -1 keeps every bit.
"""

from itertools import groupby, pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pvcore_kernels.reference import accumulator

# Up to here a walk over the rows is cheaper than asking torch whether they are all alike.
FEW = 32
# Rows converted at a time: a scratch that stays in the cache, instead of a float32 copy of `h`.
BLOCK = 256
ADD_BLOCK = 32


def project(
    h: Float[Tensor, "t d_model"],
    v: Float[Tensor, "k d_model"],
    rows: Int[Tensor, " n"] | None = None,
    *,
    out: Float[Tensor, "n k"] | None = None,
) -> Float[Tensor, "n k"]:
    """Scores `<h_t, v_k>` of all rows, or of those listed in `rows`."""
    picked = h if rows is None else h.index_select(0, rows)
    wide = accumulator(h.dtype)
    columns = v.to(wide).mT
    if picked.dtype == wide or len(picked) <= BLOCK:
        return torch.mm(picked.to(wide), columns, out=out)
    scores = h.new_empty(len(picked), len(v), dtype=wide) if out is None else out
    scratch = h.new_empty(min(BLOCK, len(picked)), h.shape[1], dtype=wide)
    for start in range(0, len(picked), BLOCK):
        block = picked[start : start + BLOCK]
        torch.mm(
            scratch[: len(block)].copy_(block), columns, out=scores[start : start + len(block)]
        )
    return scores


def segment_mean(
    h: Float[Tensor, "t d_model"], cu_seqlens: Int[Tensor, " bounds"]
) -> Float[Tensor, "segments d_model"]:
    """Mean of `h[cu_seqlens[b]:cu_seqlens[b + 1]]`, summed in float64; NaN where that is empty."""
    bounds = cu_seqlens.tolist()
    if bounds != sorted(bounds) or bounds[0] < 0 or bounds[-1] > len(h):
        raise IndexError(f"Bounds {bounds} must rise within the {len(h)} rows of h.")
    means = h.new_empty(len(bounds) - 1, h.shape[1], dtype=accumulator(h.dtype))
    for segment, (start, end) in enumerate(pairwise(bounds)):
        total = h[start:end].sum(0, dtype=torch.float64)
        means[segment] = total / (end - start)
    return means


def steer_into(
    out: Float[Tensor, "t d_model"],
    h: Float[Tensor, "t d_model"],
    delta: Float[Tensor, "b d_model"],
    row: Int[Tensor, " t"],
) -> None:
    """`out = h + delta[row]`; `out` may be `h`.

    Rows of one request stand together in a prefill, and each run of them is one add. Where runs
    are short, as in decoding, the rows of `delta` are gathered.
    """
    runs = _runs(row)
    if (last := max((request for request, _length in runs), default=-1)) >= len(delta):
        raise IndexError(f"A row asks for request {last} of {len(delta)} in delta.")
    if out is not h:
        out.copy_(h)
    if len(runs) == 1 or len(runs) * 8 <= len(row):
        start = 0
        for request, length in runs:
            if request >= 0:
                _add_to_run(out[start : start + length], delta[request])
            start += length
        return
    active = (row >= 0).nonzero()[:, 0]
    if len(active) == len(row):
        out += delta.index_select(0, row)
    else:
        out[active] = (out[active] + delta[row[active].long()]).to(out.dtype)


def _runs(row: Int[Tensor, " t"]) -> list[tuple[int, int]]:
    """Neighbouring rows of one request, as requests and lengths; Python's loop wins on few rows."""
    if len(row) > FEW:
        low, high = row.aminmax()
        if (request := int(low)) == int(high):
            return [(request, len(row))]
    if len(row) <= BLOCK:
        return [(request, len(list(same))) for request, same in groupby(row.tolist())]
    requests, lengths = torch.unique_consecutive(row, return_counts=True)
    return list(zip(requests.tolist(), lengths.tolist(), strict=True))


def _add_to_run(run: Float[Tensor, "n d_model"], delta: Float[Tensor, " d_model"]) -> None:
    if run.dtype == delta.dtype:
        run += delta
        return
    for block in torch.split(
        run, ADD_BLOCK
    ):  # torch adds mixed dtypes by way of a whole float32 copy
        block.add_(delta)


def add_tokens_into(
    out: Float[Tensor, "t d_model"],
    h: Float[Tensor, "t d_model"],
    v: Float[Tensor, "k d_model"],
    c: Float[Tensor, "t k"],
) -> None:
    """`out = h + c v`; `out` may be `h`."""
    wide = accumulator(h.dtype)
    vectors, coefficients = v.to(wide), c.to(wide)
    if h.dtype == wide:
        torch.addmm(h, coefficients, vectors, out=out)
        return
    for start in range(0, len(h), BLOCK):
        block = slice(start, start + BLOCK)
        out[block] = torch.addmm(h[block].to(wide), coefficients[block], vectors).to(h.dtype)


def steer(
    h: Float[Tensor, "t d_model"], delta: Float[Tensor, "b d_model"], row: Int[Tensor, " t"]
) -> Float[Tensor, "t d_model"]:
    """`h + delta[row]`, rounded once."""
    moved = torch.empty_like(h, memory_format=torch.contiguous_format)
    steer_into(moved, h, delta, row)
    return moved


def steer_project(
    h: Float[Tensor, "t d_model"],
    v: Float[Tensor, "k d_model"],
    delta: Float[Tensor, "b d_model"],
    row: Int[Tensor, " t"],
) -> tuple[Float[Tensor, "t d_model"], Float[Tensor, "t k"]]:
    """`h + delta[row]`, and the scores of `h`."""
    return steer(h, delta, row), project(h, v)


def steer_project_tokens(
    h: Float[Tensor, "t d_model"], v: Float[Tensor, "k d_model"], c: Float[Tensor, "t k"]
) -> tuple[Float[Tensor, "t d_model"], Float[Tensor, "t k"]]:
    """`h + c v` with coefficients of its own for every row, and the scores of `h`."""
    moved = torch.empty_like(h, memory_format=torch.contiguous_format)
    add_tokens_into(moved, h, v, c)
    return moved, project(h, v)
