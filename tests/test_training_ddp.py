"""Four processes train together under prevention as one process does with all of their rows."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import pvcore as pv
from tests.finetuning import COEFF, ids, subject, vector

RANKS, STEPS = 4, 3


def train(called: Any, hf: Any, rows: slice, steered: bool) -> dict[str, Tensor]:
    """Three steps on some rows of each step's batch of eight."""
    optimizer = torch.optim.SGD(hf.parameters(), lr=0.1)
    coeff = COEFF if steered else 0.0
    with pv.prevent(called, pv.Add(vector(1), coeff=coeff)):
        for step in range(STEPS):
            batch = ids(step, rows=2 * RANKS)[rows]
            called(input_ids=batch, labels=batch, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return {name: weight.detach() for name, weight in hf.state_dict().items()}


def work(rank: int, folder: str) -> None:
    """What each process does; the first writes down its weights."""
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(str(Path(folder) / "meeting"), RANKS)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    try:
        hf, _ = subject("qwen2")
        called = nn.parallel.DistributedDataParallel(hf)
        trained = train(called, hf, slice(2 * rank, 2 * rank + 2), steered=True)
        if rank == 0:
            torch.save(trained, Path(folder) / "weights.pt")
    finally:
        torch.distributed.destroy_process_group()


def test_four_processes_train_as_one(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(work, args=(str(tmp_path),), nprocs=RANKS)
    together = torch.load(tmp_path / "weights.pt", weights_only=True)
    whole = slice(0, 2 * RANKS)
    hf, _ = subject("qwen2")
    alone = train(hf, hf, whole, steered=True)
    hf, _ = subject("qwen2")
    plain = train(hf, hf, whole, steered=False)
    assert together.keys() == alone.keys()
    moved = max(float((together[name] - plain[name]).abs().max()) for name in plain)
    apart = max(float((together[name] - alone[name]).abs().max()) for name in alone)
    assert apart < 1e-5
    assert moved > 1e-3
