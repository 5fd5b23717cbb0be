"""The ops on packed rows under `pvcore::`: functional with gradients, and in place without.

    project(h, v, rows=None) -> scores                project_out(h, v, scores, rows=None)
    segment_mean(h, cu_seqlens) -> means
    steer(h, delta, row) -> h'                        steer_(h, delta, row)
    steer_project(h, v, delta, row) -> (h', scores)   steer_project_(h, v, delta, row, scores)
    steer_project_tokens(h, v, c) -> (h', scores)     steer_project_tokens_(h, v, c, scores)

`h [t, d]`, `v [k, d]`, `delta [b, d]`, `c [t, k]`; `row [t]`, `rows [n]` and `cu_seqlens` int32.
Scores are of `h` as it came, float32, or float64 for float64 rows. A request below 0 leaves its row
as it is, bit for bit. An index out of range is an IndexError on the CPU; a kernel cannot wait to
raise, leaves such a row as it is, and answers NaN for its score or for the mean of its segment.
The functional ops are for autograd, nnsight and torch.compile. Importing this module registers
every op, those of `ops_joint` and `products` too.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from pvcore_kernels import checks, direct, dispatch, gradients
from pvcore_kernels.ops_joint import add_rmsnorm_steer_project as add_rmsnorm_steer_project
from pvcore_kernels.ops_joint import add_rmsnorm_steer_project_ as add_rmsnorm_steer_project_
from pvcore_kernels.ops_joint import intervene as intervene
from pvcore_kernels.ops_joint import intervene_ as intervene_
from pvcore_kernels.ops_joint import project_layers as project_layers
from pvcore_kernels.ops_joint import project_layers_out as project_layers_out
from pvcore_kernels.ops_joint import project_stack_out as project_stack_out
from pvcore_kernels.products import product as product
from pvcore_kernels.reference import accumulator
from pvcore_kernels.registry import refuse_gradients, register


def _project_fake(h: Tensor, v: Tensor, rows: Tensor | None = None) -> Tensor:
    checks.project(h, v, rows)
    n = h.shape[0] if rows is None else rows.shape[0]
    return h.new_empty(n, v.shape[0], dtype=accumulator(h.dtype))


def _project(h: Tensor, v: Tensor, rows: Tensor | None = None) -> Tensor:
    scores = _project_fake(h, v, rows)
    dispatch.project_into(scores, h, v, rows)
    return scores


def _project_out_fake(h: Tensor, v: Tensor, scores: Tensor, rows: Tensor | None = None) -> None:
    checks.project(h, v, rows)
    checks.scores(scores, h, v, rows)


def _project_out(h: Tensor, v: Tensor, scores: Tensor, rows: Tensor | None = None) -> None:
    _project_out_fake(h, v, scores, rows)
    refuse_gradients("project_out", h, v, scores)
    dispatch.project_into(scores, h, v, rows)


def _segment_mean_fake(h: Tensor, cu_seqlens: Tensor) -> Tensor:
    checks.segments(h, cu_seqlens)
    n_segments = cu_seqlens.shape[0] - 1
    return h.new_empty(n_segments, h.shape[1], dtype=accumulator(h.dtype))


def _segment_mean(h: Tensor, cu_seqlens: Tensor) -> Tensor:
    checks.segments(h, cu_seqlens)
    return dispatch.segment_mean(h, cu_seqlens)


def _moved(h: Tensor) -> Tensor:
    return torch.empty_like(h, memory_format=torch.contiguous_format)


def _steer_fake(h: Tensor, delta: Tensor, row: Tensor) -> Tensor:
    checks.steer(h, delta, row)
    return _moved(h)


def _steer(h: Tensor, delta: Tensor, row: Tensor) -> Tensor:
    checks.steer(h, delta, row)
    moved = dispatch.moved_like(h)
    dispatch.steer_into(moved, h, delta, row)
    return moved.contiguous()


def _steer_in_place_fake(h: Tensor, delta: Tensor, row: Tensor) -> None:
    checks.steer(h, delta, row)


def _steer_in_place(h: Tensor, delta: Tensor, row: Tensor) -> None:
    checks.steer(h, delta, row)
    refuse_gradients("steer_", h, delta)
    dispatch.steer_into(h, h, delta, row)


def _steer_project_fake(h: Tensor, v: Tensor, delta: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
    checks.steer(h, delta, row)
    return _moved(h), _project_fake(h, v)


def _steer_project(h: Tensor, v: Tensor, delta: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
    checks.steer(h, delta, row)
    scores, moved = _project_fake(h, v), dispatch.moved_like(h)
    dispatch.steer_project_into(moved, scores, h, v, delta, row)
    return moved.contiguous(), scores


def _steer_project_in_place_fake(
    h: Tensor, v: Tensor, delta: Tensor, row: Tensor, scores: Tensor
) -> None:
    checks.project(h, v, None)
    checks.steer(h, delta, row)
    checks.scores(scores, h, v, None)


def _steer_project_in_place(
    h: Tensor, v: Tensor, delta: Tensor, row: Tensor, scores: Tensor
) -> None:
    _steer_project_in_place_fake(h, v, delta, row, scores)
    refuse_gradients("steer_project_", h, v, delta, scores)
    dispatch.steer_project_into(h, scores, h, v, delta, row)


def _tokens_fake(h: Tensor, v: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    checks.tokens(h, v, c)
    return _moved(h), _project_fake(h, v)


def _tokens(h: Tensor, v: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    checks.tokens(h, v, c)
    scores, moved = _project_fake(h, v), dispatch.moved_like(h)
    dispatch.steer_project_tokens_into(moved, scores, h, v, c)
    return moved.contiguous(), scores


def _tokens_in_place_fake(h: Tensor, v: Tensor, c: Tensor, scores: Tensor) -> None:
    checks.tokens(h, v, c)
    checks.scores(scores, h, v, None)


def _tokens_in_place(h: Tensor, v: Tensor, c: Tensor, scores: Tensor) -> None:
    _tokens_in_place_fake(h, v, c, scores)
    checks.apart("c", c, "scores", scores)
    refuse_gradients("steer_project_tokens_", h, v, c, scores)
    dispatch.steer_project_tokens_into(h, scores, h, v, c)


register(
    "project(Tensor h, Tensor v, Tensor? rows=None) -> Tensor",
    run=_project,
    fake=_project_fake,
    backward=gradients.project,
    setup_context=gradients.keep_project,
)
register(
    "project_out(Tensor h, Tensor v, Tensor(a!) scores, Tensor? rows=None) -> ()",
    run=_project_out,
    fake=_project_out_fake,
)
register(
    "segment_mean(Tensor h, Tensor cu_seqlens) -> Tensor",
    run=_segment_mean,
    fake=_segment_mean_fake,
    backward=gradients.segment_mean,
    setup_context=gradients.keep_segment_mean,
)
register(
    "steer(Tensor h, Tensor delta, Tensor row) -> Tensor",
    run=_steer,
    fake=_steer_fake,
    backward=gradients.steer,
    setup_context=gradients.keep_steer,
)
register(
    "steer_(Tensor(a!) h, Tensor delta, Tensor row) -> ()",
    run=_steer_in_place,
    fake=_steer_in_place_fake,
)
register(
    "steer_project(Tensor h, Tensor v, Tensor delta, Tensor row) -> (Tensor, Tensor)",
    run=_steer_project,
    fake=_steer_project_fake,
    backward=gradients.steer_project,
    setup_context=gradients.keep_steer_project,
)
register(
    "steer_project_(Tensor(a!) h, Tensor v, Tensor delta, Tensor row, Tensor(b!) scores) -> ()",
    run=_steer_project_in_place,
    fake=_steer_project_in_place_fake,
)
register(
    "steer_project_tokens(Tensor h, Tensor v, Tensor c) -> (Tensor, Tensor)",
    run=_tokens,
    fake=_tokens_fake,
    backward=gradients.tokens,
    setup_context=gradients.keep_tokens,
)
register(
    "steer_project_tokens_(Tensor(a!) h, Tensor v, Tensor c, Tensor(b!) scores) -> ()",
    run=_tokens_in_place,
    fake=_tokens_in_place_fake,
)

# What is called: registered ops, behind a short way for plain rows on the CPU.
project: Callable[..., Tensor] = direct.project
project_out: Callable[..., None] = direct.project_out
segment_mean: Callable[..., Tensor] = torch.ops.pvcore.segment_mean.default
steer: Callable[..., Tensor] = direct.steer
steer_: Callable[..., None] = direct.steer_
steer_project: Callable[..., tuple[Tensor, Tensor]] = direct.steer_project
steer_project_: Callable[..., None] = direct.steer_project_
steer_project_tokens: Callable[..., tuple[Tensor, Tensor]] = direct.steer_project_tokens
steer_project_tokens_: Callable[..., None] = direct.steer_project_tokens_
