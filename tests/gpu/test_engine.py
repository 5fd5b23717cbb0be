"""pvcore's engines on a GPU, by its kernels and by the reference: the same tokens and scores."""

import pytest
import torch

import pvcore as pv
from pvcore.frames import Call, Frame
from pvcore.programs import compile_programs
from pvcore.resident import Decode, Met, Resident
from pvcore.sessions import Session
from tests.engine_paths import (
    FAMILIES,
    FUSED_FAMILIES,
    PLANS,
    check_alarms,
    check_fused_norms,
    check_generation,
    check_means,
)
from tests.subjects import trio

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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("engine", ["eager", "graph"])
def test_alarms_by_the_kernel_are_those_of_its_scores(engine, dtype, monkeypatch):
    check_alarms(monkeypatch, engine, device="cuda", dtype=dtype)


def test_means_by_the_kernel_are_those_of_the_reference(monkeypatch):
    check_means(monkeypatch, device="cuda")


@pytest.mark.parametrize("family", FUSED_FAMILIES)
def test_fused_norms_by_the_kernel_are_those_of_the_reference(family, monkeypatch):
    check_fused_norms(monkeypatch, family, device="cuda")


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_a_joint_step_is_the_same_where_a_process_allows_tf32(backend):
    """By the reference, and as compiled decode steps make it."""
    site, device = pv.resid_post(0), torch.device("cuda")
    one, two, three = trio(site)
    session = Session(compile_programs([pv.Add(one, coeff=0.5), pv.Cap([two, three], max=0.05)]))
    mask = torch.ones(3, 2, dtype=torch.bool)
    call = Call(rows=torch.arange(3), n_chats=3, mask=mask, last=None, generating=True)
    plan = Decode.of(session, call, {site: Met(device=device, dtype=torch.bfloat16)})
    made = Resident(0, plan, 64, device)
    made.write(plan)
    h = torch.randn(3, 1, 64, device=device).bfloat16() * 50
    (program,) = session.programs[site]

    def moved() -> list[torch.Tensor]:
        torch.compiler.reset()
        step = torch.compile(lambda h: made.fire(str(site), h), backend=backend, fullgraph=True)
        with torch.no_grad():
            return [program.apply(h, Frame(call, 3, 2, 1, True)), step(h)]

    exact = moved()
    torch.set_float32_matmul_precision("high")
    try:
        again = moved()
    finally:
        torch.set_float32_matmul_precision("highest")
    assert all(map(torch.equal, again, exact))
    assert not torch.equal(exact[0], h)
