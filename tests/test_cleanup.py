"""Whatever is raised, wherever: afterwards the model is the model again, bit for bit."""

import copy
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)

import pvcore as pv
from pvcore.errors import HookError
from tests.families import FAMILIES, build, tokenizer
from tests.oracle import Edit
from tests.subjects import Subject, fresh, point, prompts, raw, subject, trio, worst

IDS = prompts([7])[0]
CHAT = [{"role": "user", "content": "Hi"}]


class Sabotage(Exception):
    """Raised by the tests."""


def base_logits(hf: nn.Module) -> Tensor:
    with torch.no_grad():
        logits: Tensor = hf(IDS[None]).logits
    return logits


def everywhere(found: Subject, coeff: float = 0.5) -> list[Any]:
    """One addition at every site there is."""
    return [pv.Add(trio(site)[0], coeff=coeff, span="all") for site in found.sites]


def reference(found: Subject, coeff: float = 0.5) -> Tensor:
    """What `everywhere` must do, by the oracle."""
    edits = [
        Edit(
            kind="add",
            point=point(site),
            vectors=raw(trio(site)[:1], site),
            where=torch.ones(1, len(IDS), dtype=torch.bool),
            coeff=torch.tensor([coeff]),
        )
        for site in found.sites
    ]
    return found.oracle.forward(IDS[None], None, edits)[0]


def assert_clean(found: Subject, base: Tensor, keys: list[str]) -> None:
    """Untouched when nothing is armed, right when something is."""
    assert torch.equal(base_logits(found.model.hf), base)
    assert list(found.model.hf.state_dict()) == keys
    with found.model.steer(*everywhere(found)):
        steered = base_logits(found.model.hf)
    assert worst(steered, reference(found)) < 1e-5
    assert worst(steered, base) > 1e-3
    assert torch.equal(base_logits(found.model.hf), base)


@contextmanager
def failing_at(count: int, error: type[BaseException], *, after: bool) -> Iterator[list[int]]:
    """Raise in the `count`-th module that a forward enters (or leaves), counted from 0."""
    calls = [0]

    def fail(*_: Any) -> None:
        calls[0] += 1
        if calls[0] == count + 1:
            raise error

    register = register_module_forward_hook if after else register_module_forward_pre_hook
    handle = register(fail)
    try:
        yield calls
    finally:
        handle.remove()


@pytest.mark.parametrize(
    ("name", "error"), [("qwen2", Sabotage), ("gpt2", KeyboardInterrupt), ("gemma2", Sabotage)]
)
def test_a_forward_may_fail_in_any_module(name: str, error: type[BaseException]) -> None:
    """Every module call of a steered, monitored forward fails once."""
    found = fresh(name)
    base, keys = base_logits(found.model.hf), list(found.model.hf.state_dict())
    plan = pv.Plan(*everywhere(found), monitor=pv.VectorBank([trio(*found.sites)[0]]))
    with failing_at(-1, error, after=False) as calls:
        base_logits(found.model.hf)
    assert calls[0] > 30
    for count in range(calls[0]):
        with (
            pytest.raises(error),
            failing_at(count, error, after=count % 2 == 1),
            found.model.arm(plan),
        ):
            base_logits(found.model.hf)
        assert torch.equal(base_logits(found.model.hf), base), count
    assert_clean(found, base, keys)


@pytest.mark.parametrize("count", range(0, 40, 3))
def test_a_caught_failure_leaves_the_armed_plan_working(count: int) -> None:
    found = subject("qwen2")
    bank = pv.VectorBank([trio(*found.sites)[0]])
    with found.model.arm(pv.Plan(*everywhere(found), monitor=bank)) as whole:
        base_logits(found.model.hf)
    with found.model.arm(pv.Plan(*everywhere(found), monitor=bank)) as seen:
        with pytest.raises(Sabotage), failing_at(count, Sabotage, after=False):
            base_logits(found.model.hf)
        steered = base_logits(found.model.hf)
    assert worst(steered, reference(found)) < 1e-5
    assert torch.equal(seen["evil"].last_prompt_token, whole["evil"].last_prompt_token)


RUNS: dict[str, Callable[[pv.HookedModel], object]] = {
    "generate": lambda model: model.generate([CHAT], do_sample=False, max_new_tokens=3),
    "read": lambda model: model.read([IDS], sites=[pv.resid_mid(1), pv.resid_post(2)], span="all"),
    "stream": lambda model: list(model.stream([CHAT], do_sample=False, max_new_tokens=3)),
}


@pytest.mark.parametrize("run", RUNS)
def test_every_way_to_run_may_fail_at_any_point(run: str) -> None:
    found = fresh("qwen2")
    base, keys = base_logits(found.model.hf), list(found.model.hf.state_dict())
    for count in (0, 1, 2, 9, 20, 41, 42, 60, 100):
        failed = False
        for error in (Sabotage, KeyboardInterrupt):
            try:
                with failing_at(count, error, after=False), found.model.steer(*everywhere(found)):
                    RUNS[run](found.model)
            except error:
                failed = True
            assert torch.equal(base_logits(found.model.hf), base), (run, count, error)
        assert failed or count > 20, count
    assert_clean(found, base, keys)


def stop_listening(steps: Iterator[pv.Step]) -> None:
    for step in steps:
        raise Sabotage(step.text)


def test_a_stream_may_be_left_at_any_step() -> None:
    found = fresh("qwen2")
    base, keys = base_logits(found.model.hf), list(found.model.hf.state_dict())
    bank = pv.VectorBank([trio(*found.sites)[0]])
    for taken in range(5):
        with found.model.steer(*everywhere(found)):
            steps: Any = found.model.stream([CHAT], bank, do_sample=False, max_new_tokens=8)
            for _ in range(taken):
                next(steps)
            inside = base_logits(found.model.hf)
            steps.close()
        assert worst(inside, reference(found)) < 1e-5
        assert torch.equal(base_logits(found.model.hf), base)
    with pytest.raises(Sabotage), found.model.steer(*everywhere(found)):
        stop_listening(found.model.stream([CHAT], bank, do_sample=False, max_new_tokens=8))
    assert_clean(found, base, keys)


def test_reading_in_batches_may_be_left_after_any_of_them() -> None:
    found = fresh("qwen2")
    base, keys = base_logits(found.model.hf), list(found.model.hf.state_dict())
    for wanted in range(1, 4):
        batches = found.model.read_batches(
            prompts([3, 4, 5]), sites=[pv.resid_post(1)], span="all", batch_size=1
        )
        for _ in range(wanted):
            next(batches)
        batches.close()
        assert torch.equal(base_logits(found.model.hf), base)
    assert_clean(found, base, keys)


REGISTRATIONS = ("register_forward_hook", "register_forward_pre_hook")


@contextmanager
def failing_registration(monkeypatch: pytest.MonkeyPatch, count: int) -> Iterator[list[int]]:
    """The `count`-th hook that anybody puts on a module cannot be put on."""
    calls = [0]
    with monkeypatch.context() as patch:
        for name in REGISTRATIONS:
            real = getattr(nn.Module, name)

            def register(*args: Any, _real: Any = real, **kwargs: Any) -> Any:
                calls[0] += 1
                if calls[0] == count + 1:
                    raise Sabotage
                return _real(*args, **kwargs)

            patch.setattr(nn.Module, name, register)
        yield calls


@pytest.mark.parametrize("name", ["qwen2", "gpt_neox"])
def test_attaching_may_fail_at_any_hook(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the model is made and while sites are armed; a second try must be right."""
    count, survived = 0, False
    while not survived:
        hf = build(name)
        base, keys = base_logits(hf), list(hf.state_dict())
        with failing_registration(monkeypatch, count):
            try:
                found = Subject(name=name, model=pv.HookedModel(hf), oracle=subject(name).oracle)
                with found.model.steer(*everywhere(found)):
                    base_logits(hf)
                survived = True
            except Sabotage:
                survived = False
        assert torch.equal(base_logits(hf), base)
        assert_clean(
            Subject(name=name, model=pv.HookedModel(hf), oracle=subject(name).oracle), base, keys
        )
        count += 1
    assert count > 2 + 3 + 3


@pytest.mark.parametrize("target", ["add", "intervene", "project"])
@pytest.mark.parametrize("error", [Sabotage, KeyboardInterrupt])
def test_the_arithmetic_inside_a_hook_may_fail(
    target: str, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = fresh("qwen2")
    base, keys = base_logits(found.model.hf), list(found.model.hf.state_dict())
    plan = pv.Plan(
        pv.Add(trio(pv.resid_pre(1))[0], coeff=1.0),
        pv.Ablate(trio(pv.resid_mid(1))[0]),
        monitor=pv.VectorBank([trio(pv.resid_post(1))[0]]),
    )

    def fail(*_: Any, **__: Any) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(f"pvcore_kernels.{target}", fail)
        with pytest.raises(error), found.model.arm(plan):
            base_logits(found.model.hf)
    assert torch.equal(base_logits(found.model.hf), base)
    assert_clean(found, base, keys)


def test_hooks_of_others_stay_and_keep_firing() -> None:
    hf = build("qwen2")
    blocks = hf.get_submodule(FAMILIES["qwen2"].blocks)
    fired: list[str] = []
    earlier = [
        blocks[0].register_forward_hook(lambda *_: fired.append("before")),
        blocks[1].register_forward_pre_hook(lambda *_: fired.append("pre")),
    ]
    found = Subject(
        name="qwen2", model=pv.HookedModel(hf, tokenizer()), oracle=subject("qwen2").oracle
    )
    later = blocks[0].register_forward_hook(lambda *_: fired.append("after"))
    for count in (1, 10, 30):
        with (
            pytest.raises(Sabotage),
            failing_at(count, Sabotage, after=False),
            found.model.steer(*everywhere(found)),
        ):
            base_logits(hf)
    fired.clear()
    with found.model.steer(*everywhere(found)):
        base_logits(hf)
    base_logits(hf)
    assert sorted(fired) == sorted(["before", "pre", "after"] * 2)
    for handle in (*earlier, later):
        handle.remove()
    fired.clear()
    base_logits(hf)
    assert fired == []


@pytest.mark.parametrize("name", ["qwen2", "gpt2", "bloom"])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda hf: pickle.loads(pickle.dumps(hf))])
def test_a_copy_of_a_tapped_model_carries_no_steering(
    name: str, duplicate: Callable[[nn.Module], nn.Module]
) -> None:
    found = fresh(name)
    base = base_logits(found.model.hf)
    with found.model.steer(*everywhere(found)):
        base_logits(found.model.hf)
        twin = duplicate(found.model.hf)
        assert torch.equal(base_logits(twin), base)
        assert worst(base_logits(found.model.hf), base) > 1e-3
    assert torch.equal(base_logits(twin), base)
    hooked = Subject(name=name, model=pv.HookedModel(twin, tokenizer()), oracle=found.oracle)
    assert_clean(hooked, base, list(found.model.hf.state_dict()))
    with hooked.model.steer(*everywhere(hooked)):
        base_logits(twin)
        assert torch.equal(base_logits(found.model.hf), base)


def test_two_hooked_models_of_one_model_share_its_taps() -> None:
    found = fresh("qwen2")
    base = base_logits(found.model.hf)
    second = pv.HookedModel(found.model.hf)
    with found.model.steer(*everywhere(found)):
        once = base_logits(second.hf)
    assert worst(once, reference(found)) < 1e-5
    with second.steer(*everywhere(found)):
        assert torch.equal(base_logits(found.model.hf), once)
    assert torch.equal(base_logits(found.model.hf), base)


def idle_arms(found: Subject) -> dict[str, Any]:
    """Ways to arm a plan, each used below without a forward of the model."""
    return {
        "steer": found.model.steer(*everywhere(found)),
        "monitor": found.model.monitor(pv.VectorBank([trio(*found.sites)[0]])),
        "arm": found.model.arm(pv.Plan(*everywhere(found))),
    }


@pytest.mark.parametrize("way", ["steer", "monitor", "arm"])
def test_a_plan_left_without_a_forward_raises(way: str) -> None:
    found = subject("qwen2")
    never = pytest.raises(HookError, match="no forward of the model inside its block")
    with never, idle_arms(found)[way]:
        pass
    with never, idle_arms(found)[way]:
        base_logits(found.oracle.hf)  # another model


@pytest.mark.parametrize("error", [Sabotage, KeyboardInterrupt, GeneratorExit])
def test_but_not_when_an_error_is_already_on_its_way(error: type[BaseException]) -> None:
    found = subject("qwen2")
    base = base_logits(found.model.hf)
    with pytest.raises(error) as raised, found.model.steer(*everywhere(found)):
        raise error
    assert raised.value.__context__ is None
    assert torch.equal(base_logits(found.model.hf), base)


def test_a_forward_that_failed_does_not_count_as_one() -> None:
    found = subject("qwen2")
    never = pytest.raises(HookError, match="no forward")
    with never, found.model.steer(*everywhere(found)), pytest.raises(Sabotage):
        fail_in_mid_forward(found)


def fail_in_mid_forward(found: Subject) -> None:
    with failing_at(5, Sabotage, after=False):
        base_logits(found.model.hf)
