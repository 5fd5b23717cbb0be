"""The ops on several layers or vectors together, under `pvcore::`.

    project_layers(hs, v) -> scores                     project_layers_out(hs, v, scores)
    project_stack_out(hs, v, scores, step=None)
    intervene(h, v, low, high, row, gram_inverse) -> (h', scores)
    intervene_(h, v, low, high, row, gram_inverse, scores)
    add_rmsnorm_steer_project(x, residual, weight, eps, delta, row, v, offset) -> (y, h', scores)
    add_rmsnorm_steer_project_(x, residual, weight, eps, delta, row, v, offset, y, scores)

`hs` are `[t, d]` for each layer and `v [layer, k, d]`; `low` and `high` are `[b, k]`, `row [t]`
picks the request of a row, which stays as it is where there is none. `gram_inverse` is the inverse
of `v vᵀ`. Scores are of the rows as they came: in the fused norm those of `x + residual`. In
`project_stack_out` the layers lie in one tensor `[layer, t, d]`; with a `step`, one int64 on the
device, `scores` are a ring `[slot, layer, t, k]` of which slot `step % n_slots` is written.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from pvcore_kernels import checks, gradients_joint
from pvcore_kernels import dispatch_joint as dispatch
from pvcore_kernels.dispatch import moved_like
from pvcore_kernels.reference import accumulator
from pvcore_kernels.registry import refuse_gradients, register


def _layer_scores(hs: Sequence[Tensor], v: Tensor) -> Tensor:
    checks.layers(hs, v)
    dtype = accumulator(hs[0].dtype)
    return hs[0].new_empty(len(hs), hs[0].shape[0], v.shape[1], dtype=dtype)


def _project_layers(hs: Sequence[Tensor], v: Tensor) -> Tensor:
    scores = _layer_scores(hs, v)
    dispatch.project_layers_into(scores, hs, v)
    return scores


def _project_layers_out(hs: Sequence[Tensor], v: Tensor, scores: Tensor) -> None:
    checks.like("scores", scores, _layer_scores(hs, v))
    refuse_gradients("project_layers_out", *hs, v, scores)
    dispatch.project_layers_into(scores, hs, v)


def _project_layers_out_fake(hs: Sequence[Tensor], v: Tensor, scores: Tensor) -> None:
    checks.like("scores", scores, _layer_scores(hs, v))


def _project_stack_out(hs: Tensor, v: Tensor, scores: Tensor, step: Tensor | None = None) -> None:
    checks.stack(hs, v, scores, step)
    refuse_gradients("project_stack_out", hs, v, scores)
    dispatch.project_stack_into(scores, hs, v, step)


def _project_stack_out_fake(
    hs: Tensor, v: Tensor, scores: Tensor, step: Tensor | None = None
) -> None:
    checks.stack(hs, v, scores, step)


def _moved(
    h: Tensor, v: Tensor, low: Tensor, high: Tensor, row: Tensor, gram_inverse: Tensor
) -> tuple[Tensor, Tensor]:
    checks.step(h, v, low, high, row, gram_inverse)
    scores = h.new_empty(h.shape[0], v.shape[0], dtype=accumulator(h.dtype))
    return torch.empty_like(h, memory_format=torch.contiguous_format), scores


def _intervene(
    h: Tensor, v: Tensor, low: Tensor, high: Tensor, row: Tensor, gram_inverse: Tensor
) -> tuple[Tensor, Tensor]:
    moved, scores = _moved(h, v, low, high, row, gram_inverse)
    return dispatch.intervene(moved, scores, h, v, low, high, row, gram_inverse), scores


def _intervene_in_place(
    h: Tensor,
    v: Tensor,
    low: Tensor,
    high: Tensor,
    row: Tensor,
    gram_inverse: Tensor,
    scores: Tensor,
) -> None:
    _intervene_in_place_fake(h, v, low, high, row, gram_inverse, scores)
    refuse_gradients("intervene_", h, v, low, high, gram_inverse, scores)
    dispatch.intervene_into(h, scores, h, v, low, high, row, gram_inverse)


def _intervene_in_place_fake(
    h: Tensor,
    v: Tensor,
    low: Tensor,
    high: Tensor,
    row: Tensor,
    gram_inverse: Tensor,
    scores: Tensor,
) -> None:
    checks.step(h, v, low, high, row, gram_inverse)
    checks.scores(scores, h, v, None)


def _norm_fake(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    delta: Tensor,
    row: Tensor,
    v: Tensor,
    offset: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    checks.norm(x, residual, weight, delta, row, v)
    scores = x.new_empty(x.shape[0], v.shape[0], dtype=accumulator(x.dtype))
    like = torch.contiguous_format
    return torch.empty_like(x, memory_format=like), torch.empty_like(x, memory_format=like), scores


def _norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    delta: Tensor,
    row: Tensor,
    v: Tensor,
    offset: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    checks.norm(x, residual, weight, delta, row, v)
    scores = x.new_empty(x.shape[0], v.shape[0], dtype=accumulator(x.dtype))
    y, moved = moved_like(x), moved_like(x)
    dispatch.norm_into(y, moved, scores, x, residual, weight, eps, delta, row, v, offset)
    return y.contiguous(), moved.contiguous(), scores


def _norm_in_place(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    delta: Tensor,
    row: Tensor,
    v: Tensor,
    offset: bool,
    y: Tensor,
    scores: Tensor,
) -> None:
    _norm_in_place_fake(x, residual, weight, eps, delta, row, v, offset, y, scores)
    refuse_gradients("add_rmsnorm_steer_project_", x, residual, weight, delta, v, y, scores)
    dispatch.norm_into(y, residual, scores, x, residual, weight, eps, delta, row, v, offset)


def _norm_in_place_fake(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    delta: Tensor,
    row: Tensor,
    v: Tensor,
    offset: bool,
    y: Tensor,
    scores: Tensor,
) -> None:
    checks.norm(x, residual, weight, delta, row, v)
    checks.like("y", y, x)
    checks.scores(scores, x, v, None)


_STEP = "Tensor v, Tensor low, Tensor high, Tensor row, Tensor gram_inverse"
_NORM = "Tensor weight, float eps, Tensor delta, Tensor row, Tensor v"

project_layers = register(
    "project_layers(Tensor[] hs, Tensor v) -> Tensor",
    run=_project_layers,
    fake=_layer_scores,
    backward=gradients_joint.layers,
    setup_context=gradients_joint.keep_layers,
)
project_layers_out = register(
    "project_layers_out(Tensor[] hs, Tensor v, Tensor(a!) scores) -> ()",
    run=_project_layers_out,
    fake=_project_layers_out_fake,
)
project_stack_out = register(
    "project_stack_out(Tensor hs, Tensor v, Tensor(a!) scores, Tensor? step=None) -> ()",
    run=_project_stack_out,
    fake=_project_stack_out_fake,
)
intervene = register(
    f"intervene(Tensor h, {_STEP}) -> (Tensor, Tensor)",
    run=_intervene,
    fake=_moved,
    backward=gradients_joint.intervene,
    setup_context=gradients_joint.keep_intervene,
)
intervene_ = register(
    f"intervene_(Tensor(a!) h, {_STEP}, Tensor(b!) scores) -> ()",
    run=_intervene_in_place,
    fake=_intervene_in_place_fake,
)
add_rmsnorm_steer_project = register(
    f"add_rmsnorm_steer_project(Tensor x, Tensor residual, {_NORM}, bool offset=False)"
    " -> (Tensor, Tensor, Tensor)",
    run=_norm,
    fake=_norm_fake,
    backward=gradients_joint.norm,
    setup_context=gradients_joint.keep_norm,
)
add_rmsnorm_steer_project_ = register(
    f"add_rmsnorm_steer_project_(Tensor x, Tensor(a!) residual, {_NORM}, bool offset, Tensor(b!) y,"
    " Tensor(c!) scores) -> ()",
    run=_norm_in_place,
    fake=_norm_in_place_fake,
)
