"""Fused norms: who is refused, that nothing is left behind, and that nobody else is reached."""

import copy
import gc
import threading
import weakref
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm

import pvcore as pv
from pvcore.errors import HookError, ModelError
from tests.families import D_MODEL, N_LAYERS, VOCAB, build
from tests.subjects import prompts, worst
from tests.test_fusion import ROWS, SITE, at, check, counted, forward, new, one

IDS = prompts([7])[0][None]


class OtherEps(LlamaRMSNorm):
    """Says one epsilon and uses another."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        wide = hidden_states.float()
        scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)
        return self.weight * scaled.to(hidden_states.dtype)


class Scaled(LlamaDecoderLayer):
    """Does more to its output, once told to."""

    times = 1.1

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return (
            self.times * super().forward(*args, **kwargs)
            if self.times != 1
            else super().forward(*args, **kwargs)
        )


class ScaledInPlace(LlamaDecoderLayer):
    """Gives the very sum back, written over."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs).mul_(1.1)


class Halved(nn.Module):
    """An MLP that gives two things."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp = mlp

    def forward(self, x: Tensor) -> Any:
        return self.mlp(x), None


class TakesFirst(LlamaDecoderLayer):
    """A block with such an MLP."""

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Any:
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        middle = hidden_states + attended
        return middle + self.mlp(self.post_attention_layernorm(middle))[0]


def changed(change: Callable[[Any], Any]) -> Callable[[], nn.Module]:
    """A llama whose block 1 is changed after it was hooked."""

    def make() -> nn.Module:
        hf = build("llama")
        pv.HookedModel(hf)
        change(hf.model.layers[1])
        return hf

    return make


def granite() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB, "hidden_size": D_MODEL, "num_hidden_layers": N_LAYERS}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96}
    config = transformers.GraniteConfig(**sizes, **heads, residual_multiplier=0.5)
    return transformers.GraniteForCausalLM(config).eval()


def wide_norm() -> nn.Module:
    """bfloat16 with a final norm in float32, whose rows are float32 then."""
    hf = build("llama", dtype=torch.bfloat16)
    hf.model.norm.float()
    hf.lm_head.float()
    return hf


def as_class(module: nn.Module, kind: type[nn.Module]) -> None:
    module.__class__ = kind


def with_tuples(block: nn.Module) -> None:
    as_class(block, TakesFirst)
    block.mlp = Halved(block.mlp).eval()


REFUSED: Mapping[str, tuple[Callable[[], nn.Module], str]] = {
    "gemma2": (lambda: build("gemma2"), "could make 0 of the 3 norms"),
    "gemma3": (lambda: build("gemma3"), "could make 0 of the 3 norms"),
    "granite": (granite, "could make 0 of the 3 norms"),
    "gpt2": (lambda: build("gpt2"), "block 0 has no `mlp`"),
    "opt": (lambda: build("opt"), "block 0 has no `mlp`"),
    "falcon": (lambda: build("falcon"), "a LayerNorm that has not one plain weight"),
    "gpt_neox": (lambda: build("gpt_neox"), "a LayerNorm that has not one plain weight"),
    "phi": (lambda: build("phi"), "no norm behind it|a LayerNorm that has not one plain weight"),
    "float64": (lambda: build("llama", dtype=torch.float64), "64 of torch.float64"),
    "a norm of its own dtype": (wide_norm, "could make 2 of the 3 norms"),
    "another epsilon": (
        changed(lambda block: as_class(block.input_layernorm, OtherEps)),
        "the norm behind block 0, a OtherEps that computes",
    ),
    "a scaled block": (changed(lambda block: as_class(block, Scaled)), "make 2 of the 3 norms"),
    "a block scaled in place": (
        changed(lambda block: as_class(block, ScaledInPlace)),
        "make 2 of the 3 norms",
    ),
    "an MLP of two outputs": (changed(with_tuples), "make 2 of the 3 norms"),
    "training": (changed(lambda block: block.train()), "in training mode"),
    "a hooked block": (
        changed(lambda block: block.register_forward_hook(lambda *_: None)),
        "the block of layer 1 with hooks",
    ),
    "a hooked MLP": (
        changed(lambda block: block.mlp.register_forward_pre_hook(lambda *_: None)),
        "the MLP of layer 1 with hooks",
    ),
    "a hooked norm": (
        changed(lambda block: block.input_layernorm.register_forward_hook(lambda *_: None)),
        "the norm of layer 0 with hooks",
    ),
    "a forward of its own": (
        changed(lambda block: setattr(block, "forward", block.forward)),
        "the block of layer 1 with hooks, a forward",
    ),
    "a compiled MLP": (
        changed(lambda block: block.mlp.compile(backend="eager")),
        "the MLP of layer 1 with hooks, a forward or a compiled call",
    ),
}


Marks = dict[str, tuple[list[str], Any, list[int], list[int]]]


def marks(hf: nn.Module) -> Marks:
    """What a call of each module goes through, and which attributes it has."""
    return {
        name: (
            sorted(module.__dict__),
            module.__dict__.get("_compiled_call_impl"),
            list(module._forward_hooks),
            list(module._forward_pre_hooks),
        )
        for name, module in hf.named_modules()
    }


def logits_of(hf: nn.Module) -> Tensor:
    with torch.no_grad():
        logits: Tensor = hf(IDS).logits
    return logits


def run_failing_in(module: nn.Module, hf: nn.Module) -> None:
    handle = module.register_forward_hook(lambda *_: 1 / 0)
    try:
        logits_of(hf)
    finally:
        handle.remove()


@pytest.mark.parametrize("kind", REFUSED)
def test_what_the_op_cannot_stand_in_for_is_refused_and_left_alone(kind: str) -> None:
    make, words = REFUSED[kind]
    hf = make()
    model = pv.HookedModel(hf)
    before, wanted = marks(hf), logits_of(hf)
    with pytest.raises(ModelError, match=words), pv.fused_norms(model):
        raise AssertionError("entered")
    assert marks(hf) == before
    with counted() as calls:
        assert torch.equal(logits_of(hf), wanted)
    assert not calls


def test_the_mode_is_taken_back_also_after_an_error() -> None:
    found = new("llama")
    hf = found.model.hf
    keys, before, wanted = list(hf.state_dict()), marks(hf), logits_of(hf)
    with pv.fused_norms(found.model):
        inside = marks(hf)
        assert list(hf.state_dict()) == keys
        assert not any("forward" in module.__dict__ for module in hf.modules())
        assert torch.equal(logits_of(hf), wanted)
    changed = {name for name in before if before[name] != inside[name]}
    blocks = {f"model.layers.{layer}" for layer in range(N_LAYERS)}
    norms = {f"model.layers.{layer}.input_layernorm" for layer in range(1, N_LAYERS)}
    assert changed == blocks | {f"{block}.mlp" for block in blocks} | norms | {"model.norm"}
    assert marks(hf) == before
    for module in (hf.model.layers[1], hf.model.layers[2].mlp, hf.model.norm):
        with pytest.raises(ZeroDivisionError), pv.fused_norms(found.model):
            run_failing_in(module, hf)
        assert marks(hf) == before
    with counted() as calls:
        assert torch.equal(logits_of(hf), wanted)
    assert not calls


def test_blocks_within_blocks_and_errors_between_forwards() -> None:
    found = at("llama", torch.float32)
    before = marks(found.model.hf)
    plain = forward(found, one())
    with pv.fused_norms(found.model) as outer:
        with pv.fused_norms(found.model) as inner:
            assert torch.equal(forward(found, one()), plain)
        handle = found.model.hf.model.layers[1].register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            forward(found, one())
        handle.remove()
        assert torch.equal(forward(found, one()), plain)
    assert inner.norms == N_LAYERS
    assert outer.norms == N_LAYERS
    assert marks(found.model.hf) == before


def test_a_block_that_does_more_later_on_is_never_steered_wrongly() -> None:
    found = new("llama")
    block = found.model.hf.model.layers[1]
    as_class(block, Scaled)
    block.times = 1
    with pv.fused_norms(found.model) as fused:
        forward(found, one())
        assert fused.norms == N_LAYERS
        block.times = 1.1
        with pytest.raises(HookError, match="block 1 doing more in this forward"):
            forward(found, one())
        unsteered = forward(found)
    assert fused.norms == N_LAYERS + 1 + N_LAYERS - 1
    assert torch.equal(forward(found), unsteered)
    assert worst(unsteered, forward(at("llama", torch.float32))) > 1e-2


def test_a_copy_made_inside_is_a_plain_model() -> None:
    found = at("gemma", torch.float32)
    with pv.fused_norms(found.model):
        twin = copy.deepcopy(found.model.hf)
        with counted() as calls:
            got = logits_of(twin)
    assert not calls
    assert torch.equal(got, logits_of(found.model.hf))
    assert not any("_compiled_call_impl" in module.__dict__ for module in twin.modules())


def test_a_norm_put_in_meanwhile_is_used() -> None:
    found = new("qwen2")
    other = new("qwen2").model.hf.model.layers[1].input_layernorm
    with torch.no_grad():
        other.weight.mul_(1.5)
    own = found.model.hf.model.layers[1].input_layernorm
    base = forward(found, one())

    def run() -> Tensor:
        found.model.hf.model.layers[1].input_layernorm = other
        try:
            return forward(found, one())
        finally:
            found.model.hf.model.layers[1].input_layernorm = own

    check(run, found.model, N_LAYERS - 1, base=base)


def test_weights_and_epsilon_are_those_of_the_moment() -> None:
    found = new("gemma")
    base = forward(found, one())
    norm = found.model.hf.model.layers[1].input_layernorm

    def run() -> Tensor:
        kept, eps = norm.weight.detach().clone(), norm.eps
        with torch.no_grad():
            norm.weight.mul_(-2.0)
        norm.eps = 0.1
        try:
            return forward(found, one())
        finally:
            with torch.no_grad():
                norm.weight.copy_(kept)
            norm.eps = eps

    check(run, found.model, N_LAYERS, base=base)


def test_the_mode_reaches_no_other_thread() -> None:
    found = at("llama", torch.float32)
    plain = forward(found, one())
    others: list[Tensor] = []
    with pv.fused_norms(found.model) as fused, counted() as calls:
        thread = threading.Thread(target=lambda: others.append(forward(found, one())))
        thread.start()
        thread.join()
        assert not calls
        assert torch.equal(forward(found, one()), plain)
    assert torch.equal(others[0], plain)
    assert set(calls) == {threading.get_ident()}
    assert fused.norms == N_LAYERS


def test_threads_that_come_and_go_get_the_bits_they_get_alone() -> None:
    found = at("qwen2", torch.float32)
    before = marks(found.model.hf)
    coeffs = [0.1 * turn for turn in range(-12, 12)]
    alone = [forward(found, one(coeff=coeff)) for coeff in coeffs]
    gate = threading.Barrier(4)

    def serve(first: int) -> int:
        gate.wait()
        wrong = 0
        for turn in range(first, len(coeffs), 4):
            with pv.fused_norms(found.model) as fused:
                got = forward(found, one(coeff=coeffs[turn]))
            wrong += not torch.equal(got, alone[turn]) or fused.norms != N_LAYERS
        return wrong

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(serve, range(4))) == [0] * 4
    assert marks(found.model.hf) == before
    assert worst(alone[0], alone[-1]) > 1e-2


@pytest.mark.parametrize("plan", [(one(coeff=1.0),), ()])
@pytest.mark.parametrize(("path", "norms"), [("self_attn", 2), ("mlp.down_proj", 3)])
def test_a_model_that_runs_inside_another(path: str, norms: int, plan: tuple[pv.Add, ...]) -> None:
    """Each is steered by its own plan; the outer one's rows are not taken for the inner one's."""
    outer, inner = new("llama"), at("qwen2", torch.float32)
    alone = forward(inner, *plan)
    seen: list[Tensor] = []
    module = outer.model.hf.model.layers[1].get_submodule(path)
    plain = forward(outer, one())

    def run_inner(*_: Any) -> None:
        seen.append(forward(inner, *plan))

    with pv.fused_norms(outer.model) as first, pv.fused_norms(inner.model) as second:
        handle = module.register_forward_hook(run_inner)
        assert torch.equal(forward(outer, one()), plain)
        handle.remove()
    assert first.norms == norms
    assert second.norms == N_LAYERS
    assert len(seen) == 1
    assert torch.equal(seen[0], alone)


def test_the_model_is_not_kept_alive() -> None:
    found = new("llama")
    with pv.fused_norms(found.model), found.model.steer(one()):
        found.model.read(ROWS, sites=[SITE], span="all")
    kept = weakref.ref(found.model.hf)
    del found
    gc.collect()
    assert kept() is None
