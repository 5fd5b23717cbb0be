"""Lockstep: arms take turns after every token, each step is timed, and errors come out."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from benches.lockstep import take_turns

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
    # A prompt's first token is not counted: three steps of each of three generations are.
    assert {name: len(made) for name, made in laps.items()} == {"a": 9, "b": 9}
    assert all(lap.cpu >= 0 and lap.wall > 0 for made in laps.values() for lap in made)
    for start in range(0, len(log), 2):
        pair = log[start : start + 2]
        assert {entry[0] for entry in pair} == {"a", "b"}
        assert pair[0][1:] == pair[1][1:]
    firsts = {log[start][0] for start in range(0, len(log), 2)}
    assert firsts == {"a", "b"}


def test_an_arm_s_error_is_raised() -> None:
    def fails(*, logits_processor: Any) -> None:
        logits_processor(torch.zeros(1, 1), torch.zeros(1, 3))
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        take_turns({"bad": fails, "good": arm("a", [])}, generations=1, new_tokens=STEPS)
