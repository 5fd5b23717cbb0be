"""Lockstep: generations that take turns after every token, so that each is timed in company.

Other processes slow a shared machine for milliseconds as well as for minutes. Generations that
advance token by token beside each other meet the same weather, and all they do is counted: work
that waits for a later step, or for the end, is in none of the steps before.

On a GPU whole generations take turns instead. CUDA graphs belong to the thread that captured them,
and a device waited for after every token would be timed empty.
"""

import random
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from time import perf_counter, thread_time

import torch
from torch import Tensor

from benches.rounds import Lap, bars, frozen

# A generation that gives what it is told to transformers' `generate`.
Arm = Callable[..., object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Phases:
    """By arm, the laps of its generations: up to the first token, and all that follows it."""

    prompts: dict[str, list[Lap]]
    decoding: dict[str, list[Lap]]


class _Clock:
    """The time one arm spends, phase by phase; a logits processor that each token comes past."""

    def __init__(self, finish: Callable[[], None]) -> None:
        self._finish = finish
        self.prompts: list[Lap] = []
        self.laps: list[Lap] = []
        # Seconds of this generation's decoding so far; None while its prompt runs.
        self._spent: list[float] | None = None
        self._began = (0.0, 0.0)

    def generate(self, arm: Arm) -> None:
        """One generation, timed from its call to its return."""
        from transformers import LogitsProcessorList

        self._spent = None
        self._finish()
        self._start()
        arm(logits_processor=LogitsProcessorList([self]))
        self.pause()
        wall, cpu = self._spent or (0.0, 0.0)
        self.laps.append(Lap(wall=wall, cpu=cpu))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """A token is made. Before the first one only the prompt ran."""
        if self._spent is None:
            self.pause()
            self._start()
        return scores

    def pause(self) -> None:
        """Count what went by since the last start."""
        self._finish()
        wall, cpu = perf_counter() - self._began[0], thread_time() - self._began[1]
        if self._spent is None:
            self.prompts.append(Lap(wall=wall, cpu=cpu))
            self._spent = [0.0, 0.0]
            return
        self._spent[0] += wall
        self._spent[1] += cpu

    def _start(self) -> None:
        self._began = perf_counter(), thread_time()


class _Runner(_Clock):
    """One arm in a thread of its own, stopped after every token until it is let go on."""

    def __init__(self, arm: Arm, generations: int, finish: Callable[[], None]) -> None:
        super().__init__(finish)
        self._go, self._stopped = threading.Semaphore(0), threading.Semaphore(0)
        self._arm, self._generations = arm, generations
        self._error: BaseException | None = None
        self._over = False
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
        self.pause()
        self._wait()
        self._start()
        return scores

    def _run(self) -> None:
        torch.set_num_threads(1)
        try:
            self._wait()
            for _ in range(self._generations):
                self.generate(self._arm)
        except BaseException as error:
            self._error = error
        self._over = True
        self._stopped.release()

    def _wait(self) -> None:
        self._stopped.release()
        self._go.acquire()


def phases(
    arms: Mapping[str, Arm],
    *,
    generations: int,
    new_tokens: int,
    seed: int = 0,
    finish: Callable[[], None] = lambda: None,
    what: str = "steps",
) -> Phases:
    """Time the prompts and the decoding of all arms, going side by side.

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
    return _phases(runners)


def alternate(
    arms: Mapping[str, Arm],
    *,
    generations: int,
    seed: int = 0,
    finish: Callable[[], None] = lambda: None,
    what: str = "generations",
) -> Phases:
    """The same with whole generations taking turns in this thread, in an order drawn anew.

    The device is waited for at the first token and at the end, and not in between.
    """
    draw, order = random.Random(seed), list(arms)
    clocks = {name: _Clock(finish) for name in arms}
    with frozen(), bars() as progress:
        for _ in progress.track(range(generations), description=what):
            draw.shuffle(order)
            for name in order:
                clocks[name].generate(arms[name])
            progress.refresh()
    return _phases(clocks)


def _phases(clocks: Mapping[str, _Clock]) -> Phases:
    return Phases(
        prompts={name: clock.prompts for name, clock in clocks.items()},
        decoding={name: clock.laps for name, clock in clocks.items()},
    )


def take_turns(
    arms: Mapping[str, Arm],
    *,
    generations: int,
    new_tokens: int,
    seed: int = 0,
    finish: Callable[[], None] = lambda: None,
    what: str = "steps",
) -> dict[str, list[Lap]]:
    """What every arm's generations take after their first token, all going side by side."""
    return phases(
        arms, generations=generations, new_tokens=new_tokens, seed=seed, finish=finish, what=what
    ).decoding
