"""Interleaved rounds: jobs timed side by side in random order, compared within each round.

Other processes slow whole stretches of a run. Jobs of one round meet the same stretch, so their
ratio says more than the ratio of two medians.
"""

import gc
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import comb
from statistics import quantiles
from time import perf_counter, process_time
from typing import Literal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from benches.record import Cell

# Returns the seconds of its own median step, or None if it has no steps.
Job = Callable[[], float | None]
Clock = Literal["wall", "cpu", "step"]
SURE = 0.95


@dataclass(frozen=True, slots=True, kw_only=True)
class Lap:
    """Seconds one job took: on the clock, of processor time, and in its median step."""

    wall: float
    cpu: float
    step: float | None = None


def bars() -> Progress:
    """A progress bar that moves only when told: its own thread would be timed as well."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    screen = Console(stderr=True)
    return Progress(*columns, auto_refresh=False, transient=True, console=screen)


def interleave(
    jobs: Mapping[str, Job],
    *,
    rounds: int,
    seed: int = 0,
    finish: Callable[[], None] = lambda: None,
    what: str = "rounds",
) -> dict[str, list[Lap]]:
    """Time every job once a round, in an order drawn anew; `finish` waits for the device."""
    order, draw = list(jobs), random.Random(seed)
    laps: dict[str, list[Lap]] = {name: [] for name in jobs}
    for job in jobs.values():
        job()
    with frozen(), bars() as progress:
        for _ in progress.track(range(rounds), description=what):
            draw.shuffle(order)
            for name in order:
                laps[name].append(_lap(jobs[name], finish))
            progress.refresh()
    return laps


@contextmanager
def frozen() -> Iterator[None]:
    """What lives now lives to the end; without this every collection would walk through it."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _lap(job: Job, finish: Callable[[], None]) -> Lap:
    finish()
    wall, cpu = perf_counter(), process_time()
    step = job()
    finish()
    return Lap(wall=perf_counter() - wall, cpu=process_time() - cpu, step=step)


def paired(
    above: list[Lap], below: list[Lap], *, clock: Clock, target: float | None = None
) -> Cell:
    """The ratio of two jobs, round by round."""
    ratios = [getattr(a, clock) / getattr(b, clock) for a, b in zip(above, below, strict=True)]
    return measured(ratios, target=target)


def measured(ratios: Sequence[float], *, target: float | None = None) -> Cell:
    """The cell of some ratios: their median, how they spread, and where their median may lie."""
    p20, p50, p80 = spread(list(ratios))
    low, high = interval(ratios)
    return Cell(
        status="measured",
        p20=p20,
        p50=p50,
        p80=p80,
        n=len(ratios),
        target=target,
        low=low,
        high=high,
    )


def interval(values: Sequence[float]) -> tuple[float | None, float | None]:
    """What holds the median with a confidence of at least 95%, to four decimals; none for fewer
    than six values.

    How many of n values lie below the true median is binomial, whatever their distribution: so two
    of the values themselves are bounds (Thompson 1936).
    """
    ordered, outside, rank = sorted(values), 0.0, 0
    while (outside := outside + comb(len(ordered), rank) / 2 ** len(ordered)) <= (1 - SURE) / 2:
        rank += 1
    if rank == 0:
        return None, None
    return round(ordered[rank - 1], 4), round(ordered[-rank], 4)


def spread(values: list[float]) -> tuple[float, float, float]:
    """p20, p50 and p80, to four decimals."""
    if len(values) == 1:
        values = values * 2
    cuts = quantiles(values, n=10, method="inclusive")
    p20, p50, p80 = (round(cuts[at], 4) for at in (1, 4, 7))
    return p20, p50, p80
