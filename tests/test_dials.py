"""Dials: levels by row, kept with their call, in force from the column they were turned at."""

import torch

from pvcore.dials import Dial
from pvcore.frames import Call, Frame

LIKE = torch.zeros(1, dtype=torch.float32)


def call(rows: int = 2, given: int = 4) -> Call:
    mask = torch.ones(rows, given, dtype=torch.bool)
    return Call(rows=torch.arange(rows), n_chats=rows, mask=mask, last=None, generating=True)


def test_a_dial_at_rest_costs_no_mask() -> None:
    dial, one = Dial(), call()
    assert dial.mask(Frame(one, 2, 0, 4, True), LIKE) is None
    assert dial.mask(Frame(one, 2, 4, 1, True), LIKE) is None
    dial.turn(one, 1, 2.0, 4)
    dial.turn(one, 1, 0.0, 5)
    assert dial.mask(Frame(one, 2, 5, 1, True), LIKE) is None


def test_levels_hold_for_the_columns_after_they_were_turned() -> None:
    """A forward without a cache computes all columns again: each keeps the level it had."""
    dial, one = Dial(1.0), call()
    dial.turn(one, 0, -2.0, 5)
    dial.turn(one, 1, 0.5, 5)
    dial.turn(one, 0, 0.0, 7)
    levels = dial.mask(Frame(one, 2, 0, 8, True), LIKE)
    assert levels is not None
    assert levels[0, :, 0].tolist() == [1.0] * 5 + [-2.0] * 2 + [0.0]
    assert levels[1, :, 0].tolist() == [1.0] * 5 + [0.5] * 3
    later = dial.mask(Frame(one, 2, 6, 2, True), LIKE)
    assert later is not None
    assert torch.equal(later, levels[:, 6:])
    newest = dial.mask(Frame(one, 2, 7, 1, True), LIKE)
    assert newest is not None
    assert newest.flatten().tolist() == [0.0, 0.5]
    before = dial.mask(Frame(one, 2, 0, 4, True), LIKE)
    assert before is not None
    assert bool((before == 1.0).all())


def test_every_call_has_levels_of_its_own() -> None:
    dial, one, other = Dial(), call(), call()
    first = dial.now(one)
    dial.turn(one, 0, 3.0, 4)
    assert dial.now(one).tolist() == [3.0, 0.0]
    assert dial.now(one) is not first
    assert dial.now(other).tolist() == [0.0, 0.0]
    assert dial.now(one) is dial.now(one)
