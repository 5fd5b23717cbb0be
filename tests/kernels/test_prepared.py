"""A call prepared on its buffers: the op itself, without what the op looks at each time."""

import pytest
import torch

from pvcore_kernels import ops, prepared
from tests.kernels.cases import DTYPES, assert_close, assert_scores, same_bits
from tests.kernels.test_direct import ARGUMENTS, ROWS, operands

OPS = {
    "project_out": prepared.project,
    "steer_": prepared.steer,
    "steer_project_": prepared.steer_project,
    "steer_project_tokens_": prepared.steer_project_tokens,
}
SHAPES = ((0, 3, 16), (1, 3, 16), (7, 1, 20), (40, 9, 33), (300, 3, 16))


def ready(name, given):
    return OPS[name](*(given[one] for one in ARGUMENTS[name]))


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_run_does_what_the_op_does_on_what_the_buffers_hold(shape, dtype, kind):
    for name in OPS:
        one, other = operands(*shape, dtype, kind), operands(*shape, dtype, kind)
        run = ready(name, one)
        fresh = operands(*shape, dtype, "mixed")
        for again in (False, True):
            if again:  # other contents in the same memory, requests too
                for key in ("h", "v", "delta", "c"):
                    one[key].copy_(fresh[key].flip(0) * 2)
                    other[key].copy_(fresh[key].flip(0) * 2)
                one["row"].copy_(fresh["row"])
                other["row"].copy_(fresh["row"])
            before = one["h"].clone()
            run()
            getattr(ops, name)(*(other[key] for key in ARGUMENTS[name]))
            assert same_bits(one["h"], other["h"]), name
            assert same_bits(one["scores"], other["scores"]), name
            if name != "steer_":
                assert not one["scores"].isnan().any(), name
            if name in ("steer_", "steer_project_"):
                resting = one["row"] < 0
                assert same_bits(one["h"][resting], before[resting])
                assert (one["h"][~resting] != before[~resting]).any(1).all(), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_rows", [1, 5, 300])
def test_rows_and_scores_are_those_of_float64(n_rows, dtype):
    given = operands(n_rows, 3, 64, dtype, "one request")
    h, v = given["h"].double(), given["v"].double()
    ready("steer_project_", given)()
    assert_scores(given["scores"], h, given["v"])
    assert_close(given["h"], h + given["delta"][1].double(), dtype)
    given = operands(n_rows, 3, 64, dtype)
    ready("steer_project_tokens_", given)()
    assert_scores(given["scores"], h, given["v"])
    assert_close(given["h"], h + given["c"].double() @ v, dtype)


@pytest.mark.parametrize("name", OPS)
def test_a_buffer_in_other_memory_is_refused_and_nothing_is_written(name):
    for key in ARGUMENTS[name]:
        given = operands(5, 3, 16, torch.float32)
        run = ready(name, given)
        run()
        kept = given[key]
        kept.data = kept.clone()
        before = {one: given[one].clone() for one in ARGUMENTS[name]}
        with pytest.raises(RuntimeError, match=f"{name} was prepared on buffers"):
            run()
        assert all(same_bits(given[one], before[one]) for one in before)


@pytest.mark.parametrize("name", OPS)
def test_what_the_op_refuses_is_refused_before_the_first_run(name):
    for key in ARGUMENTS[name]:
        given = operands(5, 3, 16, torch.float32)
        given[key] = given[key][None]
        with pytest.raises(ValueError, match=rf"^{key} is "):
            ready(name, given)
    for key in {"h", "v", "delta", "c"} & set(ARGUMENTS[name]):
        given = operands(5, 3, 16, torch.float32)
        given[key].requires_grad_()
        with pytest.raises(RuntimeError, match="in place and got a tensor that requires grad"):
            ready(name, given)
        with torch.no_grad():
            ready(name, given)()


def test_a_request_out_of_range_writes_nothing():
    for name in ("steer_", "steer_project_"):
        for kind in ("mixed", "one request"):
            given = operands(5, 3, 16, torch.bfloat16, kind)
            run = ready(name, given)
            given["row"][:] = 3
            before = given["h"].clone()
            with pytest.raises(IndexError, match="request 3 of 3"):
                run()
            assert same_bits(given["h"], before)


def test_autograd_is_told_what_a_run_wrote():
    given = operands(5, 3, 16, torch.float32)
    run = ready("steer_", given)
    weight = torch.ones(5, 16, requires_grad=True)
    loss = (weight * given["h"]).sum()
    run()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("name", OPS)
def test_on_a_gpu_a_run_is_the_op(name):
    one, other = (operands(7, 3, 64, torch.bfloat16) for _ in range(2))
    on = [{key: value.cuda() for key, value in given.items()} for given in (one, other)]
    ready(name, on[0])()
    getattr(ops, name)(*(on[1][key] for key in ARGUMENTS[name]))
    assert same_bits(on[0]["h"].cpu(), on[1]["h"].cpu())
    assert same_bits(on[0]["scores"].cpu(), on[1]["scores"].cpu())
