"""Transport: scores of decode steps from the device's ring to the host, while it computes on."""

from collections import deque
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from pvcore.frames import Call
from pvcore.resident import Watch
from pvcore.sessions import Folder, Scorer


class _Copied:
    """Ring slots on their way to the host; `done` is None where the copy has been made."""

    def __init__(
        self, host: Float[Tensor, "step site batch n_vec"], done: torch.cuda.Event | None
    ) -> None:
        self.host, self.done = host, done

    def arrived(self) -> bool:
        return self.done is None or bool(self.done.query())  # type: ignore[no-untyped-call]

    def take(self) -> Float[Tensor, "step site batch n_vec"]:
        """The scores, in memory of their own; waits for the copy."""
        if self.done is None:
            return self.host
        self.done.synchronize()
        return self.host.clone()


class Transport:
    """Carries the scores of one generation. Nothing in the token loop waits for the device.

    Half a ring at a time is copied, on a stream of its own where the device has streams, while the
    other half fills. `paced` hands over every step at once, which waits for it. Scores that are
    summed up are folded on the device instead, as often.
    """

    def __init__(
        self, call: Call, scorers: Sequence[Scorer], watches: Sequence[Watch], *, paced: bool
    ) -> None:
        self._call, self._paced = call, paced
        ways = list(zip(scorers, watches, strict=True))
        self._folds = [(one, watch) for one, watch in ways if isinstance(one, Folder) and one.folds]
        kept = [way for way in ways if way not in self._folds]
        self._lanes = [_Lane(watch) for _, watch in kept]
        self._scorers = tuple(scorer for scorer, _ in kept)
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
        for folder, watch in self._folds:
            for part in _slots(watch.ring, first, self.made):
                folder.fold(self._call, part)
        if self._lanes:
            self._pending.append([lane.copy(first, self.made) for lane in self._lanes])

    def _deliver(self, *, wait: bool) -> None:
        while self._pending and (wait or all(one.arrived() for one in self._pending[0])):
            for scorer, copied in zip(self._scorers, self._pending.popleft(), strict=True):
                scorer.receive(self._call, copied.take())


def _slots(
    ring: Float[Tensor, "slot site batch n_vec"], first: int, end: int
) -> list[Float[Tensor, "step site batch n_vec"]]:
    """Where steps `first` to `end` lie in a ring, at most as many as it holds, in their order."""
    at, count = first % len(ring), end - first
    cut = min(len(ring) - at, count)
    return [ring[at : at + cut], ring[: count - cut]] if cut < count else [ring[at : at + cut]]


class _Lane:
    """The way of one ring to the host."""

    def __init__(self, watch: Watch) -> None:
        self._ring = watch.ring
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
