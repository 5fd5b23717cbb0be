"""The ops on several layers or vectors: float64, transformers' norms, gradients, compilation.

The cases marked `gpu` are the same ones on a CUDA device, where the ops launch Triton.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pvcore_kernels import ops_joint as ops
from pvcore_kernels.layout import aligned, is_aligned
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

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
DEVICES = ("cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NO_GPU]))
SHAPES = [(1, 1, 64), (7, 7, 100), (33, 17, 96), (300, 3, 65), (40, 48, 256)]
WIDE = torch.float64


def step_of(shape, dtype, device, *, size=1.0):
    n_rows, n_vec, width = shape
    h, v = residual(n_rows, width, dtype), unit_rows(n_vec, width, dtype)
    low, high = bounds(4, n_vec, size=size)
    row = requests(n_rows, 4)
    row[0] = 3
    h[0] = (h[0].float() + 5 * v[0].float()).to(dtype)
    inverse = torch.linalg.inv(v.double() @ v.double().T)
    kept = inverse if dtype == WIDE else inverse.float()
    return [one.to(device) for one in (h, v, low, high, row, kept)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_joint_step_matches_float64(shape, dtype, device):
    h, v, low, high, row, inverse = step_of(shape, dtype, device)
    moved, scores = ops.intervene(h, v, low, high, row, inverse)
    exact = torch.linalg.inv(v.cpu().double() @ v.cpu().double().T)
    wanted = clipped(h, v, low, high, row, exact)
    assert moved.is_contiguous()
    assert_close(moved, wanted, dtype)
    assert_scores(scores, h, v)
    assert same_bits(moved[row < 0], h[row < 0])
    assert (wanted - h.cpu().double()).norm() > 2 * (moved.cpu().double() - wanted).norm()
    target, again = aligned(h.clone()), torch.full_like(scores, torch.nan)
    # A product may round by how its rows lie.
    moved, scores = ops.intervene(aligned(h.clone()), v, low, high, row, inverse)
    ops.intervene_(target, v, low, high, row, inverse, again)
    assert same_bits(target, moved)
    assert same_bits(again, scores)
    if device == "cuda" and not is_aligned(h):
        with pytest.raises(ValueError, match="call the functional op"):
            ops.intervene_(h, v, low, high, row, inverse, again)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("n_vec", [7, 40])
def test_autocast_rounds_no_coefficient(n_vec, device):
    h, v, _low, _high, row, inverse = step_of((9, n_vec, 64), torch.float32, device)
    nought, row = torch.zeros(4, n_vec, device=device), row.clamp(min=0)
    given = h, v, nought, nought, row, inverse
    moved, scores = ops.intervene(*given)
    with torch.autocast(device, torch.bfloat16):
        again, as_before = ops.intervene(*given)
        rounded = scores @ inverse
    assert rounded.dtype == torch.bfloat16
    assert same_bits(again, moved)
    assert same_bits(as_before, scores)
    assert (moved.double() @ v.double().mT).norm() < 1e-4 * scores.norm()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("n_vec", [7, 40, 130])
def test_a_row_without_a_request_keeps_the_sign_of_zero(n_vec, device):
    h, v, low, high, row, inverse = step_of((9, n_vec, 160), torch.float32, device)
    h[1], row[1] = -0.0, -1
    moved, _ = ops.intervene(h, v, low, high, row, inverse)
    assert same_bits(moved[row < 0], h[row < 0])
    assert moved[1].signbit().all()
    assert not torch.equal(moved, h)


def test_a_row_that_asks_for_no_bounds_there_are_is_refused_and_nothing_written():
    h, v, low, high, row, inverse = step_of((6, 3, 16), torch.float32, "cpu")
    before, row = h.clone(), torch.where(row == 3, 4, row).to(torch.int32)
    scores = torch.full((6, 3), torch.nan)
    with pytest.raises(IndexError, match="request 4 of 4"):
        ops.intervene_(h, v, low, high, row, inverse, scores)
    with pytest.raises(IndexError, match="request 4 of 4"):
        ops.intervene(h, v, low, high, row, inverse)
    assert same_bits(h, before)
    assert scores.isnan().all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_layers_scored_together_match_float64(shape, dtype, device):
    n_rows, n_vec, width = shape
    hs = [residual(n_rows, width, dtype, seed=s).to(device) for s in range(3)]
    v = torch.stack([unit_rows(n_vec, width, dtype, seed=s) for s in range(3)]).to(device)
    scores = ops.project_layers(hs, v)
    for layer in range(3):
        assert_scores(scores[layer], hs[layer], v[layer])
    out = torch.full_like(scores, torch.nan)
    ops.project_layers_out(hs, v, out)
    assert same_bits(out, scores)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [*DTYPES, WIDE])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_stacked_layers_are_scored_like_listed_ones_into_a_slot_of_a_ring(shape, dtype, device):
    n_rows, n_vec, width = shape
    hs = torch.stack([residual(n_rows, width, dtype, seed=s) for s in range(3)]).to(device)
    v = torch.stack([unit_rows(n_vec, width, dtype, seed=s) for s in range(3)]).to(device)
    wanted = ops.project_layers(list(hs), v)
    out, ring = torch.full_like(wanted, torch.nan), wanted.new_full((5, *wanted.shape), torch.nan)
    ops.project_stack_out(hs, v, out)
    step = torch.zeros((), dtype=torch.int64, device=device)
    for turn in (3, 9):
        ops.project_stack_out(hs, v, ring, step.fill_(turn))
    assert same_bits(out, wanted)
    assert same_bits(ring[3], wanted)
    assert same_bits(ring[4], wanted)
    assert ring[:3].isnan().all()
    assert wanted.abs().max() > 0.5


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("gemma", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_vec", [0, 3, 12])
@pytest.mark.parametrize("width", [96, 100])
def test_the_fused_norm_is_that_of_transformers(width, n_vec, dtype, gemma, device):
    from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

    norm = (Gemma2RMSNorm if gemma else Qwen2RMSNorm)(width, eps=1e-5).to(device, dtype)
    torch.nn.init.normal_(norm.weight, 1.0, 0.1)
    x, residuals = (residual(9, width, dtype, seed=seed).to(device) for seed in range(2))
    delta, row = 2 * residual(4, width, torch.float32, seed=2).to(device), requests(9, 4).to(device)
    v = unit_rows(n_vec, width, torch.float32).to(device)
    with torch.no_grad():
        given = (norm.weight, 1e-5, delta, row, v, gemma)
        y, moved, scores = ops.add_rmsnorm_steer_project(x, residuals, *given)
        total = x + residuals
        steered = (total.float() + delta[row.clamp(min=0).long()]).to(dtype)
        wanted = torch.where((row >= 0)[:, None], steered, total)
        assert same_bits(moved, wanted)
        assert not torch.equal(moved, total)
        if device == "cpu":
            assert same_bits(y, norm(wanted))
        else:
            assert_close(y, norm(wanted).double().cpu(), dtype)
        if n_vec:
            assert_scores(scores, total, v)
        target, normed = aligned(residuals.clone()), aligned(torch.empty_like(y))
        table = torch.full_like(scores, torch.nan)
        ops.add_rmsnorm_steer_project_(x, target, *given, normed, table)
    assert same_bits(target, moved)
    assert same_bits(normed, y)
    assert same_bits(table, scores)


@pytest.mark.parametrize("device", DEVICES)
def test_float64_stays_float64(device):
    h, v, _low, _high, row, inverse = step_of((9, 4, 32), WIDE, device)
    zeros = torch.zeros(4, 4, dtype=WIDE, device=device)
    moved, scores = ops.intervene(h, v, zeros, zeros, row.clamp(min=0), inverse)
    assert (moved.dtype, scores.dtype) == (WIDE, WIDE)
    assert (moved @ v.mT).abs().max() < 1e-13
    assert scores.abs().max() > 0.5
    layers = ops.project_layers([h, moved], torch.stack([v, v]))
    assert torch.allclose(layers[0], scores, atol=1e-13)
    assert layers.dtype == WIDE


def samples(dtype):
    h, v, low, high, row, inverse = step_of((6, 3, 16), dtype, "cpu")
    other, delta = residual(6, 16, dtype, seed=9), residual(4, 16, dtype, seed=10)
    low, high = low.to(dtype), high.to(dtype)
    norm = (1 + residual(1, 16, dtype, seed=11)[0] / 10, 1e-5, delta, row, v)
    return {
        "project_layers": ([h, other], torch.stack([v, v.flip(0)])),
        "intervene": (h, v, low, high, row, inverse),
        "add_rmsnorm_steer_project": (other, h, *norm, True),
        "add_rmsnorm_steer_project, llama": (other, h, *norm, False),
    }


def placed(value, device, *, grad):
    if isinstance(value, list):
        return [placed(one, device, grad=grad) for one in value]
    if not isinstance(value, torch.Tensor):
        return value
    moved = value.detach().clone().to(device)
    return moved.requires_grad_(grad and moved.is_floating_point())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", samples(torch.float32))
def test_opcheck_of_the_functional_ops(case, device):
    name, arguments = case.partition(",")[0], samples(torch.float32)[case]
    op = getattr(ops, name)
    given = tuple(placed(one, device, grad=True) for one in arguments)
    assert set(torch.library.opcheck(op, given).values()) == {"SUCCESS"}


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck_of_the_ops_that_write(device):
    cases = samples(torch.float32)
    scores = torch.empty(6, 3)
    hs, v = cases["project_layers"]
    stacked = torch.stack(hs), v
    written = {
        "project_layers_out": (*cases["project_layers"], torch.empty(2, 6, 3)),
        "project_stack_out": (*stacked, torch.empty(2, 6, 3)),
        "project_stack_out of a ring": (*stacked, torch.zeros(3, 2, 6, 3), torch.tensor(4)),
        "intervene_": (*cases["intervene"], scores),
        "add_rmsnorm_steer_project_": (
            *cases["add_rmsnorm_steer_project"],
            torch.empty(6, 16),
            scores,
        ),
    }
    for name, arguments in written.items():
        given = tuple(placed(one, device, grad=False) for one in arguments)
        op = getattr(ops, name.partition(" ")[0])
        assert set(torch.library.opcheck(op, given).values()) == {"SUCCESS"}


@pytest.mark.parametrize("case", samples(WIDE))
def test_gradients_are_exact(case):
    name, arguments = case.partition(",")[0], samples(WIDE)[case]
    if name == "intervene":
        h, v, low, high, row, _ = arguments
        scores, at = h @ v.mT, row.clamp(min=0).long()
        acts = (row >= 0)[:, None]
        assert ((scores < low[at]) & acts).any()
        assert ((scores > high[at]) & acts).any()
        assert ((scores > low[at]) & (scores < high[at]) & acts).any()
    flat = [one for value in arguments for one in (value if isinstance(value, list) else [value])]
    floats = [
        one.clone().requires_grad_()
        for one in flat
        if isinstance(one, torch.Tensor) and one.is_floating_point()
    ]

    def call(*given):
        left = list(given)

        def filled(value):
            if isinstance(value, list):
                return [filled(one) for one in value]
            takes = isinstance(value, torch.Tensor) and value.is_floating_point()
            return left.pop(0) if takes else value

        return getattr(ops, name)(*[filled(value) for value in arguments])

    assert torch.autograd.gradcheck(call, tuple(floats))


def test_one_graph_serves_any_number_of_rows_and_new_bounds():
    torch._dynamo.reset()
    h, v, low, high, row, inverse = step_of((40, 4, 64), torch.float32, "cpu")
    made = []

    def backend(graph, _inputs):
        made.append(graph)
        return graph.forward

    def run(h, row):
        moved, scores = ops.intervene(h, v, low, high, row, inverse)
        return ops.project_layers([h, moved], torch.stack([v, v])), scores

    compiled = torch.compile(run, backend=backend, fullgraph=True, dynamic=True)
    for n_rows in (40, 17, 33, 5):
        # Clones, because a compiler also guards what a view is a view of.
        rows = h[:n_rows].clone(), row[:n_rows].clone()
        assert all(map(torch.equal, compiled(*rows), run(*rows)))
    first = compiled(h, row)[0]
    high.mul_(0.1)
    assert not torch.equal(compiled(h, row)[0], first)
    assert torch.equal(compiled(h, row)[0], run(h, row)[0])
    assert len(made) == 1


@settings(max_examples=60)
@given(st.integers(0, 10_000), st.integers(1, 20), st.integers(1, 6))
def test_joint_steps_do_what_they_promise(seed, n_rows, n_vec):
    h, v = residual(n_rows, 48, WIDE, seed=seed), unit_rows(n_vec, 48, WIDE, seed=seed + 1)
    inverse, row = torch.linalg.inv(v @ v.mT), requests(n_rows, 4, seed=seed).clamp(min=0)
    low, high = (one.double() for one in bounds(4, n_vec))
    capped, scores = ops.intervene(h, v, low, high, row, inverse)
    at = row.long()
    assert torch.allclose(capped @ v.mT, scores.clamp(low[at], high[at]), atol=1e-10)
    again, _ = ops.intervene(capped, v, low, high, row, inverse)
    assert torch.allclose(again, capped, atol=1e-10)
    zeros = torch.zeros(4, n_vec, dtype=WIDE)
    ablated, _ = ops.intervene(h, v, zeros, zeros, row, inverse)
    assert (ablated @ v.mT).abs().max() < 1e-10
    free = torch.full((4, n_vec), torch.inf, dtype=WIDE)
    assert same_bits(ops.intervene(h, v, -free, free, row, inverse)[0], h)
    order = torch.randperm(n_vec, generator=torch.Generator().manual_seed(seed))
    shuffled = ops.intervene(
        h, v[order], low[:, order], high[:, order], row, inverse[order][:, order]
    )[0]
    assert torch.allclose(shuffled, capped, atol=1e-10)
    rows = torch.randperm(n_rows, generator=torch.Generator().manual_seed(seed))
    assert torch.allclose(
        ops.intervene(h[rows], v, low, high, row[rows], inverse)[0], capped[rows], atol=1e-12
    )


def test_a_step_by_the_gram_matrix_needs_no_second_look_at_the_rows():
    h, v, low, high, row, inverse = step_of((9, 4, 32), WIDE, "cpu")
    moved, scores = ops.intervene(h, v, low.double(), high.double(), row, inverse)
    at = row.clamp(min=0).long()
    change = (scores.clamp(low.double()[at], high.double()[at]) - scores) * (row >= 0)[:, None]
    assert torch.allclose(moved @ v.mT, scores + change @ inverse @ (v @ v.mT), atol=1e-12)
    assert change.abs().max() > 0.1


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda c: ops.intervene(c[0], c[1], c[2][:, :2], c[3], c[4], c[5]), "low is of shape"),
        (lambda c: ops.intervene(c[0], c[1], c[2], c[3][:1], c[4], c[5]), "high is of shape"),
        (lambda c: ops.intervene(*c[:5], c[5][:2]), "gram_inverse is of shape"),
        (lambda c: ops.intervene(*c[:4], c[4].long(), c[5]), "row is torch.int64"),
        (lambda c: ops.project_layers([c[0]], c[1]), "v is of shape"),
        (lambda c: ops.project_layers([c[0], c[0][:2]], c[1].expand(2, 3, 16)), "every layer's"),
        (
            lambda c: ops.project_layers([c[0], c[0].to("meta")], c[1].expand(2, 3, 16)),
            "every layer's rows is .* on meta; it must be .* on cpu",
        ),
        (
            lambda c: ops.project_layers([c[0], c[0]], c[1].expand(2, 3, 16).to("meta")),
            "v is on meta; it must be where the rows are, on cpu",
        ),
        (lambda c: ops.project_stack_out(c[0], c[1], torch.empty(6, 3)), "hs is of shape"),
        (
            lambda c: ops.project_stack_out(c[0][None], c[1][None], torch.empty(6, 3)),
            r"scores is torch.float32 of shape \(6, 3\)",
        ),
        (
            lambda c: ops.project_stack_out(c[0][None], c[1][None], torch.empty(1, 3, 6).mT),
            "scores is of strides",
        ),
        (
            lambda c: ops.project_stack_out(
                c[0][None], c[1][None], torch.empty(2, 1, 6, 3), torch.ones(1)
            ),
            "step is torch.float32",
        ),
        (
            lambda c: ops.add_rmsnorm_steer_project(
                c[0], c[0][:2], c[0][0], 1e-5, c[0], c[4], c[1]
            ),
            "residual is",
        ),
        (
            lambda c: ops.add_rmsnorm_steer_project(c[0], c[0], c[2], 1e-5, c[0], c[4], c[1]),
            "weight is of shape",
        ),
        (lambda c: ops.intervene_(*c, torch.empty(2, 3)), "scores is"),
    ],
)
def test_operands_that_do_not_fit_are_refused(call, text):
    with pytest.raises(ValueError, match=text):
        call(step_of((6, 3, 16), torch.float32, "cpu"))


def test_gradients_of_what_is_written_are_refused():
    h, v, low, high, row, inverse = step_of((6, 3, 16), torch.float32, "cpu")
    with pytest.raises(RuntimeError, match="it has no gradients"):
        ops.intervene_(h.requires_grad_(), v, low, high, row, inverse, torch.empty(6, 3))
