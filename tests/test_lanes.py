"""Lanes: the short way acts like torch's own, which is taken wherever something else is on."""

import copy
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pvcore as pv
from pvcore.lanes import give_lane, has_lane, is_compiled
from tests.families import build
from tests.test_plan import vector

X = torch.tensor([[1.0, -2.0]])


class Doubles(nn.Module):
    """Twice its input, plus a bias given by name."""

    def forward(self, x: Tensor, *, bias: float = 0.0) -> Tensor:
        return 2 * x + bias


class Counted:
    """A forward hook that adds one and counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, _module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        self.calls += 1
        return output + 1


def laned(*, begins: list[Any] | None = None) -> tuple[nn.Module, Counted]:
    module, hook = Doubles(), Counted()
    before = None
    if begins is not None:

        def begin(_module: nn.Module, args: Any, kwargs: Any) -> None:
            begins.append((args, kwargs))

        before = (module.register_forward_pre_hook(begin, with_kwargs=True), begin)
    give_lane(module, before=before, after=(module.register_forward_hook(hook), hook))
    return module, hook


def not_called(*_: Any, **__: Any) -> None:
    raise AssertionError("torch's own path was taken")


def test_a_lane_runs_the_hooks_without_torchs_path(monkeypatch: pytest.MonkeyPatch) -> None:
    begins: list[Any] = []
    module, hook = laned(begins=begins)
    assert has_lane(module)
    assert not is_compiled(module)
    monkeypatch.setattr(nn.Module, "_call_impl", not_called)
    assert torch.equal(module(X, bias=3.0), 2 * X + 3 + 1)
    assert hook.calls == 1
    assert begins == [((X,), {"bias": 3.0})]


def test_a_hook_that_returns_nothing_leaves_the_output() -> None:
    module, seen = Doubles(), []
    handle = module.register_forward_hook(watch := lambda *given: seen.append(given[2]))
    give_lane(module, after=(handle, watch))
    assert torch.equal(module(X), 2 * X)
    assert len(seen) == 1


@contextmanager
def removed(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


OTHERS: dict[str, Callable[[nn.Module, Any], Any]] = {
    "forward": lambda module, act: module.register_forward_hook(act),
    "pre": lambda module, act: module.register_forward_pre_hook(act),
    "backward": lambda module, act: module.register_full_backward_hook(act),
    "backward pre": lambda module, act: module.register_full_backward_pre_hook(act),
    "global forward": lambda _, act: nn.modules.module.register_module_forward_hook(act),
    "global pre": lambda _, act: nn.modules.module.register_module_forward_pre_hook(act),
    "global backward": lambda _, act: nn.modules.module.register_module_full_backward_hook(act),
    "global backward pre": lambda _, act: nn.modules.module.register_module_full_backward_pre_hook(
        act
    ),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_beside_another_hook_both_act_once(kind: str) -> None:
    module, hook = laned()
    others: list[Any] = []

    def other(*given: Any) -> None:
        others.append(given)

    x = X.clone().requires_grad_()
    with removed(OTHERS[kind](module, other)):
        output = module(x)
        output.sum().backward()
    assert torch.equal(output, 2 * X + 1)
    assert hook.calls == 1
    assert len(others) == 1
    module(X)
    assert hook.calls == 2
    assert len(others) == 1


def test_a_removed_hook_acts_no_more() -> None:
    module, hook = laned()
    module._forward_hooks.clear()
    assert torch.equal(module(X), 2 * X)
    assert hook.calls == 0


def test_another_hook_in_its_place_is_not_taken_for_it() -> None:
    module, hook = laned()
    module._forward_hooks.clear()
    module.register_forward_hook(lambda _module, _args, output: output - 1)
    assert torch.equal(module(X), 2 * X - 1)
    assert hook.calls == 0


def test_a_traced_module_keeps_what_the_hook_does() -> None:
    module, _ = laned()
    with pytest.warns(DeprecationWarning, match="trace"):
        traced = torch.jit.trace(module, (X,))
    assert torch.equal(traced(X), 2 * X + 1)


def test_a_compiled_module_runs_the_hook_once() -> None:
    module, hook = laned()
    torch.compiler.reset()
    compiled = torch.compile(module, backend="eager")
    assert torch.equal(compiled(X), 2 * X + 1)
    assert hook.calls == 1
    torch.compiler.reset()


def test_compiling_in_place_takes_the_slot() -> None:
    module, hook = laned()
    module.compile(backend="eager")
    assert is_compiled(module)
    assert not has_lane(module)
    assert torch.equal(module(X), 2 * X + 1)
    assert hook.calls == 1
    torch.compiler.reset()


def test_a_copy_has_no_lane() -> None:
    module, _ = laned()
    assert not has_lane(copy.deepcopy(module))
    hf = build("qwen2")
    pv.HookedModel(hf)
    assert all(has_lane(block) for block in hf.model.layers)
    held = io.BytesIO()
    torch.save(hf, held)
    held.seek(0)
    loaded = torch.load(held, weights_only=False)
    for twin in (copy.deepcopy(hf), loaded):
        assert not any(has_lane(module) or is_compiled(module) for module in twin.modules())


def test_a_user_s_hook_changes_nothing_that_a_plan_does() -> None:
    """The same plan with lanes and, once a block has another hook, on torch's own path."""
    hf = build("qwen2")
    model = pv.HookedModel(hf)
    ids = torch.tensor([[5, 9, 3, 12]])
    plan = pv.Plan(
        pv.Add(vector(), coeff=6.0, layers=[1]), monitor=pv.VectorBank([vector()], layers=[1])
    )
    plain = hf(ids).logits

    def run() -> tuple[Tensor, Tensor]:
        with model.arm(plan) as seen:
            logits = hf(ids).logits
        return logits, seen["evil"].prompt

    quick = run()
    blocks: list[nn.Module] = [*hf.model.layers, hf.model]
    handles = [block.register_forward_hook(lambda *_: None) for block in blocks]
    slow = run()
    for handle in handles:
        handle.remove()
    assert all(map(torch.equal, quick, slow))
    assert not torch.equal(quick[0], plain)
