"""Measurements of the kernels: what they move, what a GPU could do at best, and no GPU at all."""

import json
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch

from benches import gpu_kernels, gpu_tests, gpu_workload, kernels, record
from benches.gpu_workload import Ceilings, Point, binds, floor_us, points, rotations
from benches.kernels_by_hand import Operands
from pvcore_kernels import ops

NO_GPU_HERE = pytest.mark.skipif(torch.cuda.is_available(), reason="another version: a GPU is here")


def test_bytes_and_products_are_counted() -> None:
    point = Point(t=10, k=3, d=100)
    assert point.read == 2 * 10 * 100 + 2 * 3 * 100 + 4 * 10 * 3
    assert point.steered - point.read == 2 * 10 * 100
    assert point.flops == 2 * 10 * 3 * 100
    assert Point(t=10, k=3, d=100, bank_bytes=4).read - point.read == 2 * 3 * 100


def test_the_roofline_is_bytes_for_few_vectors_and_arithmetic_for_many() -> None:
    ceilings = Ceilings(copy_bytes_per_us=4.3e6, flops_per_us=790e6)
    few, many = Point(65536, 7, 3584), Point(65536, 1024, 3584)
    assert (binds(few, ceilings), binds(many, ceilings)) == ("bytes", "arithmetic")
    assert floor_us(few.read, few.flops, ceilings) == pytest.approx(110, rel=0.01)
    assert floor_us(many.read, many.flops, ceilings) == pytest.approx(609, rel=0.01)


def test_inputs_are_rotated_until_the_cache_is_cold() -> None:
    cache = 60 << 20
    for point in points():
        count = rotations(point.steered, cache)
        assert count >= 2
        assert count * point.steered >= min(gpu_workload.COLD * cache, 2 * point.steered)
    assert len(list(points())) == 50


def test_every_way_a_call_can_go_is_checked_before_it_is_timed() -> None:
    checked = gpu_kernels._checked()
    for width in gpu_workload.WIDTHS:
        there = [point for point in checked if point.d == width]
        assert max(point.k for point in there) == max(gpu_workload.VECTORS)
        assert max(point.t for point in there) >= 8192
        assert {(p.t, p.k) for p in there} >= set(product((1, 32, 256), (1, 7, 32, 128)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_compiler_is_given_does_what_the_op_does(dtype: torch.dtype) -> None:
    found, twin = (Operands.of(8, 3, 64, dtype, requests="mixed") for _ in range(2))
    v = found.v.to(dtype)
    gpu_kernels.steer_and_project(found.h, v, found.delta, found.row, found.scores)
    moved, scores = ops.steer_project(twin.h, v, twin.delta, twin.row)
    assert torch.equal(found.h, moved)
    assert torch.allclose(found.scores, scores.to(dtype).float(), atol=0.02, rtol=0.02)
    assert not torch.equal(found.h, Operands.of(8, 3, 64, dtype, requests="mixed").h)


@NO_GPU_HERE
def test_without_a_gpu_the_record_has_no_figure_and_says_why(tmp_path: Path) -> None:
    made = gpu_kernels.measure(command="x")
    assert {cell.status for cell in made.cells.values()} == {"not measured"}
    assert {cell.reason for cell in made.cells.values()} == {"no GPU"}
    assert len(made.cells) > 250
    assert record.read(record.write(made, tmp_path)) == made
    found = gpu_tests.run(None)
    assert (found["status"], found["reason"]) == ("not measured", "no GPU")
    json.dumps(found)


@pytest.mark.parametrize("name", kernels.PAIRS)
@pytest.mark.parametrize("dtype", kernels.DTYPES)
@pytest.mark.parametrize("t", [1, 5, 40])
@pytest.mark.parametrize("called", kernels.WAYS)
def test_an_op_and_every_way_by_hand_do_the_same(
    name: str, dtype: str, t: int, called: str
) -> None:
    pair = kernels.PAIRS[name]

    def operands() -> Operands:
        return Operands.of(t, 3, 64, kernels.DTYPES[dtype], requests=pair.requests)

    found = operands()
    assert kernels.error_of(name, found, called) <= 1.0
    assert torch.equal(found.h, operands().h) == (name == "project")
    for way in pair.hand:
        twin = operands()
        way(twin)
        torch.testing.assert_close(twin.h, found.h)
        if pair.requests == "mixed":
            assert torch.equal(twin.h, found.h)
        if pair.scores:
            assert torch.allclose(twin.scores, found.scores, atol=1e-5)


def test_a_row_moved_that_has_no_request_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "steer, mixed requests"
    pair = kernels.PAIRS[name]

    def careless(x: Operands) -> None:
        pair.op(x)
        x.h[2] += 1e-3

    monkeypatch.setitem(kernels.PAIRS, name, replace(pair, op=careless))
    rows = Operands.of(8, 3, 64, torch.float32, requests="mixed")
    assert kernels.error_of(name, rows, "op") > 1


def test_a_wrong_op_has_no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = replace(kernels.PAIRS["project"], op=lambda x: x.scores.fill_(0.1))
    monkeypatch.setitem(kernels.PAIRS, "project", wrong)
    made = kernels.measure(kernels.QUICK, command="x")
    assert not made.correct
    assert {cell.status for cell in made.cells.values()} == {"failed"}


def test_the_quick_run_measures_every_pair() -> None:
    made = kernels.measure(kernels.QUICK, command="x")
    assert made.correct
    assert len(made.cells) == 2 * 2 * len(kernels.PAIRS) * len(kernels.WAYS)
    assert {cell.status for cell in made.cells.values()} == {"measured"}
