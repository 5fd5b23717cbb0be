"""Alarms: thresholds with hysteresis, each crossing told once."""

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import pvcore as pv
from pvcore.alarms import AlarmBell
from pvcore.errors import PlanError

SITES = (pv.resid_post(0), pv.resid_post(2))


def crossings(values: Sequence[float], high: float, low: float) -> list[int]:
    """The steps at which an alarm rings, worked out value by value."""
    rung, steps = False, []
    for step, value in enumerate(values):
        if value > high and not rung:
            steps.append(step)
        if value > high:
            rung = True
        elif value <= low:
            rung = False
    return steps


def rung(bell: AlarmBell, rows: Sequence[Sequence[float]]) -> list[list[int]]:
    """The steps at which each chat rings at the first site."""
    steps: list[list[int]] = [[] for _ in rows]
    for step, values in enumerate(zip(*rows, strict=True)):
        scores = torch.tensor([list(values), [0.0] * len(values)])
        for alarm in bell.ring(step, {"evil": scores}):
            assert alarm.site == SITES[0]
            assert alarm.step == step
            assert alarm.value == pytest.approx(values[alarm.chat])
            steps[alarm.chat].append(step)
    return steps


def bell(level: object) -> AlarmBell:
    return AlarmBell({"evil": level}, ["evil", "humor"], SITES)  # type: ignore[dict-item]


def test_it_rings_on_the_step_that_crosses_and_again_only_after_falling_below_low() -> None:
    course = [1.0, 5.0, 3.5, 4.5, 2.0, 2.5, 4.1, 6.0, 0.0, 4.0, 4.2]
    assert rung(bell(4.0), [course]) == [[1, 3, 6, 10]]
    assert rung(bell(pv.Threshold(4.0, low=3.0)), [course]) == [[1, 6, 10]]
    assert rung(bell(pv.Threshold(4.0, low=1.0)), [course]) == [[1, 10]]
    assert rung(bell(pv.Threshold(4.0, low=-1.0)), [course]) == [[1]]


@given(
    rows=st.integers(1, 4).flatmap(
        lambda n: st.lists(
            st.lists(st.sampled_from([-1.0, 0.0, 0.5, 1.0, 1.5, 2.0]), min_size=n, max_size=n),
            min_size=1,
            max_size=12,
        )
    ),
    low=st.sampled_from([None, 1.0, 0.5, 0.0]),
)
def test_every_chat_rings_as_if_alone(rows: list[list[float]], low: float | None) -> None:
    by_chat = list(zip(*rows, strict=True))
    wanted = [crossings(values, 1.0, 1.0 if low is None else low) for values in by_chat]
    assert rung(bell(pv.Threshold(1.0, low=low)), by_chat) == wanted


def test_a_chat_without_a_value_keeps_its_state() -> None:
    nan = float("nan")
    assert rung(bell(1.0), [[2.0, nan, 2.0, 0.0, nan, 2.0]]) == [[0, 5]]


def test_layers_may_have_thresholds_of_their_own_or_none() -> None:
    one = bell({pv.resid_post(2): pv.Threshold(1.0, low=0.5)})
    scores = torch.tensor([[9.0, 9.0], [0.0, 2.0]])
    (alarm,) = one.ring(7, {"evil": scores})
    assert (alarm.site, alarm.chat, alarm.value, alarm.threshold) == (SITES[1], 1, 2.0, 1.0)
    assert not one.ring(8, {"evil": scores})
    both = bell({0: 10.0, 2: 1.0})
    assert [a.site for a in both.ring(0, {"evil": scores + 2})] == [SITES[0]] * 2 + [SITES[1]] * 2


def test_what_could_never_ring_is_refused() -> None:
    for level, text in (
        (float("inf"), "finite"),
        (float("nan"), "finite"),
        (True, "wanted a number"),
        ({1: 4.0}, r"evil at resid_post.1; the bank watches resid_post.0, resid_post.2"),
        ({}, "at no site"),
    ):
        with pytest.raises(PlanError, match=text):
            bell(level)
    with pytest.raises(PlanError, match="low at or below high"):
        pv.Threshold(1.0, low=2.0)
    with pytest.raises(PlanError, match="an alarm for envy; the bank watches evil"):
        AlarmBell({"envy": 1.0}, ["evil"], SITES)
