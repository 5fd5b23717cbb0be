"""Kernels compiled for GPUs that are not here: no spills, wide loads and stores, tensor cores.

`aot_budget.json` holds what each may take of registers and shared memory, by version of Triton.
`python -m tests.kernels.test_aot` lowers it to what is taken now and refuses to raise it.
"""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import triton
from triton.backends.compiler import GPUTarget

from tests.kernels.aot import Resources, compiling, resources
from tests.kernels.aot_cases import Case, call, cases, smoke, stacked

BUDGET = Path(__file__).with_name("aot_budget.json")
VERSION = ".".join(triton.__version__.split(".")[:2])
HOPPER = GPUTarget("cuda", 90, 32)
OTHERS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
MOST_SHARED = 227 << 10
# For a second stride and the slot of a ring.
FEW_REGISTERS = 8
CASES, SMOKE = tuple(cases()), tuple(smoke())


def compiled(case: Case, target: GPUTarget) -> object:
    with compiling(target) as made:
        call(case)()
    (kernel,) = made
    return kernel


def budget() -> dict[str, dict[str, int]]:
    known: dict[str, dict[str, dict[str, int]]] = json.loads(BUDGET.read_text())
    return known.get(VERSION, {})


def taken(found: Resources) -> dict[str, int]:
    return {"registers": found.registers, "shared": found.shared}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_tile_on_hopper(case: Case) -> None:
    found = resources(compiled(case, HOPPER))
    assert (found.stack, found.local) == (0, 0)
    assert found.shared <= MOST_SHARED
    assert found.wide_loads > 0
    assert found.narrow_loads == 0
    if case.writes_rows:
        assert found.wide_stores > 0
        assert found.narrow_stores == 0
    if case.multiplies:
        assert found.products > 0
    allowed = budget().get(str(case))
    assert allowed is not None, "no budget: run python -m tests.kernels.test_aot"
    assert all(taken(found)[name] <= most for name, most in allowed.items()), taken(found)


@pytest.mark.parametrize("case", tuple(stacked()), ids=str)
def test_stacked_layers_take_what_listed_ones_take(case: Case) -> None:
    found = resources(compiled(case, HOPPER))
    listed = resources(compiled(replace(case, op="project_layers"), HOPPER))
    assert (found.stack, found.local, found.narrow_loads) == (0, 0, 0)
    assert found.wide_loads == listed.wide_loads > 0
    assert found.shared == listed.shared
    assert found.registers <= listed.registers + FEW_REGISTERS


@pytest.mark.parametrize("architecture", OTHERS)
@pytest.mark.parametrize("case", SMOKE, ids=lambda case: case.op)
def test_an_op_compiles_elsewhere(case: Case, architecture: str) -> None:
    kernel = compiled(case, OTHERS[architecture])
    assert kernel.asm["cubin" if architecture.startswith("sm") else "hsaco"]


def test_the_budget_is_of_the_cases_there_are() -> None:
    assert set(json.loads(BUDGET.read_text())) >= {"3.9"}
    assert set(budget()) == {str(case) for case in CASES}
    assert len({case.op for case in CASES}) == len(SMOKE) == 8


def test_what_a_binary_takes_is_read_from_it() -> None:
    case = next(case for case in CASES if case.op == "project" and case.multiplies)
    found = resources(compiled(case, HOPPER))
    assert found.registers > 16
    assert found.shared > 1024
    assert found.products > 1
    assert found.wide_stores + found.narrow_stores >= 0


def lower(folder: Path = BUDGET) -> None:
    """Write what every case takes now; a case that takes more than before is an error."""
    known = json.loads(folder.read_text()) if folder.exists() else {}
    before = known.get(VERSION, {})
    now = {str(case): taken(resources(compiled(case, HOPPER))) for case in CASES}
    raised = [
        f"{name}: {kind} {before[name][kind]} -> {most}"
        for name, one in now.items()
        for kind, most in one.items()
        if name in before and most > before[name][kind]
    ]
    if raised:
        raise SystemExit("a budget only sinks:\n" + "\n".join(raised))
    known[VERSION] = now
    folder.write_text(json.dumps(known, indent=1, sort_keys=True) + os.linesep)


if __name__ == "__main__":
    lower()
