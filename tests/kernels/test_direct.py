"""The short way into an op: the same to the bit, and taken by plain rows on the CPU alone."""

from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from pvcore_kernels import direct, ops
from tests.kernels.cases import requests, residual, same_bits, unit_rows

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
FUNCTIONAL = ("project", "steer", "steer_project", "steer_project_tokens")
IN_PLACE = ("project_out", "steer_", "steer_project_", "steer_project_tokens_")
ROWS = {
    "one request": lambda n: torch.ones(n, dtype=torch.int32),
    "no request": lambda n: torch.full((n,), -1, dtype=torch.int32),
    "all active": lambda n: (torch.arange(n) % 3).int(),
    "mixed": lambda n: requests(n, 3),
    "runs": lambda n: requests(n, 3).sort().values,
}


def operands(n_rows, n_vec, width, dtype, kind="mixed"):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return {
        "h": residual(n_rows, width, dtype),
        "v": unit_rows(n_vec, width, torch.float32),
        "delta": residual(3, width, torch.float32, seed=3),
        "row": ROWS[kind](n_rows),
        "c": residual(n_rows, n_vec, torch.float32, seed=4),
        "scores": torch.full((n_rows, n_vec), torch.nan, dtype=wide),
    }


ARGUMENTS = {
    "project": ("h", "v"),
    "project_out": ("h", "v", "scores"),
    "steer": ("h", "delta", "row"),
    "steer_": ("h", "delta", "row"),
    "steer_project": ("h", "v", "delta", "row"),
    "steer_project_": ("h", "v", "delta", "row", "scores"),
    "steer_project_tokens": ("h", "v", "c"),
    "steer_project_tokens_": ("h", "v", "c", "scores"),
}


class Sent(Exception):
    """A call went on to the registered op."""


@pytest.fixture
def closed(monkeypatch):
    """Every registered op raises `Sent`."""

    def sent(*_):
        raise Sent

    op = SimpleNamespace(default=sent)
    monkeypatch.setattr(direct, "_ops", SimpleNamespace(**dict.fromkeys(ARGUMENTS, op)))


def call(name, given):
    return getattr(ops, name)(*(given[one] for one in ARGUMENTS[name]))


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 3, 16), (1, 3, 16), (7, 1, 20), (40, 9, 33), (300, 3, 16)])
def test_both_ways_give_the_same_bits(shape, dtype, kind):
    for name in (*FUNCTIONAL, *IN_PLACE):
        one, other = operands(*shape, dtype, kind), operands(*shape, dtype, kind)
        got = call(name, one)
        registered = getattr(torch.ops.pvcore, name).default
        wanted = registered(*(other[key] for key in ARGUMENTS[name]))
        pairs = [(one["h"], other["h"]), (one["scores"], other["scores"])]
        if name in FUNCTIONAL:
            pairs += zip(
                *((x if isinstance(x, tuple) else (x,)) for x in (got, wanted)), strict=True
            )
        assert all(same_bits(*pair) for pair in pairs), name
        untouched = operands(*shape, dtype, kind)
        resting = one["row"] < 0
        if name.startswith(("steer_project_tokens", "project")):
            continue
        moved = one["h"] if name in IN_PLACE else (got[0] if isinstance(got, tuple) else got)
        assert same_bits(moved[resting], untouched["h"][resting]), name
        assert (moved[~resting] != untouched["h"][~resting]).any(1).all(), name


@pytest.mark.parametrize("name", ARGUMENTS)
def test_plain_rows_never_meet_the_dispatcher(name, closed):
    for dtype in DTYPES:
        call(name, operands(5, 3, 16, dtype))


@pytest.mark.parametrize("name", ARGUMENTS)
def test_what_is_not_plain_goes_on_to_the_op(name, closed):
    for key in {"h", "v", "delta", "c"} & set(ARGUMENTS[name]):
        given = operands(5, 3, 16, torch.float32)
        given[key].requires_grad_()
        with pytest.raises(Sent):
            call(name, given)
    for key in ARGUMENTS[name]:
        for other in (
            lambda t: t.to("meta"),
            lambda t: t[None],
            lambda t: t.flatten()[0],
            lambda t: t.bool(),
        ):
            given = operands(5, 3, 16, torch.float32)
            given[key] = other(given[key])
            with pytest.raises(Sent):
                call(name, given)


@pytest.mark.filterwarnings("ignore:`torch.jit.trace")
@pytest.mark.parametrize("name", ARGUMENTS)
def test_who_looks_on_sees_the_op(name, closed):
    given = operands(5, 3, 16, torch.float32)
    with TorchDispatchMode(), pytest.raises(Sent):
        call(name, given)
    with FakeTensorMode() as mode, pytest.raises(Sent):
        call(name, {key: mode.from_tensor(one) for key, one in given.items()})
    with pytest.raises(Sent):
        torch.func.vmap(lambda one: call(name, {**given, "h": one}))(given["h"][None])
    with pytest.raises(Sent):
        torch.jit.trace(lambda h: call(name, {**given, "h": h}), given["h"], check_trace=False)


@pytest.mark.parametrize("name", FUNCTIONAL)
def test_make_fx_records_the_op(name):
    from torch.fx.experimental.proxy_tensor import make_fx

    given = operands(5, 3, 16, torch.float32)
    graph = make_fx(lambda h: call(name, {**given, "h": h}))(given["h"])
    targets = [str(node.target) for node in graph.graph.nodes]
    assert f"pvcore.{name}.default" in targets


def test_a_request_out_of_range_writes_nothing():
    for n_rows in (1, 5, 40, 300):
        given = operands(n_rows, 3, 16, torch.float32)
        given["row"][-1] = 3
        before = given["h"].clone()
        for name in ("steer", "steer_", "steer_project", "steer_project_"):
            with pytest.raises(IndexError, match="request 3 of 3"):
                call(name, given)
        assert same_bits(given["h"], before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_rounds_no_score(dtype):
    given = operands(5, 3, 32, dtype)
    h, v, delta, row = (given[name] for name in ("h", "v", "delta", "row"))
    bounds, inverse = torch.zeros(3, 3), torch.linalg.inv(v.double() @ v.double().mT).float()
    wanted = ops.project(h, v), ops.steer_project(h, v, delta, row)[1]
    landed = ops.intervene(h, v, bounds, bounds, row, inverse)
    ring = torch.empty(2, 1, 5, 3)
    with torch.autocast("cpu", torch.bfloat16):
        got = ops.project(h, v), ops.steer_project(h, v, delta, row)[1]
        again = ops.intervene(h, v, bounds, bounds, row, inverse)
        ops.project_stack_out(h[None], v[None], ring, torch.tensor(1))
        rounded = torch.mm(h.float(), v.float().t())
    assert all(torch.equal(a, b) for a, b in zip((*wanted, *landed), (*got, *again), strict=True))
    assert (ring[1, 0] - wanted[0]).abs().max() < 1e-5
    assert rounded.dtype == torch.bfloat16
