"""What torch asks of an op: opcheck, gradients in true float64, one graph, refusals in words."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from pvcore_kernels import ops, ops_joint
from tests.kernels.cases import requests, residual, unit_rows


def arguments(dtype, *, grad=False):
    h, v = residual(6, 20, dtype), unit_rows(3, 20, dtype)
    delta, c = residual(2, 20, dtype, seed=3), residual(6, 3, dtype, seed=4)
    for one in (h, v, delta, c):
        one.requires_grad_(grad)
    row = torch.tensor([0, 0, -1, 1, 0, -1], dtype=torch.int32)
    rows = torch.tensor([5, 0, 0], dtype=torch.int32)
    bounds = torch.tensor([1, 3, 4, 6], dtype=torch.int32)
    return h, v, delta, c, row, rows, bounds


def functional(dtype, *, grad=False):
    h, v, delta, c, row, rows, bounds = arguments(dtype, grad=grad)
    return {
        "project": (ops.project, (h, v)),
        "project of rows": (ops.project, (h, v, rows)),
        "segment_mean": (ops.segment_mean, (h, bounds)),
        "steer": (ops.steer, (h, delta, row)),
        "steer_project": (ops.steer_project, (h, v, delta, row)),
        "steer_project_tokens": (ops.steer_project_tokens, (h, v, c)),
    }


def in_place(dtype):
    h, v, delta, c, row, rows, _bounds = arguments(dtype)
    scores = torch.zeros(6, 3, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    return {
        "project_out": (ops.project_out, (h, v, scores)),
        "project_out of rows": (ops.project_out, (h, v, scores[:3], rows)),
        "steer_": (ops.steer_, (h, delta, row)),
        "steer_project_": (ops.steer_project_, (h, v, delta, row, scores)),
        "steer_project_tokens_": (ops.steer_project_tokens_, (h, v, c, scores)),
    }


def registered(name):
    """The op that a case is about, as torch knows it."""
    return getattr(torch.ops.pvcore, name.partition(" ")[0]).default


def test_every_op_on_packed_rows_is_checked_below():
    named = {registered(name) for name in functional(torch.float32) | in_place(torch.float32)}
    known = {one for one in torch._C._dispatch_get_all_op_names() if one.startswith("pvcore::")}
    joint = {op for op in vars(ops_joint).values() if isinstance(op, torch._ops.OpOverload)}
    assert joint < {op for op in vars(ops).values() if isinstance(op, torch._ops.OpOverload)}
    assert {
        op.name() for op in named | joint | {ops.product}
    } == known  # one import registers them all
    assert len(named) == 9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", functional(torch.float32))
def test_opcheck_passes_for_functional_ops(name, dtype):
    _op, inputs = functional(dtype, grad=True)[name]
    results = torch.library.opcheck(registered(name), inputs)
    assert len(results) == 4
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", in_place(torch.float32))
def test_opcheck_passes_for_in_place_ops(name, dtype):
    _op, inputs = in_place(dtype)[name]
    results = torch.library.opcheck(registered(name), inputs)
    assert len(results) == 4
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("name", functional(torch.float32))
def test_gradients_match_finite_differences_in_float64(name):
    op, inputs = functional(torch.float64, grad=True)[name]
    assert torch.autograd.gradcheck(op, inputs)


@pytest.mark.parametrize("wanted", ["rows", "scores"])
@pytest.mark.parametrize("name", ["steer_project", "steer_project_tokens"])
def test_gradients_of_one_output_alone(name, wanted):
    op, inputs = functional(torch.float64, grad=True)[name]
    assert torch.autograd.gradcheck(lambda *given: op(*given)[wanted == "scores"], inputs)


@pytest.mark.parametrize("name", ["steer_project", "steer_project_tokens"])
def test_gradients_have_gradients(name):
    op, inputs = functional(torch.float64, grad=True)[name]
    assert torch.autograd.gradgradcheck(op, inputs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", functional(torch.float32))
def test_gradients_have_the_dtype_of_their_inputs(name, dtype):
    op, inputs = functional(dtype, grad=True)[name]
    out = op(*inputs)
    sum(
        one.float().square().sum() for one in (out if isinstance(out, tuple) else (out,))
    ).backward()
    floats = [one for one in inputs if one.is_floating_point()]
    assert all(one.grad.dtype == dtype and one.grad.abs().sum() > 0 for one in floats)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_one_graph_for_any_number_of_rows_and_any_coefficients(backend):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    v = unit_rows(3, 64, torch.float32)
    delta = residual(2, 64, torch.float32, seed=3)

    def block(h, row):
        moved, scores = ops.steer_project(torch.relu(h), v, delta, row)
        return moved * 2, scores

    compiled = torch.compile(block, fullgraph=True, backend=counter, dynamic=True)
    for n_rows in (5, 9, 33):
        h, row = residual(n_rows, 64, torch.float32, seed=n_rows), requests(n_rows, 2)
        for scale in (1.0, 3.0):
            delta.mul_(scale)
            for got, wanted in zip(compiled(h, row), block(h, row), strict=True):
                assert torch.equal(got, wanted)
    assert counter.frame_count == 1
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_mutation_is_kept(backend):
    torch._dynamo.reset()
    h, v, delta, _c, row, _rows, _bounds = arguments(torch.float32)
    scores, wanted = torch.empty(6, 3), ops.steer_project(h, v, delta, row)

    def block(h):
        ops.steer_project_(h, v, delta, row, scores)
        return h + 1

    after = torch.compile(block, fullgraph=True, backend=backend)(h)
    assert torch.equal(h, wanted[0])
    assert torch.equal(scores, wanted[1])
    assert torch.equal(after, wanted[0] + 1)
    torch._dynamo.reset()


@pytest.mark.parametrize("name", in_place(torch.float32))
def test_writing_in_place_refuses_tensors_that_require_grad(name):
    op, inputs = in_place(torch.float32)[name]
    inputs[0].requires_grad_()
    with pytest.raises(RuntimeError, match="call the functional op"):
        op(*inputs)
    before = inputs[0].detach().clone()
    with torch.no_grad():
        op(*inputs)
    assert torch.equal(inputs[0], before) == name.startswith("project_out")


REFUSALS = {
    "three axes": (lambda a: ops.project(a[0][None], a[1]), "flatten leading axes"),
    "widths": (lambda a: ops.project(a[0], a[1][:, :10]), "v is 10 wide; it must be as wide"),
    "int64 rows": (lambda a: ops.project(a[0], a[1], a[5].long()), "int32"),
    "strided rows": (lambda a: ops.steer(a[0][:3], a[2], a[4][::2]), "contiguous"),
    "few rows": (lambda a: ops.steer(a[0], a[2], a[4][:5]), "each of the 6 rows"),
    "no bounds": (lambda a: ops.segment_mean(a[0], a[6][:0]), "starting with 0"),
    "coefficients": (lambda a: ops.steer_project_tokens(a[0], a[1], a[3][:, :2]), "coefficient"),
    "score shape": (lambda a: ops.project_out(a[0], a[1], torch.empty(6, 2)), r"shape \(6, 3\)"),
    "score strides": (
        lambda a: ops.project_out(a[0], a[1], torch.empty(3, 6).T),
        "contiguous in its last axis",
    ),
    "no axes": (lambda a: ops.steer_project_tokens_(a[0][0, 0], a[1], a[3], a[3]), "flatten"),
    "scores over coefficients": (
        lambda a: ops.steer_project_tokens_(a[0], a[1], a[3], a[3]),
        r"c is the memory of scores; .* call .clone\(\)",
    ),
    "score dtype": (lambda a: ops.project_out(a[0], a[1], a[3].half()), "float32"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_does_not_fit_is_refused_in_words(name):
    call, words = REFUSALS[name]
    with pytest.raises(ValueError, match=words):
        call(arguments(torch.float32))


def test_indices_out_of_range_write_nothing():
    h, v, delta, _c, row, _rows, _bounds = arguments(torch.float32)
    before, row = h.clone(), torch.where(row == 1, 2, row).to(torch.int32)
    for call in (lambda: ops.steer_(h, delta, row), lambda: ops.steer(h, delta, row)):
        with pytest.raises(IndexError, match="request 2 of 2"):
            call()
    assert torch.equal(h, before)
    with pytest.raises(IndexError):
        ops.project(h, v, torch.tensor([6], dtype=torch.int32))
    for bounds in ([0, 7], [3, 2], [-1, 2]):
        with pytest.raises(IndexError, match="within the 6 rows"):
            ops.segment_mean(h, torch.tensor(bounds, dtype=torch.int32))
