"""Outflow: scores on their way from the device that makes them, so that few are ever held there.

A long prompt on many vectors and layers shows more scores than a device has room for. They are made
a piece of rows at a time, and a piece leaves on a stream of its own while the next is computed.
On a CPU nothing has to leave: scores stay where they are made.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

import pvcore_kernels as kernels
from pvcore_kernels import paths

# Scores made at a time, with whatever copy of their rows the arithmetic takes, and those that may
# be under way to the host.
PIECE_BYTES, HELD_BYTES = 4 << 20, 8 << 20
LEAST_ROWS = 256


def leaves(device: torch.device) -> bool:
    """Whether scores made on a device belong on another."""
    return device.type != "cpu"


def pieces(
    h: Float[Tensor, "rows d_model"], units: Float[Tensor, "n_vec d_model"]
) -> Iterator[tuple[int, int]]:
    """Starts and ends of the rows that are scored together."""
    row = len(units) * units.element_size()
    if paths.path(h.device, h.dtype, len(units)) != "triton":
        row += h.shape[1] * units.element_size()
    step = max(PIECE_BYTES // row, LEAST_ROWS)
    for start in range(0, len(h), step):
        yield start, min(start + step, len(h))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Copy:
    """A piece under way: where it comes from and goes to, and how it gets there."""

    target: Tensor
    source: Tensor
    pinned: Tensor
    done: torch.cuda.Event


class Outflow:
    """Carries the scores of one call to the host."""

    def __init__(self) -> None:
        self._under_way: deque[_Copy] = deque()
        self._sides: dict[torch.device, torch.cuda.Stream] = {}
        self.held = 0

    def project(
        self, h: Float[Tensor, "batch pos d_model"], units: Float[Tensor, "n_vec d_model"]
    ) -> Float[Tensor, "batch pos n_vec"]:
        """Scores of a prompt, on the host where they leave; complete after `settle`."""
        if not leaves(h.device):
            return kernels.project(h, units)
        rows = h.reshape(-1, h.shape[-1])
        scores = torch.empty(len(rows), len(units), dtype=units.dtype)
        for start, end in pieces(rows, units):
            self.send(scores[start:end], kernels.project(rows[start:end], units))
        return scores.view(*h.shape[:-1], -1)

    def send(self, target: Tensor, source: Tensor) -> None:
        """Copy to the host. On CUDA that is under way until `settle`, or until much is."""
        if not source.is_cuda:
            target.copy_(source)
            return
        main = torch.cuda.current_stream(source.device)
        side = self._sides.setdefault(source.device, _stream_on(source.device))
        pinned = torch.empty(source.shape, dtype=source.dtype, pin_memory=True)
        side.wait_stream(main)
        with torch.cuda.stream(side):
            pinned.copy_(source, non_blocking=True)
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record(side)
        self._under_way.append(_Copy(target=target, source=source, pinned=pinned, done=done))
        self.held += source.nbytes
        while self.held > HELD_BYTES:
            self._land()

    def settle(self) -> None:
        """Wait for all that is under way."""
        while self._under_way:
            self._land()

    def _land(self) -> None:
        """The oldest piece. Its source is let go of only now: the allocator knows one stream."""
        one = self._under_way.popleft()
        one.done.synchronize()
        # Whoever asks may have left the inference mode that the target was made in.
        with torch.inference_mode():
            one.target.copy_(one.pinned)
        self.held -= one.source.nbytes


def _stream_on(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
