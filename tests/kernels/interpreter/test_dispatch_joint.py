"""The joint ops as a GPU runs them, run here by the interpreter: every way one of them can go."""

import pytest
import torch

from pvcore_kernels import dispatch_joint, joint, rows
from pvcore_kernels.layout import aligned
from pvcore_kernels.tiled import layers
from tests.kernels.cases import (
    DTYPES,
    assert_close,
    assert_scores,
    requests,
    residual,
    same_bits,
    unit_rows,
)

OPS = torch.ops.pvcore
pytestmark = pytest.mark.usefixtures("as_on_a_gpu")


def norm_of(width, dtype):
    x, residuals = residual(5, width, dtype), residual(5, width, dtype, seed=1)
    weight = (1 + residual(1, width, torch.float32, seed=2)[0] / 10).to(dtype)
    delta, row = residual(3, width, torch.float32, seed=3), requests(5, 3)
    return x, residuals, weight, 1e-5, delta, row, unit_rows(3, width, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [96, 100, 65])
def test_the_functional_norm_takes_any_width(width, dtype):
    x, residuals, *given = norm_of(width, dtype)
    y, moved, scores = OPS.add_rmsnorm_steer_project.default(x, residuals, *given)
    assert y.is_contiguous()
    assert moved.is_contiguous()
    wanted, steered, _ = joint.add_rmsnorm_steer_project(x, residuals, *given, False)
    assert same_bits(moved, steered)
    assert_close(y, wanted.double(), dtype)
    assert_scores(scores, x + residuals, given[-1])
    assert not torch.equal(moved, x + residuals)


def ablation_of(n_vec, width, dtype=torch.float32):
    h, v = residual(4, width, dtype), unit_rows(n_vec, width, dtype)
    nought, row = torch.zeros(1, n_vec), torch.zeros(4, dtype=torch.int32)
    inverse = torch.linalg.inv(v.double() @ v.double().mT).float()
    return h, v, nought, nought, row, inverse


@pytest.mark.parametrize("n_vec", [7, 40])
def test_autocast_rounds_no_coefficient(n_vec):
    given = ablation_of(n_vec, 64)
    moved, scores = OPS.intervene.default(*given)
    with torch.autocast("cpu", torch.bfloat16):
        again, as_before = OPS.intervene.default(*given)
        rounded = scores @ given[-1]
    assert rounded.dtype == torch.bfloat16
    assert same_bits(again, moved)
    assert same_bits(as_before, scores)
    assert (moved @ given[1].mT).norm() < 1e-4 * scores.norm()


@pytest.mark.parametrize("n_vec", [7, 40, 130])
def test_a_row_without_a_request_keeps_every_bit_whatever_the_way(n_vec):
    h, v, low, high, row, inverse = ablation_of(n_vec, 160)
    h[0] = -0.0
    h.view(torch.int32)[1, 5] = -3  # a NaN of its own
    row = torch.tensor([-1, -1, 0, -1], dtype=torch.int32)
    before = h.clone()
    moved, scores = OPS.intervene.default(h, v, low, high, row, inverse)
    OPS.intervene_.default(h, v, low, high, row, inverse, scores)
    resting = row < 0
    for got in (moved, h):
        assert same_bits(got[resting], before[resting])
        assert not torch.equal(got[2], before[2])
        assert (got[2] @ v.mT).norm() < 1e-4 * (before[2] @ v.mT).norm()


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_adding_nothing_above_the_crossover_keeps_every_bit(dtype):
    h, v = residual(300, 32, dtype), unit_rows(3, 32, torch.float32)
    h[::2] = -0.0
    c = residual(300, 3, torch.float32, seed=4)
    c[::2] = 0
    out = torch.full_like(h, torch.nan)
    rows.add_tokens_into(out, h, v, c)
    assert same_bits(out[::2], h[::2])
    wanted = h.double() + c.double() @ v.double()
    assert_close(out, wanted, torch.float32 if dtype == torch.float64 else dtype)
    rows.add_tokens_into(h, h, v, c)
    assert same_bits(h, out)


def test_writing_in_place_askew_is_refused_and_writes_nothing():
    h, v, low, high, row, inverse = ablation_of(3, 100)
    x, residuals, *given = norm_of(100, torch.float32)
    before, both = h.clone(), residuals.clone()
    scores, y = torch.empty(4, 3), torch.empty(5, 100)
    with pytest.raises(ValueError, match="call the functional op"):
        OPS.intervene_.default(h, v, low, high, row, inverse, scores)
    for out, normed in ((residuals, aligned(y)), (aligned(residuals), y)):
        with pytest.raises(ValueError, match="call the functional op"):
            OPS.add_rmsnorm_steer_project_.default(x, out, *given, False, normed, torch.empty(5, 3))
    assert torch.equal(h, before)
    assert torch.equal(residuals, both)


@pytest.mark.parametrize("step", [-1, -3, -4, 2, 5])
def test_a_step_below_zero_counts_from_the_end_of_the_ring(step):
    hs = torch.stack([residual(4, 64, torch.float32, seed=s) for s in range(2)])
    v = torch.stack([unit_rows(3, 64, torch.float32, seed=s) for s in range(2)])
    beside = torch.zeros(6, 2, 4, 3)
    dispatch_joint.project_stack_into(beside[2:5], hs, v, torch.tensor(step))
    written = beside.flatten(1).any(1).nonzero().flatten().tolist()
    assert written == [2 + step % 3]
    for layer in range(2):
        assert_scores(beside[written[0], layer], hs[layer], v[layer])


def test_a_capture_that_cannot_make_its_table_says_what_to_call(monkeypatch):
    hs, out = [residual(4, 64, torch.float32)] * 2, torch.full((2, 4, 3), torch.nan)
    v = torch.stack([unit_rows(3, 64, torch.float32)] * 2)
    monkeypatch.setattr(layers, "capturing", lambda _: True)
    with pytest.raises(RuntimeError, match="call project_stack_out"):
        OPS.project_layers_out.default(hs, v, out)
    assert out.isnan().all()
    layers.project_layers(hs, v, out, layers.address_table(hs))
    assert_scores(out[0], hs[0], v[0])
