"""pvcore's engines on a GPU, by its kernels and by the reference: the same tokens and scores."""

import pytest
import torch

from tests.engine_paths import (
    FAMILIES,
    FUSED_FAMILIES,
    PLANS,
    check_fused_norms,
    check_generation,
    check_means,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
    # Of inductor and its imports.
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated"),
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores"),
]


@pytest.mark.parametrize("kind", PLANS)
@pytest.mark.parametrize("engine", ["eager", "graph"])
@pytest.mark.parametrize("family", FAMILIES)
def test_generations_by_kernels_are_those_of_the_reference(family, engine, kind, monkeypatch):
    check_generation(monkeypatch, family, kind, engine, device="cuda")


@pytest.mark.parametrize("engine", ["eager", "graph"])
def test_rows_of_sixteen_bits_are_scored_the_same(engine, monkeypatch):
    check_generation(monkeypatch, "qwen2", "monitor", engine, device="cuda", dtype=torch.bfloat16)


def test_means_by_the_kernel_are_those_of_the_reference(monkeypatch):
    check_means(monkeypatch, device="cuda")


@pytest.mark.parametrize("family", FUSED_FAMILIES)
def test_fused_norms_by_the_kernel_are_those_of_the_reference(family, monkeypatch):
    check_fused_norms(monkeypatch, family, device="cuda")
