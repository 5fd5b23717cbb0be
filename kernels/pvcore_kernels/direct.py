"""The short way into an op: plain rows on the CPU go past torch's dispatcher to the arithmetic.

On a few rows the way through a registered op costs more than what it computes. What is not plain
(another device, a subclass, a transform, a mode, a trace or a compiler, wanted gradients) and what
does not fit goes on to the op, whose checks say what is wrong with it. The functions carry
`no_type_check`: a compiler traces them up to the op.
"""

from typing import no_type_check

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from pvcore_kernels import rows as plain

_ops = torch.ops.pvcore
_modes = torch._C._len_torch_dispatch_stack
_transform = torch._C._functorch.maybe_current_level
_tracing = torch._C._get_tracing_state
_INT32, _FLOAT32, _FLOAT64 = torch.int32, torch.float32, torch.float64
_FLOATS = frozenset((torch.float16, torch.bfloat16, _FLOAT32, _FLOAT64))
# `mm` on a transposed view, which would be another call; as it is bound it also takes `out`.
_linear = torch.nn.functional.linear


@no_type_check
def _is_plain(h):
    """Whether `h` is torch's own on the CPU, and nothing looks on that wants to see the op."""
    return (
        type(h) is Tensor
        and h.is_cpu
        and not (is_dynamo_compiling() or _modes() or _tracing())
        and _transform() is None
    )


@no_type_check
def _scored(h, v, scores):
    """Write the scores of plain `h`, if they can be at once: what torch refuses the op explains."""
    try:
        rows, vectors = h.shape, v.shape
        if (
            len(rows) != 2
            or len(vectors) != 2
            or scores.shape != (rows[0], vectors[0])
            or not (v.is_cpu and scores.is_cpu and scores.is_contiguous())
        ):
            return False
        if h.dtype is _FLOAT32:
            _linear(h, v, out=scores)
            return True
        if v.dtype not in _FLOATS or h.dtype not in _FLOATS:
            return False
        if h.requires_grad or v.requires_grad or scores.requires_grad:
            return False
        plain.project(h, v, out=scores)
    except RuntimeError:
        return False
    return True


@no_type_check
def _projects(h, v):
    """Whether `v` are vectors for plain `h`, and neither wants gradients."""
    rows, vectors = h.shape, v.shape
    return (
        len(rows) == 2 == len(vectors)
        and rows[1] == vectors[1]
        and v.is_cpu
        and type(v) is Tensor
        and h.dtype in _FLOATS
        and v.dtype in _FLOATS
        and not (h.requires_grad or v.requires_grad)
    )


@no_type_check
def _steers(h, delta, row):
    """Whether `delta[row]` can be added to plain `h`, and neither wants gradients."""
    rows, requests = h.shape, delta.shape
    return (
        len(rows) == 2 == len(requests)
        and rows[1] == requests[1]
        and row.shape == rows[:1]
        and row.dtype is _INT32
        and row.is_contiguous()
        and row.is_cpu
        and delta.is_cpu
        and type(delta) is Tensor
        and delta.dtype in _FLOATS
        and h.dtype in _FLOATS
        and not (h.requires_grad or delta.requires_grad)
    )


@no_type_check
def _has_coefficients(h, v, c):
    """Whether `c` are coefficients of each row of `h` for each vector of `v`."""
    rows, vectors = h.shape, v.shape
    return (
        len(rows) == 2 == len(vectors)
        and c.shape == (rows[0], vectors[0])
        and c.is_cpu
        and type(c) is Tensor
        and c.dtype in _FLOATS
        and not c.requires_grad
    )


@no_type_check
def _takes(scores, h, v):
    """Whether `scores` are as those of `h` on `v`."""
    return (
        scores.shape == (h.shape[0], v.shape[0])
        and scores.dtype is (_FLOAT64 if h.dtype is _FLOAT64 else _FLOAT32)
        and scores.is_cpu
        and scores.is_contiguous()
        and not scores.requires_grad
    )


@no_type_check
def project(h, v, rows=None):
    if rows is None and _is_plain(h) and _projects(h, v):
        return plain.project(h, v)
    return _ops.project.default(h, v, rows)


@no_type_check
def project_out(h, v, scores, rows=None):
    if not (rows is None and _is_plain(h) and _scored(h, v, scores)):
        _ops.project_out.default(h, v, scores, rows)


@no_type_check
def steer(h, delta, row):
    if _is_plain(h) and _steers(h, delta, row):
        return plain.steer(h, delta, row)
    return _ops.steer.default(h, delta, row)


@no_type_check
def steer_(h, delta, row):
    if _is_plain(h) and _steers(h, delta, row):
        plain.steer_into(h, h, delta, row)
    else:
        _ops.steer_.default(h, delta, row)


@no_type_check
def steer_project(h, v, delta, row):
    if _is_plain(h) and _projects(h, v) and _steers(h, delta, row):
        return plain.steer_project(h, v, delta, row)
    return _ops.steer_project.default(h, v, delta, row)


@no_type_check
def steer_project_(h, v, delta, row, scores):
    if _is_plain(h) and _steers(h, delta, row):
        if h.dtype is _FLOAT32:
            if _scored(h, v, scores):
                plain.steer_into(h, h, delta, row)
                return
        elif _projects(h, v) and _takes(scores, h, v):
            plain.steer_project_into(h, scores, h, v, delta, row)
            return
    _ops.steer_project_.default(h, v, delta, row, scores)


@no_type_check
def steer_project_tokens(h, v, c):
    if _is_plain(h) and _projects(h, v) and _has_coefficients(h, v, c):
        return plain.steer_project_tokens(h, v, c)
    return _ops.steer_project_tokens.default(h, v, c)


@no_type_check
def steer_project_tokens_(h, v, c, scores):
    # The op refuses scores that would be written over the coefficients before these are added.
    if _is_plain(h) and _has_coefficients(h, v, c) and c.data_ptr() != scores.data_ptr():
        if h.dtype is _FLOAT32 is c.dtype:
            if _scored(h, v, scores):
                h.addmm_(c, v)
                return
        elif _projects(h, v) and _takes(scores, h, v):
            plain.steer_project_tokens_into(h, scores, h, v, c)
            return
    _ops.steer_project_tokens_.default(h, v, c, scores)
