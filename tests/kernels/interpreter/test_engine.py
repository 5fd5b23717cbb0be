"""pvcore's engines on the kernels' path, run by the interpreter: what the reference gives."""

import pytest
import torch

import pvcore as pv
from tests.engine_paths import (
    FAMILIES,
    FUSED_FAMILIES,
    PLANS,
    check_alarms,
    check_fused_norms,
    check_generation,
    check_means,
)

# The interpreter is slow: every kind of plan in one family, and one kind in the others.
CASES = [("qwen2", kind) for kind in PLANS] + [(name, "capped by row") for name in FAMILIES[1:]]


@pytest.mark.parametrize(("family", "kind"), CASES)
@pytest.mark.parametrize("engine", ["eager", "graph"])
def test_generations_by_kernels_are_those_of_the_reference(family, engine, kind, monkeypatch):
    chosen = pv.Graph(backend="eager") if engine == "graph" else engine
    check_generation(monkeypatch, family, kind, chosen)


@pytest.mark.parametrize("engine", ["eager", "graph"])
def test_rows_of_sixteen_bits_are_scored_the_same(engine, monkeypatch):
    chosen = pv.Graph(backend="eager") if engine == "graph" else engine
    check_generation(monkeypatch, "qwen2", "monitor", chosen, dtype=torch.bfloat16)


@pytest.mark.parametrize("engine", ["eager", "graph"])
def test_alarms_by_the_kernel_are_those_of_its_scores(engine, monkeypatch):
    check_alarms(monkeypatch, pv.Graph(backend="eager") if engine == "graph" else engine)


def test_means_by_the_kernel_are_those_of_the_reference(monkeypatch):
    check_means(monkeypatch)


@pytest.mark.parametrize("family", FUSED_FAMILIES)
def test_fused_norms_by_the_kernel_are_those_of_the_reference(family, monkeypatch):
    check_fused_norms(monkeypatch, family)
