"""Streaming: text and projections token by token, in step with the consumer.

transformers' `generate` runs in a thread of its own that waits for the consumer after each token,
so what the consumer does between two steps takes effect on the next token.
"""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from contextvars import copy_context
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pvcore.alarms import Alarm


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One token of every chat. A chat that has ended gives "" and NaN projections."""

    text: list[str]
    token_ids: Int[Tensor, " chat"]
    projections: Mapping[str, Float[Tensor, "layer chat"]]
    alarms: tuple[Alarm, ...] = ()


class Pieces:
    """Text of a growing token sequence, held back while a character is incomplete.

    Special tokens are no text, unless `marks` are wanted.
    """

    def __init__(self, tokenizer: Any, *, marks: bool = False) -> None:
        self._tokenizer, self._marks = tokenizer, marks
        self._ids: list[int] = []
        self._start = self._told = 0

    def push(self, token: int, *, last: bool = False) -> str:
        """The text that this token completes.

        Decoding restarts one token before what was told, because tokenizers write the first
        token of a text without its leading space.
        """
        self._ids.append(token)
        told = self._decode(self._ids[self._start : self._told])
        known = self._decode(self._ids[self._start :])
        if known.endswith("\ufffd") and not last:
            return ""
        self._start, self._told = max(self._told - 1, self._start), len(self._ids)
        return known[len(told) :]

    @property
    def waits(self) -> bool:
        """Whether text is held back."""
        return self._told < len(self._ids)

    def rest(self) -> str:
        """What is held back, at the end of the tokens; nothing is then."""
        told = self._decode(self._ids[self._start : self._told])
        known = self._decode(self._ids[self._start :])
        self._told = len(self._ids)
        return known[len(told) :]

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=not self._marks))


class _Cancelled(Exception):
    """The consumer has gone."""


def _autocasts() -> list[torch.autocast]:
    """What autocast does in this thread: torch keeps that by thread, not by context."""
    return [
        torch.autocast(device, dtype=torch.get_autocast_dtype(device))
        for device in ("cpu", "cuda")
        if torch.is_autocast_enabled(device)
    ]


class Relay:
    """Runs a producer in a thread, one item ahead of nobody."""

    def __init__(self) -> None:
        self._ready, self._wanted = threading.Semaphore(0), threading.Semaphore(0)
        self._item: Any = None
        self._error: BaseException | None = None
        self._over = self._cancelled = False

    def offer(self, item: Any) -> None:
        """From the producer: hand over an item and wait until the next one is wanted."""
        self._item = item
        self._ready.release()
        self._wanted.acquire()
        if self._cancelled:
            raise _Cancelled

    def items(self, produce: Callable[[], object]) -> Iterator[Any]:
        """From the consumer: items as `produce` offers them; its error is raised here."""
        run = partial(self._run, produce, _autocasts())
        thread = threading.Thread(
            target=copy_context().run, args=(run,), daemon=True, name="pvcore-stream"
        )
        thread.start()
        try:
            self._ready.acquire()
            while not self._over:
                yield self._item
                self._wanted.release()
                self._ready.acquire()
        finally:
            self._cancelled = True
            self._wanted.release()
            thread.join()
        if self._error is not None:
            raise self._error

    def _run(self, produce: Callable[[], object], autocasts: Sequence[torch.autocast]) -> None:
        try:
            with ExitStack() as stack:
                for one in autocasts:
                    stack.enter_context(one)
                produce()
        except _Cancelled:
            pass
        except BaseException as error:
            self._error = error
        finally:
            self._over = True
            self._ready.release()
