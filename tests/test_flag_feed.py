"""The feed: work is done ahead, never too far, and stops when nobody wants it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from pvcore.flag_feed import ahead


def counted(made: list[int], upto: int) -> Iterator[int]:
    for number in range(upto):
        made.append(number)
        yield number


def test_everything_comes_once_in_order() -> None:
    assert list(ahead(iter(range(1000)), 2)) == list(range(1000))
    assert list(ahead(iter(()), 1)) == []


def test_items_are_made_in_another_thread_and_not_too_far_ahead() -> None:
    made: list[int] = []
    items = ahead(counted(made, 100), 3)
    assert next(items) == 0
    deadline = time.monotonic() + 5
    while len(made) < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert len(made) == 5  # one taken, three waiting, one in hand
    items.close()
    assert not [t for t in threading.enumerate() if t.name == "pvcore-feed"]
    assert len(made) <= 6


def test_what_the_thread_raises_is_raised_here_after_what_came_before() -> None:
    def broken() -> Iterator[int]:
        yield 1
        raise KeyError("gone")

    items = ahead(broken(), 4)
    assert next(items) == 1
    with pytest.raises(KeyError, match="gone"):
        next(items)
    assert not [t for t in threading.enumerate() if t.name == "pvcore-feed"]
