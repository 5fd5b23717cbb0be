"""Lockstep: arms take turns after every token, each step is timed, and errors come out."""

from collections import defaultdict
from collections.abc import Callable
from threading import get_ident
from typing import Any

import pytest
import torch

from benches import lockstep
from benches.lockstep import alternate, phases, take_turns

STEPS = 4


def arm(name: str, log: list[str]) -> Callable[..., None]:
    def generate(*, logits_processor: Any) -> None:
        for step in range(STEPS):
            log.append(f"{name}{step}")
            logits_processor(torch.zeros(1, 1), torch.zeros(1, 3))

    return generate


def test_arms_go_side_by_side() -> None:
    log: list[str] = []
    laps = take_turns({name: arm(name, log) for name in "ab"}, generations=3, new_tokens=STEPS)
    assert {name: len(made) for name, made in laps.items()} == {"a": 3, "b": 3}
    for start in range(0, len(log), 2):
        pair = log[start : start + 2]
        assert {entry[0] for entry in pair} == {"a", "b"}
        assert pair[0][1:] == pair[1][1:]
    firsts = {log[start][0] for start in range(0, len(log), 2)}
    assert firsts == {"a", "b"}


def test_all_that_follows_the_first_token_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in a step and after the last token, but none of the prompt or of another arm."""
    clock: dict[int, float] = defaultdict(float)
    monkeypatch.setattr(lockstep, "thread_time", lambda: clock[get_ident()])
    monkeypatch.setattr(lockstep, "perf_counter", lambda: sum(clock.values()))

    def works(prompt: float, step: float, end: float) -> Callable[..., None]:
        def generate(*, logits_processor: Any) -> None:
            clock[get_ident()] += prompt
            for _ in range(STEPS):
                logits_processor(torch.zeros(1, 1), torch.zeros(1, 3))
                clock[get_ident()] += step
            clock[get_ident()] += end

        return generate

    arms = {"one": works(50.0, 1.0, 20.0), "other": works(7.0, 100.0, 0.0)}
    laps = take_turns(arms, generations=2, new_tokens=STEPS)
    assert [lap.cpu for lap in laps["one"]] == [24.0, 24.0]
    assert [lap.cpu for lap in laps["other"]] == [400.0, 400.0]
    assert [lap.wall for lap in laps["one"]] == [24.0, 24.0]
    both = phases(arms, generations=2, new_tokens=STEPS)
    assert both.decoding == laps
    assert [lap.cpu for lap in both.prompts["one"]] == [50.0, 50.0]
    assert [lap.cpu for lap in both.prompts["other"]] == [7.0, 7.0]
    # In one thread the clock is that thread's: both arms move it, and neither counts the other.
    assert alternate(arms, generations=2) == both


def test_an_arm_s_error_is_raised() -> None:
    def fails(*, logits_processor: Any) -> None:
        logits_processor(torch.zeros(1, 1), torch.zeros(1, 3))
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        take_turns({"bad": fails, "good": arm("a", [])}, generations=1, new_tokens=STEPS)


def test_whole_generations_alternate_and_wait_for_the_device_at_phases_alone() -> None:
    log: list[str] = []
    arms = {name: arm(name, log) for name in "ab"}
    made = alternate(arms, generations=3, finish=lambda: log.append("wait"))
    assert {name: len(laps) for name, laps in made.decoding.items()} == {"a": 3, "b": 3}
    assert all(lap.wall > 0 for lap in made.prompts["a"] + made.decoding["b"])
    each = len(log) // 6
    for start in range(0, len(log), each):
        name = log[start + 1][0]
        first, *others = [f"{name}{step}" for step in range(STEPS)]
        assert log[start : start + each] == ["wait", first, "wait", *others, "wait"]
