"""Every op on packed rows `[t, d]` in plain torch: the twin of its kernel, and the CPU path.

Sums are float32, or float64 for float64 rows; `h'` is rounded once. Scores are of `h` as it came,
before it is steered. A row whose request is -1 keeps every bit.
"""

from itertools import groupby, pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pvcore_kernels.reference import accumulator, precise

# Up to here a walk over the rows is cheaper than asking torch whether they are all alike.
FEW = 32
# Rows converted at a time: a scratch that stays in the cache, instead of a float32 copy of `h`.
BLOCK = 256
ADD_BLOCK = 32
# Rows of one request that come together are one add from this mean length on.
RUN = 8


def listed(
    h: Float[Tensor, "t d_model"], rows: Int[Tensor, " n"], *, outside: float
) -> Float[Tensor, "n d_model"]:
    """Rows by their numbers; full of `outside` where there is no such row. Nothing syncs."""
    n_rows, width = h.shape
    if n_rows == 0:
        return h.new_full((rows.shape[0], width), outside)
    known = (rows >= 0) & (rows < n_rows)
    picked = h.index_select(0, rows.clamp(0, n_rows - 1))
    return torch.where(known[:, None], picked, outside)


def project(
    h: Float[Tensor, "t d_model"],
    v: Float[Tensor, "k d_model"],
    rows: Int[Tensor, " n"] | None = None,
    *,
    out: Float[Tensor, "n k"] | None = None,
) -> Float[Tensor, "n k"]:
    """Scores `<h_t, v_k>` of all rows, or of those listed in `rows`."""
    if rows is None:
        picked = h
    else:  # a GPU that meets a number out of range is lost to the process
        picked = listed(h, rows, outside=torch.nan) if h.is_cuda else h.index_select(0, rows)
    wide = accumulator(h.dtype)
    columns = (v if v.dtype is wide else v.to(wide)).t()
    # Into memory of its own, because autocast rounds only products that it may place.
    scores = h.new_empty(picked.shape[0], v.shape[0], dtype=wide) if out is None else out
    if h.dtype is wide:
        return torch.mm(picked, columns, out=scores)
    if picked.shape[0] <= BLOCK:
        return torch.mm(picked.to(wide), columns, out=scores)
    scratch = h.new_empty(BLOCK, h.shape[1], dtype=wide)
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

    Rows of one request are one add, and so is each long run of them in a prefill of several. Where
    runs are short, as in decoding, the rows of `delta` are gathered.
    """
    n_rows, n_requests = row.shape[0], delta.shape[0]
    low, high = extremes(row, n_rows)
    known(high, n_requests)
    if low == high >= 0:
        _add(out, h, delta if n_requests == 1 else delta.select(0, low))
        return
    if out is not h:
        out.copy_(h)
    if high < 0:
        return
    runs = _runs(row) if n_rows > FEW else ()
    if runs and len(runs) * RUN <= n_rows:
        start = 0
        for request, length in runs:
            if request >= 0:
                run = out[start : start + length]
                _add(run, run, delta[request])
            start += length
    elif low >= 0:
        _add(out, out, delta.index_select(0, row))
    else:
        _add_where_active(out, delta, row)


def known(request: int, n_requests: int) -> int:
    """The request, if `delta` has it; `IndexError` if not."""
    if request >= n_requests:
        raise IndexError(f"A row asks for request {request} of {n_requests} in delta.")
    return request


def extremes(row: Int[Tensor, " t"], n_rows: int) -> tuple[int, int]:
    """The lowest and the highest request; on a few rows Python's loop wins."""
    if n_rows == 1:
        request = int(row.item())
        return request, request
    if n_rows <= FEW:
        requests = row.tolist()
        return min(requests, default=-1), max(requests, default=-1)
    low, high = row.aminmax()
    return int(low), int(high)


def _runs(row: Int[Tensor, " t"]) -> list[tuple[int, int]]:
    """Neighbouring rows of one request, as requests and lengths; none where most are short."""
    if len(row) <= BLOCK:
        return [(request, len(list(same))) for request, same in groupby(row.tolist())]
    if (int((row[1:] != row[:-1]).sum()) + 1) * RUN > len(row):
        return []
    requests, lengths = torch.unique_consecutive(row, return_counts=True)
    return list(zip(requests.tolist(), lengths.tolist(), strict=True))


def _add(
    out: Float[Tensor, "n d_model"],
    h: Float[Tensor, "n d_model"],
    delta: Float[Tensor, "*#n d_model"],
) -> None:
    """`out = h + delta`; mixed dtypes cost torch a whole copy, so a few rows at a time."""
    n_rows = h.shape[0]
    if n_rows <= ADD_BLOCK or h.dtype == delta.dtype:
        if out is h:
            h.add_(delta)
        else:
            torch.add(h, delta, out=out)
        return
    each = delta.ndim == 2 and delta.shape[0] == n_rows
    for start in range(0, n_rows, ADD_BLOCK):
        block = slice(start, start + ADD_BLOCK)
        torch.add(h[block], delta[block] if each else delta, out=out[block])


def _add_where_active(
    out: Float[Tensor, "t d_model"], delta: Float[Tensor, "b d_model"], row: Int[Tensor, " t"]
) -> None:
    """Add to the rows that have a request; the others are not even read."""
    active = (row >= 0).nonzero().squeeze(1)
    moves = delta.index_select(0, row.index_select(0, active))
    if out.dtype == delta.dtype:
        out.index_add_(0, active, moves)
    else:
        moved = out.index_select(0, active)
        _add(moved, moved, moves)
        out.index_copy_(0, active, moved)


def add_tokens_into(
    out: Float[Tensor, "t d_model"],
    h: Float[Tensor, "t d_model"],
    v: Float[Tensor, "k d_model"],
    c: Float[Tensor, "t k"],
) -> None:
    """`out = h + c v`; `out` may be `h`. A row whose coefficients are all 0 keeps every bit."""
    wide = accumulator(h.dtype)
    vectors, coefficients = v.to(wide), c.to(wide)
    moving = (coefficients != 0).any(1, keepdim=True)
    step = len(h) if h.dtype is wide else BLOCK
    for start in range(0, len(h), max(step, 1)):
        block = slice(start, start + step)
        with precise(h.device):
            moved = torch.addmm(h[block].to(wide), coefficients[block], vectors)
        out[block] = torch.where(moving[block], moved.to(h.dtype), h[block])


def steer_project_tokens_into(
    out: Float[Tensor, "t d_model"],
    scores: Float[Tensor, "t k"] | None,
    h: Float[Tensor, "t d_model"],
    v: Float[Tensor, "k d_model"],
    c: Float[Tensor, "t k"],
) -> None:
    """`out = h + c v` and, where they are wanted, the scores of `h`; rows are widened once."""
    wide = accumulator(h.dtype)
    vectors = v if v.dtype is wide else v.to(wide)
    coefficients = c if c.dtype is wide else c.to(wide)
    if h.dtype is wide:
        if scores is not None:
            torch.mm(h, vectors.t(), out=scores)
        torch.addmm(h, coefficients, vectors, out=out)
        return
    columns, n_rows = vectors.t(), h.shape[0]
    if n_rows <= BLOCK:
        rows = h.to(wide)
        if scores is not None:
            torch.mm(rows, columns, out=scores)
        out.copy_(rows.addmm_(coefficients, vectors))
        return
    for start in range(0, n_rows, BLOCK):
        block = slice(start, min(start + BLOCK, n_rows))
        rows = h[block].to(wide)
        if scores is not None:
            torch.mm(rows, columns, out=scores[block])
        out[block] = rows.addmm_(coefficients[block], vectors)


def steer(
    h: Float[Tensor, "t d_model"], delta: Float[Tensor, "b d_model"], row: Int[Tensor, " t"]
) -> Float[Tensor, "t d_model"]:
    """`h + delta[row]`, rounded once."""
    moved = torch.empty_like(h, memory_format=torch.contiguous_format)
    steer_into(moved, h, delta, row)
    return moved


def steer_project_into(
    out: Float[Tensor, "t d_model"],
    scores: Float[Tensor, "t k"],
    h: Float[Tensor, "t d_model"],
    v: Float[Tensor, "k d_model"],
    delta: Float[Tensor, "b d_model"],
    row: Int[Tensor, " t"],
) -> None:
    """`out = h + delta[row]`, and the scores of `h`; `out` may be `h`.

    Narrow rows that are all of one request are widened once for both.
    """
    wide, n_rows = accumulator(h.dtype), h.shape[0]
    narrow = h.dtype is not wide and v.dtype is wide and delta.dtype is wide
    low, high = extremes(row, n_rows) if narrow else (-1, -1)
    if not 0 <= low == high < delta.shape[0]:
        project(h, v, out=scores)
        steer_into(out, h, delta, row)
        return
    move, columns = delta.select(0, low), v.t()
    if n_rows <= BLOCK:
        rows = h.to(wide)
        torch.mm(rows, columns, out=scores)
        out.copy_(rows.add_(move))
        return
    scratch = h.new_empty(BLOCK, h.shape[1], dtype=wide)
    for start in range(0, n_rows, BLOCK):
        block = slice(start, min(start + BLOCK, n_rows))
        rows = scratch[: block.stop - start].copy_(h[block])
        torch.mm(rows, columns, out=scores[block])
        out[block] = rows.add_(move)


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
    scores = h.new_empty(h.shape[0], v.shape[0], dtype=accumulator(h.dtype))
    steer_project_tokens_into(moved, scores, h, v, c)
    return moved, scores
