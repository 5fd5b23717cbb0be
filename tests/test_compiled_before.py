"""A step that transformers compiled before a model was hooked passes no tap: never silent."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CompileConfig

import pvcore as pv
from pvcore.errors import HookError
from tests.families import build
from tests.test_plan import vector

IDS = torch.tensor([[5, 6, 7, 8]])
LAYER, COEFF, TOKENS = 1, 5.0, 12
STEER = pv.Add(vector(model_id=""), coeff=COEFF, layers=[LAYER])
GREEDY: dict[str, Any] = {"max_new_tokens": TOKENS, "do_sample": False, "pad_token_id": 0}

pytestmark = pytest.mark.filterwarnings("ignore")  # dynamo warns of what a model itself does


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled() -> dict[str, Any]:
    """Settings under which transformers compiles its decode step, on a CPU too."""
    how = CompileConfig(backend="eager", fullgraph=False, mode=None)
    how._compile_all_devices = True
    return {**GREEDY, "cache_implementation": "static", "compile_config": how}


def by_raw_hooks(*, prompt_only: bool = False) -> Tensor:
    """Tokens of a model steered by hooks of plain torch, at its last prompt token and after."""
    hf = build("qwen2")
    delta = COEFF * vector().direction(pv.resid_post(LAYER))

    def steer(_module: Any, args: tuple[Tensor, ...]) -> tuple[Any, ...]:
        h = args[0].clone()
        if h.shape[1] > 1 or not prompt_only:
            h[:, -1] += delta
        return (h, *args[1:])

    hf.model.layers[LAYER + 1].register_forward_pre_hook(steer)
    found: Tensor = hf.generate(IDS, **GREEDY)[0, IDS.shape[1] :]
    return found


def hooked(earlier: str) -> pv.HookedModel:
    """A model hooked after its own generation, or another model's, was compiled."""
    hf = build("qwen2")
    (hf if earlier == "its own" else build("qwen2")).generate(IDS, **compiled())
    return pv.HookedModel(hf)


@pytest.mark.parametrize("earlier", ["its own", "another model's"])
@pytest.mark.parametrize("way", ["generate_ids", "hf.generate"])
def test_steps_compiled_before_hooking_are_refused(earlier: str, way: str) -> None:
    assert not torch.equal(by_raw_hooks(), by_raw_hooks(prompt_only=True))
    model, made = hooked(earlier), []

    def generate() -> None:
        with model.steer(STEER):
            if way == "generate_ids":
                made.append(model.generate_ids(list(IDS), **compiled()))
            else:
                model.hf.generate(IDS, **compiled())

    with pytest.raises(HookError, match=rf"got .*{TOKENS - 1} .* passed no tap"):
        generate()
    assert not made
    plain = model.generate_ids(list(IDS), **GREEDY)[0]
    assert torch.equal(plain, build("qwen2").generate(IDS, **GREEDY)[0, IDS.shape[1] :])


@pytest.mark.parametrize("way", ["reset", "disable_compile", "graph"])
def test_what_the_refusal_advises_steers_every_step(way: str) -> None:
    model = hooked("its own")
    settings, engine = compiled(), "eager"
    if way == "reset":
        torch.compiler.reset()
    elif way == "disable_compile":
        settings["disable_compile"] = True
    else:
        settings, engine = GREEDY, "graph"
    with model.steer(STEER):
        got = model.generate_ids(list(IDS), engine=engine, **settings)[0]
    assert torch.equal(got, by_raw_hooks())


def test_a_model_hooked_first_is_steered_in_steps_compiled_while_idle() -> None:
    model = pv.HookedModel(build("qwen2"))
    plain = model.hf.generate(IDS, **compiled())[0, IDS.shape[1] :]
    with model.steer(STEER):
        inside = model.hf.generate(IDS, **compiled())[0, IDS.shape[1] :]
        got = model.generate_ids(list(IDS), **compiled())[0]
    assert torch.equal(got, by_raw_hooks())
    assert torch.equal(inside, got)
    assert not torch.equal(got, plain)
