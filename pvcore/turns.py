"""Turns: one compiled generation at a time on one model, without deadlocks."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from pvcore.errors import HookError

Pace = Literal["generation", "stream"]


class Turn:
    """A lock whose holder is known.

    Who finds a generation under way waits for it. A stream goes on only when its consumer asks for
    more, and a generation started from inside another one would wait for itself: both are refused.
    """

    def __init__(self) -> None:
        self._free = threading.Condition()
        self._holder: tuple[Pace, int] | None = None

    @contextmanager
    def taken(self, pace: Pace) -> Iterator[None]:
        with self._free:
            while self._holder is not None:
                held, thread = self._holder
                if held == "stream" or thread == threading.get_ident():
                    raise HookError(
                        f"got a generation with engine='graph' while a {held} with engine='graph' "
                        "is open on this model, and one at a time may use its buffers; let that "
                        "one finish or close it, or use engine='eager' here"
                    )
                self._free.wait()
            self._holder = (pace, threading.get_ident())
        try:
            yield
        finally:
            with self._free:
                self._holder = None
                self._free.notify_all()
