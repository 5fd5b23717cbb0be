"""Transport: what decode steps show, from the device's rings to the host, while it computes on."""

from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

import torch
from jaxtyping import Shaped
from torch import Tensor

from pvcore.frames import Call
from pvcore.resident import Watch
from pvcore.resident_alarms import Sounder
from pvcore.sessions import Folder, Scorer


class _Copied:
    """Ring slots on their way to the host; `done` is None where the copy has been made."""

    def __init__(
        self, host: Shaped[Tensor, "step site batch n_vec"], done: torch.cuda.Event | None
    ) -> None:
        self.host, self.done = host, done

    def arrived(self) -> bool:
        return self.done is None or bool(self.done.query())  # type: ignore[no-untyped-call]

    def take(self) -> Shaped[Tensor, "step site batch n_vec"]:
        """What the slots hold, in memory of their own; waits for the copy."""
        if self.done is None:
            return self.host
        self.done.synchronize()
        return self.host.clone()


class Transport:
    """Carries the scores of one generation, and what rang in it where nobody asks step by step.

    Nothing in the token loop waits for the device.
    Half a ring at a time is copied, on a stream of its own where the device has streams, while the
    other half fills. `paced` hands over every step at once, which waits for it. Scores that are
    summed up are folded on the device instead, as often.
    """

    def __init__(
        self, call: Call, scorers: Sequence[Scorer], watches: Sequence[Watch], *, paced: bool
    ) -> None:
        self._paced = paced
        self._folds: list[tuple[Watch, Callable[[Tensor], None]]] = []
        self._ways: list[tuple[_Lane, Callable[[Tensor], None]]] = []
        for scorer, watch in zip(scorers, watches, strict=True):
            if isinstance(scorer, Folder) and scorer.folds:
                self._folds.append((watch, partial(scorer.fold, call)))
            else:
                self._ways.append((_Lane(watch.ring), partial(scorer.receive, call)))
            bells = watch.bells
            if bells and isinstance(scorer, Sounder) and scorer.hand_over(call, bells):
                self._ways.append((_Lane(bells.ring), partial(scorer.receive_rung, call)))
        slots = min((len(watch.ring) for watch in watches), default=2)
        self._every = 1 if paced else slots // 2
        self._sent = self.made = 0
        self._pending: deque[list[_Copied]] = deque()

    def step(self) -> None:
        """A step was launched."""
        self.made += 1
        if self.made - self._sent == self._every:
            self._send()
            self._deliver(wait=self._paced)

    def finish(self) -> None:
        """Hand over what is left; waits for the device."""
        self._send()
        self._deliver(wait=True)

    def _send(self) -> None:
        first, self._sent = self._sent, self.made
        if first == self.made:
            return
        for watch, fold in self._folds:
            for part in _slots(watch.ring, first, self.made):
                fold(part)
        if self._ways:
            self._pending.append([lane.copy(first, self.made) for lane, _ in self._ways])

    def _deliver(self, *, wait: bool) -> None:
        while self._pending and (wait or all(one.arrived() for one in self._pending[0])):
            for (_, receive), copied in zip(self._ways, self._pending.popleft(), strict=True):
                receive(copied.take())


def _slots(
    ring: Shaped[Tensor, "slot site batch n_vec"], first: int, end: int
) -> list[Shaped[Tensor, "step site batch n_vec"]]:
    """Where steps `first` to `end` lie in a ring, at most as many as it holds, in their order."""
    at, count = first % len(ring), end - first
    cut = min(len(ring) - at, count)
    return [ring[at : at + cut], ring[: count - cut]] if cut < count else [ring[at : at + cut]]


class _Lane:
    """The way of one ring to the host."""

    def __init__(self, ring: Shaped[Tensor, "slot site batch n_vec"]) -> None:
        self._ring = ring
        self._cuda = self._ring.is_cuda
        self._side = _stream_on(self._ring.device) if self._cuda else None
        self._last: torch.cuda.Event | None = None

    def copy(self, first: int, end: int) -> _Copied:
        """Start copying steps `first` to `end`, at most as many as the ring holds."""
        host = torch.empty(
            (end - first, *self._ring.shape[1:]), dtype=self._ring.dtype, pin_memory=self._cuda
        )
        sources = _slots(self._ring, first, end)
        targets = torch.split(host, [len(source) for source in sources])
        parts = list(zip(targets, sources, strict=True))
        if self._side is None:
            for target, source in parts:
                target.copy_(source)
            return _Copied(host, None)
        return _Copied(host, self._beside(self._side, parts))

    def _beside(
        self, side: torch.cuda.Stream, parts: Sequence[tuple[Tensor, Tensor]]
    ) -> torch.cuda.Event:
        """Copy on the side stream; the main one waits before it overwrites what was sent before."""
        main = torch.cuda.current_stream(self._ring.device)
        side.wait_stream(main)
        if self._last is not None:
            main.wait_event(self._last)
        with torch.cuda.stream(side):
            for target, source in parts:
                target.copy_(source, non_blocking=True)
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record(side)
        self._last = done
        return done


def _stream_on(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
