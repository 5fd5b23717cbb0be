"""What the ops run on a GPU, run here by the interpreter: the launch beneath each, and its twin."""

import pytest
import torch

from pvcore_kernels import dispatch, dispatch_joint, rows
from tests.kernels.cases import DTYPES, assert_close, assert_scores, requests, residual, unit_rows
from tests.kernels.products import Products


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch):
    def path(device, dtype, n_vec):
        return "triton" if n_vec <= 128 else "cublas"

    monkeypatch.setattr(dispatch, "path", path)


@pytest.fixture
def launched(monkeypatch):
    """The names of the kernels launched, in order."""
    from pvcore_kernels.tiled import project, steer

    names = []

    def watch(module, name):
        original = getattr(module, name)

        def watched(*args):
            names.append(name)
            original(*args)

        monkeypatch.setattr(module, name, watched)

    watch(project, "project")
    for name in ("steer", "steer_project", "steer_project_tokens"):
        watch(steer, name)
    return names


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("n_rows", "n_vec", "names"),
    [
        (40, 7, ["steer_project"]),
        (40, 128, ["steer_project"]),
        (16, 32, ["steer_project"]),
        (16, 33, ["project", "steer"]),
        (5, 0, ["project", "steer"]),
    ],
)
def test_steering_is_one_launch_until_one_program_would_read_a_large_bank(
    n_rows, n_vec, names, dtype, launched
):
    h, v, row = residual(n_rows, 100, dtype), unit_rows(n_vec, 100, dtype), requests(n_rows, 3)
    delta = 3 * residual(3, 100, torch.float32, seed=3)
    out, scores = dispatch.moved_like(h), torch.full((n_rows, n_vec), torch.nan)
    dispatch.steer_project_into(out, scores, h, v, delta, row)
    assert launched == names
    wanted = rows.steer(h.double(), delta.double(), row)
    assert_close(out.contiguous(), wanted, dtype)
    assert_scores(scores, h, v)


def test_above_the_crossover_the_product_is_torchs(launched):
    h, v, row = residual(20, 64, torch.float32), unit_rows(200, 64, torch.float32), requests(20, 3)
    delta, c = residual(3, 64, torch.float32), residual(20, 200, torch.float32, seed=4)
    out, scores = dispatch.moved_like(h), torch.full((20, 200), torch.nan)
    dispatch.steer_project_into(out, scores, h, v, delta, row)
    assert launched == ["steer"]
    assert_scores(scores, h, v)
    assert_close(out, rows.steer(h.double(), delta.double(), row), torch.float32)
    dispatch.steer_project_tokens_into(out, scores.fill_(torch.nan), h, v, c)
    assert launched == ["steer"]
    assert_scores(scores, h, v)
    assert_close(out, h.double() + c.double() @ v.double(), torch.float32)


def test_a_crossover_beyond_the_proven_tiles_leaves_steering_to_two_launches(monkeypatch, launched):
    monkeypatch.setattr(dispatch, "path", lambda *_: "triton")
    h, v, row = residual(20, 64, torch.float32), unit_rows(129, 64, torch.float32), requests(20, 3)
    delta, c = residual(3, 64, torch.float32), residual(20, 129, torch.float32, seed=4)
    out, scores = dispatch.moved_like(h), torch.full((20, 129), torch.nan)
    dispatch.steer_project_into(out, scores, h, v, delta, row)
    assert launched == ["project", "steer"]
    assert_scores(scores, h, v)
    dispatch.steer_project_tokens_into(out, scores.fill_(torch.nan), h, v, c)
    assert launched == ["project", "steer", "project"]
    assert_scores(scores, h, v)
    assert_close(out, h.double() + c.double() @ v.double(), torch.float32)


@pytest.mark.parametrize("n_vec", [7, 200])
@pytest.mark.parametrize("n_rows", [4, 0])
def test_a_listed_row_outside_h_scores_nan_on_either_side_of_the_crossover(n_rows, n_vec):
    h, v = residual(n_rows, 64, torch.float32), unit_rows(n_vec, 64, torch.float32)
    listed = torch.tensor([3, 4, -1, 0], dtype=torch.int32)
    scores = torch.zeros(4, n_vec)
    dispatch.project_into(scores, h, v, listed)
    assert scores[[1, 2]].isnan().all()
    if n_rows:
        assert_scores(scores[[0, 3]], h[[3, 0]], v)


@pytest.mark.parametrize("n_vec", [7, 200])
def test_gradients_of_listed_rows_leave_those_outside_h_out(n_vec, as_on_a_gpu):
    h = residual(4, 64, torch.float32).requires_grad_()
    v = unit_rows(n_vec, 64, torch.float32).requires_grad_()
    listed = torch.tensor([3, 4, -1, 3], dtype=torch.int32)
    scores = torch.ops.pvcore.project.default(h, v, listed)
    scores[[0, 3]].square().sum().backward()
    twin, units = h.detach().double().requires_grad_(), v.detach().double().requires_grad_()
    (twin[[3, 3]] @ units.mT).square().sum().backward()
    assert_close(h.grad, twin.grad, torch.float32)
    assert_close(v.grad, units.grad, torch.float32)
    assert h.grad[:3].abs().max() == 0


def test_no_product_above_the_crossover_may_be_rounded(monkeypatch, as_on_a_gpu):
    h, v, row = residual(20, 64, torch.float32), unit_rows(200, 64, torch.float32), requests(20, 1)
    nought, inverse = torch.zeros(1, 200), torch.eye(200)
    out, scores = dispatch.moved_like(h), torch.empty(20, 200)
    with Products(monkeypatch, dispatch, dispatch_joint, rows) as products:
        dispatch_joint.intervene_into(out, scores, h, v, nought, nought, row, inverse)
    assert [within for _, within in products.seen] == [True] * 4  # scores twice, a move, an add
    assert not torch.equal(out, h)


def test_writing_in_place_askew_is_refused_and_writes_nothing():
    h, v = residual(20, 100, torch.float32), unit_rows(3, 100, torch.float32)
    before, scores = h.clone(), torch.empty(20, 3)
    delta, row, c = residual(3, 100, torch.float32), requests(20, 3), torch.ones(20, 3)
    for call in (
        lambda: dispatch.steer_into(h, h, delta, row),
        lambda: dispatch.steer_project_into(h, scores, h, v, delta, row),
        lambda: dispatch.steer_project_tokens_into(h, scores, h, v, c),
    ):
        with pytest.raises(ValueError, match="call the functional op"):
            call()
    assert torch.equal(h, before)


def test_means_are_those_of_the_twin():
    h, bounds = residual(50, 96, torch.bfloat16), torch.tensor([0, 7, 50], dtype=torch.int32)
    got = dispatch.segment_mean(h, bounds)
    assert_close(got, rows.segment_mean(h.double(), bounds), torch.float32)
