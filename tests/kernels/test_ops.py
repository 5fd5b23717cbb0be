"""The registered ops: float64, opcheck, gradients, compilation and in-place twins.

The cases marked `gpu` are the same ones on a CUDA device, where the ops launch Triton.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pvcore_kernels import ops
from tests.kernels.cases import (
    DTYPES,
    assert_close,
    assert_scores,
    requests,
    residual,
    same_bits,
    unit_rows,
)

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
DEVICES = ("cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NO_GPU]))
# Prefills of few requests take runs, decodes gather; 300 rows are more than one block of 256.
SHAPES = [(1, 1, 64), (7, 7, 100), (33, 17, 96), (300, 3, 65), (300, 130, 64)]
ROWS = {"runs": lambda n: requests(n, 5).sort().values, "mixed": lambda n: requests(n, 5)}


def given_rows(shape, dtype, device, kind="mixed"):
    n_rows, n_vec, width = shape
    h, v = residual(n_rows, width, dtype), unit_rows(n_vec, width, dtype)
    delta, row = 3 * residual(5, width, torch.float32, seed=3), ROWS[kind](n_rows)
    row[-1] = 4
    c = 4 * residual(n_rows, n_vec, torch.float32, seed=4)
    return [one.to(device) for one in (h, v, delta, row, c)]


def by_request(h, delta, row):
    """float64, written from the description."""
    h, delta, row = h.cpu().double(), delta.cpu().double(), row.cpu()
    return h + delta[row.clamp(min=0).long()] * (row >= 0)[:, None]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_project_matches_float64(shape, dtype, device):
    h, v, _delta, _row, _c = given_rows(shape, dtype, device)
    assert_scores(ops.project(h, v), h, v)
    rows = torch.randint(len(h), (5,), dtype=torch.int32).to(device)
    assert_scores(ops.project(h, v, rows), h[rows.long()], v)
    out = torch.full((len(h), len(v)), torch.nan, device=device)
    ops.project_out(h, v, out)
    assert same_bits(out, ops.project(h, v))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("n_vec", [128, 300])
def test_no_score_is_rounded_where_a_process_allows_tf32(n_vec, device):
    h, v, _delta, _row, c = given_rows((300, n_vec, 1024), torch.float32, device)
    torch.set_float32_matmul_precision("high")
    try:
        moved, scores = ops.steer_project_tokens(h, v, c)
        leaves = h.clone().requires_grad_(), v.clone().requires_grad_()
        got = torch.autograd.grad(ops.project(*leaves).square().sum(), leaves)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert_scores(scores, h, v)
    assert_close(moved, h.cpu().double() + c.cpu().double() @ v.cpu().double(), torch.float32)
    rows, units = h.cpu().double().requires_grad_(), v.cpu().double().requires_grad_()
    wanted = torch.autograd.grad((rows @ units.T).square().sum(), (rows, units))
    for one, exact in zip(got, wanted, strict=True):
        assert (one.cpu().double() - exact).norm() <= 2e-6 * exact.norm()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_steering_matches_float64(shape, dtype, kind, device):
    h, v, delta, row, _c = given_rows(shape, dtype, device, kind)
    moved, scores = ops.steer_project(h, v, delta, row)
    wanted = by_request(h, delta, row)
    assert moved.is_contiguous()
    assert_close(moved, wanted, dtype)
    assert_scores(scores, h, v)
    assert same_bits(moved[row < 0], h[row < 0])
    assert same_bits(ops.steer(h, delta, row), moved)
    assert (wanted - h.cpu().double()).norm() > 0.5 * h.cpu().double().norm()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_coefficients_of_every_row_match_float64(shape, dtype, device):
    h, v, _delta, _row, c = given_rows(shape, dtype, device)
    moved, scores = ops.steer_project_tokens(h, v, c)
    assert_close(moved, h.cpu().double() + c.cpu().double() @ v.cpu().double(), dtype)
    assert_scores(scores, h, v)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_means_match_float64(dtype, device):
    h = residual(90, 96, dtype) + 1
    bounds = torch.tensor([2, 18, 19, 90], dtype=torch.int32)
    got = ops.segment_mean(h.to(device), bounds.to(device))
    assert_close(got[:1], h[2:18].double().mean(0, keepdim=True), torch.float32)
    assert_close(got[2:], h[19:].double().mean(0, keepdim=True), torch.float32)
    assert same_bits(got[1].cpu(), h[18].float())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("shape", [(33, 17, 96), (300, 3, 64), (300, 130, 64)], ids=str)
def test_in_place_is_the_functional_op(shape, dtype, kind, device):
    h, v, delta, row, c = given_rows(shape, dtype, device, kind)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    scores = torch.full((len(h), len(v)), torch.nan, dtype=wide, device=device)
    moved, wanted = ops.steer_project(h, v, delta, row)
    tokens, _ = ops.steer_project_tokens(h, v, c)
    alone, both, each = h.clone(), h.clone(), h.clone()
    ops.steer_(alone, delta, row)
    ops.steer_project_(both, v, delta, row, scores)
    assert same_bits(alone, moved)
    assert same_bits(both, moved)
    assert same_bits(scores, wanted)
    ops.steer_project_tokens_(each, v, c, scores.fill_(torch.nan))
    assert same_bits(each, tokens)
    assert same_bits(scores, wanted)
    assert not torch.equal(h, moved)


@pytest.mark.parametrize("device", DEVICES)
def test_float64_in_gives_float64_out(device):
    h, v, delta, row, c = given_rows((9, 3, 40), torch.float64, device)
    moved, scores = ops.steer_project(h, v, delta, row)
    tokens, _ = ops.steer_project_tokens(h, v, c)
    mean = ops.segment_mean(h, torch.tensor([0, 9], dtype=torch.int32, device=device))
    wanted = (by_request(h, delta, row), h.cpu() @ v.cpu().T, h.cpu() + c.cpu().double() @ v.cpu())
    for got, exact in zip((moved, scores, tokens), wanted, strict=True):
        assert got.dtype == torch.float64
        assert (got.cpu() - exact).abs().max() < 1e-13
    assert (mean.cpu() - h.cpu().mean(0)).abs().max() < 1e-14


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_in_gives_nothing_out(dtype, device):
    h, v, delta, row, _c = given_rows((4, 3, 64), dtype, device)
    none, some = h[:0], v[:0]
    assert ops.project(none, v).shape == (0, 3)
    assert [one.shape for one in ops.steer_project(none, v, delta, row[:0])] == [(0, 64), (0, 3)]
    moved, scores = ops.steer_project(h, some, delta, row)
    assert scores.shape == (4, 0)
    assert_close(moved, by_request(h, delta, row), dtype)
    tokens, _ = ops.steer_project_tokens(h, some, h.new_empty(4, 0))
    assert same_bits(tokens, h)
    bounds = torch.zeros(1, dtype=torch.int32, device=device)
    assert ops.segment_mean(h, bounds).shape == (0, 64)


@pytest.mark.gpu
@NO_GPU
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("n_vec", [7, 200])
def test_a_listed_row_outside_h_costs_no_gpu(n_vec, dtype):
    h, v = residual(4, 64, dtype).cuda().requires_grad_(), unit_rows(n_vec, 64, dtype).cuda()
    listed = torch.tensor([3, 4, -1, 0], dtype=torch.int32, device="cuda")
    scores = ops.project(h, v.requires_grad_(), listed)
    assert scores[[1, 2]].isnan().all()
    scores[[0, 3]].sum().backward()
    torch.cuda.synchronize()
    whole = v.detach().double().sum(0)
    for row, wanted in zip(h.grad.double(), (whole, 0 * whole, 0 * whole, whole), strict=True):
        assert (row - wanted).norm() <= 4e-3 * whole.norm()
    assert (v.grad[0].double() - (h[0] + h[3]).double()).norm() <= 8e-3 * h.double().norm()


@settings(max_examples=200)
@given(
    n_rows=st.integers(1, 40),
    n_vec=st.integers(1, 20),
    width=st.integers(1, 70),
    seed=st.integers(0, 2**16),
    dtype=st.sampled_from(DTYPES),
)
def test_laws_of_steering(n_rows, n_vec, width, seed, dtype):
    h, v = residual(n_rows, width, dtype, seed=seed), unit_rows(n_vec, width, dtype, seed=seed + 1)
    delta, row = residual(4, width, torch.float32, seed=seed + 2), requests(n_rows, 4, seed=seed)
    moved, scores = ops.steer_project(h, v, delta, row)
    # Pass-through, to the bit.
    assert same_bits(moved[row < 0], h[row < 0])
    # Permutations of rows, of requests and of vectors.
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(n_rows, generator=generator)
    vectors = torch.randperm(n_vec, generator=generator)
    shuffled, shuffled_scores = ops.steer_project(h[order], v[vectors], delta, row[order])
    assert same_bits(shuffled, moved[order])
    bound = 1e-6 * h.float().norm(dim=1)[order, None] * v.float().norm(dim=1)[vectors]
    assert ((shuffled_scores - scores[order][:, vectors]).abs() <= bound + 1e-30).all()
    # A row alone is the row in its batch.
    alone, _ = ops.steer_project(h[:1], v, delta, row[:1])
    assert same_bits(alone, moved[:1])


@settings(max_examples=200)
@given(
    n_rows=st.integers(1, 20),
    n_vec=st.integers(1, 12),
    width=st.integers(1, 70),
    seed=st.integers(0, 2**16),
)
def test_laws_of_projection_space(n_rows, n_vec, width, seed):
    h, v = residual(n_rows, width, torch.float64, seed=seed), unit_rows(n_vec, width, torch.float64)
    c = residual(n_rows, n_vec, torch.float64, seed=seed + 1)
    moved, scores = ops.steer_project_tokens(h, v, c)
    # Gram identity: what a second read would show needs no second read.
    assert torch.allclose(ops.project(moved, v), scores + c @ (v @ v.T), atol=1e-11)
    # Linearity in the rows and in the coefficients.
    doubled, doubled_scores = ops.steer_project_tokens(2 * h, v, 2 * c)
    assert torch.allclose(doubled, 2 * moved, atol=1e-12)
    assert torch.allclose(doubled_scores, 2 * scores, atol=1e-12)
    twice, _ = ops.steer_project_tokens(moved, v, c)
    assert torch.allclose(twice, h + 2 * (moved - h), atol=1e-11)
