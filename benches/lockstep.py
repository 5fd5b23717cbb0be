"""Lockstep: generations that take turns after every token, so that each is timed in company.

Other processes slow a shared machine for milliseconds as well as for minutes. Generations that
advance token by token beside each other meet the same weather, and all they do is counted: work
that waits for a later step, or for the end, is in none of the steps before.
"""

import random
import threading
from collections.abc import Callable, Mapping
from time import perf_counter, thread_time

import torch
from torch import Tensor

from benches.rounds import Lap, bars, frozen

# A generation that gives what it is told to transformers' `generate`.
Arm = Callable[..., object]


class _Runner:
    """One arm in a thread of its own, stopped after every token until it is let go on."""

    def __init__(self, arm: Arm, generations: int, finish: Callable[[], None]) -> None:
        self._go, self._stopped = threading.Semaphore(0), threading.Semaphore(0)
        self._arm, self._generations, self._finish = arm, generations, finish
        self._error: BaseException | None = None
        self._over = False
        self.laps: list[Lap] = []
        # Seconds of this generation's decoding so far; None while its prompt runs.
        self._spent: list[float] | None = None
        self._began = (0.0, 0.0)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        self._stopped.acquire()

    def step(self) -> None:
        """Let the arm make one token, or begin its next generation."""
        if self._error is None and not self._over:
            self._go.release()
            self._stopped.acquire()
        if self._error is not None:
            raise self._error

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """As a logits processor: a token is made. Before the first one only the prompt ran."""
        self._pause()
        if self._spent is None:
            self._spent = [0.0, 0.0]
        self._wait()
        self._began = perf_counter(), thread_time()
        return scores

    def _pause(self) -> None:
        self._finish()
        if self._spent is not None:
            self._spent[0] += perf_counter() - self._began[0]
            self._spent[1] += thread_time() - self._began[1]

    def _run(self) -> None:
        from transformers import LogitsProcessorList

        torch.set_num_threads(1)
        try:
            self._wait()
            for _ in range(self._generations):
                self._spent = None
                self._arm(logits_processor=LogitsProcessorList([self]))
                self._pause()
                wall, cpu = self._spent or (0.0, 0.0)
                self.laps.append(Lap(wall=wall, cpu=cpu))
        except BaseException as error:
            self._error = error
        self._over = True
        self._stopped.release()

    def _wait(self) -> None:
        self._stopped.release()
        self._go.acquire()


def take_turns(
    arms: Mapping[str, Arm],
    *,
    generations: int,
    new_tokens: int,
    seed: int = 0,
    finish: Callable[[], None] = lambda: None,
    what: str = "steps",
) -> dict[str, list[Lap]]:
    """Time what every arm's generations take after their first token, all going side by side.

    After each token the arms go on one after the other, in an order drawn anew.

    Arms must not share a model that one of them hooks. `finish` waits for the device. An arm's
    error is raised here.
    """
    draw = random.Random(seed)
    runners = {name: _Runner(arm, generations, finish) for name, arm in arms.items()}
    order = list(runners.values())
    with frozen(), bars() as progress:
        for _ in progress.track(range(generations * new_tokens + 1), description=what):
            draw.shuffle(order)
            for runner in order:
                runner.step()
            progress.refresh()
    return {name: runner.laps for name, runner in runners.items()}
