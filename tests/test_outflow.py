"""Scores that leave their device: complete on the host, and never many of them on the device."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import pvcore as pv
from pvcore import monitor, outflow, resident
from pvcore.frames import Call, Frame
from pvcore.monitor import Seen
from pvcore.outflow import HELD_BYTES, LEAST_ROWS, PIECE_BYTES, Outflow, pieces
from pvcore.resident import Met, Watch
from pvcore_kernels import paths
from tests.subjects import trio
from tests.test_resident import LAYERS, MIB, VECTORS, WIDTH, Taking

BATCH, COLUMNS, SITES = 4, 200, 3
BANK = pv.VectorBank(trio(*(pv.resid_post(layer) for layer in range(SITES))))


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that operations make and somebody still holds.

    Those of `given` tensors were there before.
    """

    def __init__(self, *given: Tensor) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known = {one.untyped_storage()._cdata for one in given}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, tuple | list) else (out,):
            if isinstance(one, Tensor):
                self._count(one)
        return out

    def _count(self, one: Tensor) -> None:
        storage = one.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        size = storage.nbytes()
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


@contextmanager
def elsewhere(monkeypatch: pytest.MonkeyPatch, piece: int) -> Iterator[None]:
    """The CPU taken for a device that scores leave, in small pieces."""
    with monkeypatch.context() as patch:
        for module in (outflow, monitor):
            patch.setattr(module, "leaves", lambda device: True)
            patch.setattr(module, "PIECE_BYTES", piece)
        patch.setattr(outflow, "LEAST_ROWS", 1)
        yield


def prompt() -> tuple[Frame, list[Tensor]]:
    call = Call(
        rows=torch.arange(BATCH),
        n_chats=BATCH,
        mask=torch.ones(BATCH, COLUMNS, dtype=torch.bool),
        last=torch.full((BATCH,), COLUMNS - 1),
        generating=True,
    )
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(SITES, BATCH, COLUMNS, 64, generator=generator).bfloat16()
    return Frame(call, BATCH, 0, COLUMNS, True), list(rows)


def shown(seen: Seen, frame: Frame, rows: list[Tensor]) -> None:
    take = seen.begin(frame)
    for place, h in enumerate(rows):
        take(place, h)
    seen.end(frame)


@pytest.mark.parametrize("piece", [1 << 11, 1 << 13])
def test_a_prompt_holds_one_piece_beside_what_is_on_the_host(
    piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    frame, rows = prompt()
    wanted, seen = Seen(BANK), Seen(BANK)
    shown(wanted, frame, rows)
    units = seen.units(torch.device("cpu"), torch.float32)
    host = SITES * BATCH * COLUMNS * len(BANK) * 4
    with elsewhere(monkeypatch, piece), LiveBytes(*rows, units) as live:
        shown(seen, frame, rows)
    assert host <= live.most <= host + piece
    everything = BATCH * COLUMNS * 64 * 4  # what one site's rows take in float32
    assert piece < everything / 10
    for trait in seen.traits:
        got, other = seen[trait].prompt, wanted[trait].prompt
        assert (got - other).abs().max() <= 1e-6 * other.abs().max()
        assert other.isfinite().all()


def test_many_steps_leave_together(monkeypatch: pytest.MonkeyPatch) -> None:
    frame, rows = prompt()
    seen, wanted = Seen(BANK), Seen(BANK)
    step = SITES * BATCH * len(BANK) * 4
    for one in (wanted, seen):
        shown(one, frame, rows)
    first = seen._records[frame.call]
    generator = torch.Generator().manual_seed(1)
    scores = torch.randn(23, SITES, BATCH, len(BANK), generator=generator)
    with elsewhere(monkeypatch, 5 * step):
        for one in scores:
            first.keep([one])
            assert first.staying * step < 5 * step
    assert first.staying == 3
    assert torch.equal(torch.stack(first.steps), scores)
    assert torch.equal(first.newest(BANK.sites), scores[-1])


def test_rows_are_scored_in_pieces_that_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    h = torch.empty(70000, WIDTH, dtype=torch.bfloat16, device="meta")
    units = torch.empty(VECTORS, WIDTH, device="meta")
    for kernels in (True, False):
        monkeypatch.setattr(paths, "takes_kernels", lambda device, dtype, kernels=kernels: kernels)
        cut = list(pieces(h, units))
        assert [end for _, end in cut[:-1]] == [start for start, _ in cut[1:]]
        assert (cut[0][0], cut[-1][1]) == (0, len(h))
        row = VECTORS * 4 + (0 if kernels else WIDTH * 4)
        widest = max(end - start for start, end in cut)
        assert widest * row <= PIECE_BYTES
        assert widest >= LEAST_ROWS


@pytest.mark.parametrize("batch", [1, 8, 32])
def test_128_vectors_at_all_layers_of_a_7b_take_less_than_64_mib_in_a_prompt_and_after_it(
    batch: int,
) -> None:
    """Beside the bank: what decodes, and what may be under way from a prompt of any length."""
    met = Met(device=torch.device("meta"), dtype=torch.bfloat16)
    watch = Watch(Taking(LAYERS, VECTORS, WIDTH), met, batch, WIDTH)
    graph = watch.beside_bank + PIECE_BYTES + HELD_BYTES
    eager_rows = 2 * LAYERS * batch * WIDTH * 2  # the newest of each layer, and side by side
    eager = eager_rows + 2 * PIECE_BYTES + HELD_BYTES
    assert max(graph, eager) < 64 * MIB
    assert batch < 32 or graph > resident.RING_BYTES > eager / 2


def test_nothing_moves_on_a_cpu() -> None:
    h, units = torch.randn(2, 5, 16), torch.randn(3, 16)
    carrier = Outflow()
    assert torch.equal(carrier.project(h, units), h @ units.mT)
    assert carrier.held == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_holds_little_and_loses_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(8, 4096, 256, generator=generator).bfloat16().cuda()
    units = torch.randn(128, 256, generator=generator).cuda()
    carrier = Outflow()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    scores = carrier.project(h, units)
    assert carrier.held <= HELD_BYTES
    carrier.settle()
    assert carrier.held == 0
    assert torch.cuda.max_memory_allocated() - before <= HELD_BYTES + 2 * PIECE_BYTES
    wanted = h.cpu().double() @ units.cpu().double().mT
    assert (scores.double() - wanted).abs().max() <= 1e-5 * wanted.abs().max()
