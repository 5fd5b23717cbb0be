"""The graph engine under compilers that rewrite the decode step, and under CUDA graphs."""

import re
from contextlib import nullcontext

import pytest
import torch
import transformers

import pvcore as pv
from tests.families import PAD
from tests.subjects import fresh, trio, worst
from tests.test_graph import KINDS, PROMPTS, answer, check


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")  # by inductor
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compilers_that_rewrite_the_step_give_the_same(backend: str) -> None:
    found, engine = fresh("qwen2"), pv.Graph(backend=backend)
    for size in (1.0, -2.0):
        plan = KINDS["both"](size)
        check(answer(found, plan, engine), answer(found, plan, "eager"))


def launches(model: pv.HookedModel, plan: pv.Plan | None) -> int:
    """How many kernels a compiled decode step launches."""
    from torch._inductor.utils import run_and_get_code

    def run() -> None:
        with nullcontext() if plan is None else model.arm(plan):
            model.generate_ids(
                PROMPTS[:1], engine=pv.Graph(backend="inductor"), max_new_tokens=2, do_sample=False
            )

    with torch._inductor.config.patch(fx_graph_cache=False):
        _, (code,) = run_and_get_code(run)
    return len(re.findall(r"^\s+(?:cpp_fused\w*|extern_kernels\.\w+)\(", code, re.MULTILINE))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")  # by inductor
def test_steering_a_site_is_fused_into_the_norm_that_reads_it() -> None:
    config = transformers.Qwen2Config(
        vocab_size=128,
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=96,
    )
    hf = transformers.Qwen2ForCausalLM(config).eval()
    hf.generation_config.pad_token_id = PAD
    model = pv.HookedModel(hf)
    add = pv.Plan(pv.Add(trio(pv.resid_post(0))[0], coeff=1.0))
    plain = launches(model, None)
    assert launches(model, add) == plain > 8
    assert launches(model, pv.Plan(pv.Ablate(trio(pv.resid_post(0))[0]))) > plain


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")  # by inductor
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores")  # by inductor
def test_cuda_graphs_replay_armed_plans() -> None:
    found = fresh("qwen2")
    found.model.hf.to("cuda")
    torch._dynamo.utils.counters.clear()
    for kind in ("both", "monitor"):
        for size in (1.0, -2.0, 1.0):
            plan = KINDS[kind](size)
            wanted = answer(found, plan, "eager", max_new_tokens=80)
            check(answer(found, plan, "graph", max_new_tokens=80), wanted)
    assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_autocast_rounds_the_model_and_not_the_projections(backend: str) -> None:
    found = fresh("qwen2")
    found.model.hf.bfloat16()
    last = pv.VectorBank(trio(pv.resid_post(2)))
    one, engine = last.vectors[0], pv.Graph(backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        _, seen = answer(found, pv.Plan(monitor=last), engine)
        _, wanted = answer(found, pv.Plan(monitor=last), "eager")
        floor = pv.Plan(pv.Cap(one, min=100.3), monitor=last)
        _, lifted = answer(found, floor, engine)
        gated = pv.Plan(pv.Cap(one, min=100.3, when=pv.Below(one, 0.0)), monitor=last)
        _, parted = answer(found, gated, engine)
    steps = seen[one.trait].steps
    assert not torch.equal(steps.nan_to_num(), steps.nan_to_num().bfloat16().float())
    size = float(steps.nan_to_num().abs().max())
    # Rounding soon sends the replies apart.
    assert worst(steps[:2], wanted[one.trait].steps[:2]) < 0.05 * size
    # What is left is the rounding of the row itself, in elements of about 12.
    assert worst(lifted[one.trait].steps, torch.full_like(steps, 100.3)) < 0.1
    assert size < 50
    moved = parted[one.trait].steps > 50
    assert 0 < int(moved.sum()) < moved.numel()
    assert float((parted[one.trait].steps[moved] - 100.3).abs().max()) < 0.1
