"""The joint step, the deferred scores and the fused norm in the interpreter, against float64."""

import pytest
import torch

from pvcore_kernels.tiled import intervene as joint
from pvcore_kernels.tiled import layers, norm
from tests.kernels.cases import (
    DTYPES,
    assert_close,
    assert_scores,
    bounds,
    clipped,
    requests,
    residual,
    same_bits,
    unit_rows,
)

WIDTHS = (64, 96, 104, 896, 1000)
STEPS = [(t, k, d) for t in (1, 15, 16, 17, 33) for k in (1, 7, 16, 17, 32) for d in WIDTHS]
SCORED = [(t, k, d) for t in (1, 16, 17, 33) for k in (1, 7, 17, 40) for d in WIDTHS]


def aligned_like(h):
    storage = torch.full((len(h), -(-h.shape[1] // 16) * 16), torch.nan, dtype=h.dtype)
    return storage[:, : h.shape[1]]


def stepped(h, v, low, high, row, inverse):
    out, scores = aligned_like(h), torch.full((len(h), len(v)), torch.nan)
    joint.intervene(h, v, low, high, row, inverse, out, scores)
    return out, scores


def step_of(n_rows, n_vec, width, dtype):
    h, v = 3 * residual(n_rows, width, dtype), unit_rows(n_vec, width, torch.float32)
    low, high = bounds(3, n_vec, size=0.02)
    row = requests(n_rows, 3)
    row[0] = 2
    h[0] = (h[0].float() + 5 * v[0]).to(dtype)  # at least this row has far to go
    inverse = torch.linalg.inv(v.double() @ v.double().T)
    return h, v, low, high, row, inverse


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", STEPS[::2], ids=str)
def test_a_joint_step_matches_float64(shape, dtype):
    h, v, low, high, row, inverse = step_of(*shape, dtype)
    out, scores = stepped(h, v, low, high, row, inverse.float())
    wanted = clipped(h, v, low, high, row, inverse)
    assert_close(out, wanted, dtype)
    assert_scores(scores, h, v)
    assert same_bits(out[row < 0], h[row < 0])
    assert (wanted - h.double()).norm() > 2 * (out.double() - wanted).norm()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_step_in_place_is_the_same_to_the_bit(dtype):
    h, v, low, high, row, inverse = step_of(33, 7, 96, dtype)
    out, scores = stepped(h, v, low, high, row, inverse.float())
    moved, again = h.clone(), torch.empty_like(scores)
    joint.intervene(moved, v, low, high, row, inverse.float(), moved, again)
    assert same_bits(moved, out)
    assert same_bits(again, scores)
    assert not torch.equal(out, h)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_within_its_bounds_keeps_every_bit(dtype):
    h, v, _low, _high, row, inverse = step_of(17, 5, 64, dtype)
    h[3] = -0.0
    free = torch.full((3, 5), torch.inf)
    row = row.clamp(min=0)
    out, _scores = stepped(h, v, -free, free, row, inverse.float())
    assert same_bits(out, h)
    none = torch.full_like(row, 9)  # no such request
    assert same_bits(stepped(h, v, 0 * free.nan_to_num(), free, none, inverse.float())[0], h)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SCORED[::2], ids=str)
def test_layers_scored_in_one_launch_match_float64(shape, dtype):
    n_rows, n_vec, width = shape
    storage = [aligned_like(residual(n_rows, width, dtype)) for _ in range(3)]
    hs = [h.copy_(residual(n_rows, width, dtype, seed=s)) for s, h in enumerate(storage)]
    v = torch.zeros(3, n_vec, -(-width // 16) * 16)[..., :width]
    for layer in range(3):
        v[layer] = unit_rows(n_vec, width, torch.float32, seed=layer)
    out = torch.full((3, n_rows, n_vec), torch.nan)
    layers.project_layers(hs, v, out)
    for layer in range(3):
        assert_scores(out[layer], hs[layer], v[layer])
    alone = torch.full((3, 1, n_vec), torch.nan)
    layers.project_layers([h[:1] for h in hs], v, alone)
    assert same_bits(alone[:, 0], out[:, 0])
    again = torch.full_like(out, torch.nan)
    layers.project_layers(hs, v, again, layers.address_table(hs))
    assert same_bits(again, out)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SCORED[1::4], ids=str)
def test_stacked_layers_match_float64_however_they_lie(shape, dtype):
    n_rows, n_vec, width = shape
    room = -(-width // 16) * 16
    beside = torch.full((n_rows, 3, room), torch.nan, dtype=dtype)[..., :width]
    v = torch.zeros(3, n_vec, room)[..., :width]
    for layer in range(3):
        beside[:, layer] = residual(n_rows, width, dtype, seed=layer)
        v[layer] = unit_rows(n_vec, width, torch.float32, seed=layer)
    hs, out = beside.transpose(0, 1), torch.full((3, n_rows, n_vec), torch.nan)
    layers.project_stack(hs, v, out)
    listed = torch.full_like(out, torch.nan)
    layers.project_layers(list(hs), v, listed)
    assert same_bits(out, listed)
    for layer in range(3):
        assert_scores(out[layer], hs[layer], v[layer])
    ring = torch.full((4, 3, n_rows, n_vec), torch.nan)
    layers.project_stack(hs, v, ring, torch.tensor(4 * 1000 + 2))
    assert same_bits(ring[2], out)
    assert ring[[0, 1, 3]].isnan().all()


@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_vec", [0, 1, 7])
@pytest.mark.parametrize("width", [64, 104, 896, 1000])
def test_the_fused_norm_matches_float64(width, n_vec, dtype, offset):
    n_rows = 9
    x, residuals = residual(n_rows, width, dtype), residual(n_rows, width, dtype, seed=5)
    v, row = unit_rows(n_vec, width, torch.float32), requests(n_rows, 4)
    delta = 2 * residual(4, width, torch.float32, seed=6)
    weight = (1 + residual(1, width, torch.float32, seed=7)[0] / 10).to(dtype)
    y, out, scores = aligned_like(x), aligned_like(x), torch.full((n_rows, n_vec), torch.nan)
    norm.add_rmsnorm_steer_project(
        x, residuals, weight, 1e-6, delta, row, v, offset, y, out, scores
    )
    total = x + residuals
    moves = delta[row.clamp(min=0).long()] * (row >= 0)[:, None]
    moved = torch.where((row >= 0)[:, None], (total.float() + moves).to(dtype), total)
    assert same_bits(out, moved)
    assert not torch.equal(moved, total)
    if n_vec:
        assert_scores(scores, total, v)
    wide = moved.double()
    exact = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)
    exact = exact * (weight.double() + offset)
    # Llama rounds the normed row before the weight and once more after it.
    twice = {torch.float32: 5e-7, torch.float16: 1e-3, torch.bfloat16: 4e-3}[dtype]
    assert (y.double() - exact).norm() <= twice * exact.norm()
