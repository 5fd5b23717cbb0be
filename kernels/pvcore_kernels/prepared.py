"""Ops in place on buffers that stay where they are: looked at once, run as often as one likes.

    run = prepared.steer_project(h, v, delta, row, scores)
    run()  # as ops.steer_project_(h, v, delta, row, scores), on what the buffers then hold

A loop that decodes writes into the same buffers at every step. What an op looks at before each call
(shapes, dtypes, devices, gradients) cannot change there, and on a few rows on a CPU the looking
costs as much as the arithmetic. Here it is done when the call is prepared; a run only makes sure
that no buffer has been given other memory. Contents are read at every run, requests too. Shapes and
errors are those of the ops, and `RuntimeError` for a buffer that was moved. A prepared call is for
eager code: graphs and compilers have the ops.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pvcore_kernels import checks
from pvcore_kernels import rows as plain
from pvcore_kernels.paths import path
from pvcore_kernels.reference import accumulator
from pvcore_kernels.registry import refuse_gradients

Prepared = Callable[[], None]
# Up to so many requests, each one's move is a tensor of its own beforehand.
_MOST_MOVES = 1024


def _watching(op: str, buffers: tuple[Tensor, ...], run: Callable[[], object]) -> Prepared:
    """`run`, if the buffers are where they were. Three looks are written out: a loop costs more."""
    (first, second, third), others = [one.data_ptr for one in buffers[:3]], buffers[3:]
    at_first, at_second, at_third = first(), second(), third()
    rest = [(one.data_ptr, one.data_ptr()) for one in others]

    def prepared() -> None:
        if first() != at_first or second() != at_second or third() != at_third:
            raise _moved(op)
        for place, at in rest:
            if place() != at:
                raise _moved(op)
        run()

    return prepared


def _moved(op: str) -> RuntimeError:
    return RuntimeError(
        f"pvcore::{op} was prepared on buffers of which one has other memory now; write into it "
        "instead of replacing it, or prepare the call again"
    )


def project(h: Tensor, v: Tensor, scores: Tensor) -> Prepared:
    """`scores = h v^T`, as `ops.project_out`."""
    checks.project(h, v, None)
    checks.scores(scores, h, v, None)
    return _prepared("project_out", _scoring, h, v, scores, None)


def steer(h: Tensor, delta: Tensor, row: Tensor) -> Prepared:
    """`h += delta[row]`, as `ops.steer_`."""
    checks.steer(h, delta, row)
    return _prepared("steer_", _steering, h, delta, row)


def steer_project(
    h: Tensor,
    v: Tensor,
    delta: Tensor,
    row: Tensor,
    scores: Tensor,
) -> Prepared:
    """Scores of `h` as it comes, then `h += delta[row]`, as `ops.steer_project_`."""
    checks.project(h, v, None)
    checks.steer(h, delta, row)
    checks.scores(scores, h, v, None)
    return _prepared("steer_project_", _steering_and_scoring, h, v, delta, row, scores)


def steer_project_tokens(
    h: Tensor,
    v: Tensor,
    c: Tensor,
    scores: Tensor,
) -> Prepared:
    """Scores of `h` as it comes, then `h += c v`, as `ops.steer_project_tokens_`."""
    checks.tokens(h, v, c)
    checks.scores(scores, h, v, None)
    checks.apart("c", c, "scores", scores)
    return _prepared("steer_project_tokens_", _tokens, h, v, c, scores)


def _prepared(op: str, plainly: Callable[..., Callable[[], object]], *given: Any) -> Prepared:
    """The op on what was given: arithmetic alone on a CPU, else the op itself."""
    buffers = tuple(one for one in given if one is not None)
    refuse_gradients(op, *buffers)
    h = buffers[0]
    held = [one if one is None else one.detach() for one in given]
    if path(h.device, h.dtype, 0) == "reference" and all(one.is_cpu for one in buffers):
        return _watching(op, buffers, plainly(*held))
    return _watching(op, buffers, partial(getattr(torch.ops.pvcore, op).default, *held))


def _scoring(h: Tensor, v: Tensor, scores: Tensor, _rows: None) -> Callable[[], object]:
    wide = accumulator(h.dtype)
    if h.dtype == v.dtype == wide:
        return partial(torch.mm, h, v.t(), out=scores)
    if v.dtype != wide or h.shape[0] > plain.BLOCK:
        return partial(plain.project, h, v, out=scores)
    rows, columns = h.new_empty(h.shape, dtype=wide), v.t()

    def widened() -> None:
        rows.copy_(h)
        torch.mm(rows, columns, out=scores)

    return widened


def _steering(h: Tensor, delta: Tensor, row: Tensor) -> Callable[[], object]:
    if h.shape[0] != 1 or delta.shape[0] > _MOST_MOVES:
        return partial(plain.steer_into, h, h, delta, row)
    moves, request_of, add = delta.unbind(0), row.item, h.add_

    def steered() -> None:
        request = int(request_of())
        if request >= 0:
            add(moves[plain.known(request, len(moves))])

    return steered


def _steering_and_scoring(
    h: Tensor, v: Tensor, delta: Tensor, row: Tensor, scores: Tensor
) -> Callable[[], object]:
    if h.shape[0] != 1:
        return partial(plain.steer_project_into, h, scores, h, v, delta, row)
    score, steered = _scoring(h, v, scores, None), _steering(h, delta, row)
    n_requests, request_of = delta.shape[0], row.item

    def both() -> None:
        plain.known(int(request_of()), n_requests)
        score()
        steered()

    return both


def _tokens(h: Tensor, v: Tensor, c: Tensor, scores: Tensor) -> Callable[[], object]:
    wide, columns = accumulator(h.dtype), v.t()
    if not v.dtype == c.dtype == wide or (h.dtype != wide and h.shape[0] > plain.BLOCK):
        return partial(plain.steer_project_tokens_into, h, scores, h, v, c)
    # Narrow rows are widened once, into memory that is kept.
    rows = h if h.dtype == wide else h.new_empty(h.shape, dtype=wide)

    def both() -> None:
        if rows is not h:
            rows.copy_(h)
        torch.mm(rows, columns, out=scores)
        rows.addmm_(c, v)
        if rows is not h:
            h.copy_(rows)

    return both
