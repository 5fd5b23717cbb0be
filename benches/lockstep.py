"""Lockstep: generations that take turns after every token, so that each step is timed in company.

Other processes slow a shared machine for milliseconds as well as for minutes. Steps that follow
one another within a round meet the same weather, and a round is over in a few steps' time.
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
        self._began: tuple[float, float] | None = None
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
        """As a logits processor: a token is made, whose time counts unless it was a prompt's."""
        self._finish()
        ended = perf_counter(), thread_time()
        if self._began is not None:
            wall, cpu = ended[0] - self._began[0], ended[1] - self._began[1]
            self.laps.append(Lap(wall=wall, cpu=cpu))
        self._wait()
        self._began = perf_counter(), thread_time()
        return scores

    def _run(self) -> None:
        from transformers import LogitsProcessorList

        torch.set_num_threads(1)
        try:
            self._wait()
            for _ in range(self._generations):
                self._began = None
                self._arm(logits_processor=LogitsProcessorList([self]))
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
    """Time every decode step of every arm, one arm after the other in an order drawn anew.

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
