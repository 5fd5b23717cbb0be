"""Two processes that share a model's weights (FSDP2) train under prevention as one process does."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import pvcore as pv
from tests.finetuning import COEFF, ids, subject, vector

# PEFT and Trainer ask by names that transformers is about to drop.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
RANKS, STEPS = 2, 3
WAYS = ("hooked before", "hooked after", "recomputed", "read meanwhile")


def train(hf: Any, model: Any, rows: slice, *, steered: bool, read: bool = False) -> list[float]:
    """Three steps on some rows of each step's batch of four; the shift of each, if it is read."""
    optimizer = torch.optim.SGD(hf.parameters(), lr=0.1)
    bank, shifts = pv.VectorBank([vector(1)]), []
    prompts = [ids(9)[0], ids(8)[0]]
    with pv.prevent(model, pv.Add(vector(1), coeff=COEFF if steered else 0.0)):
        for step in range(STEPS):
            batch = ids(step, rows=2 * RANKS)[rows]
            hf(input_ids=batch, labels=batch, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if read:
                hooked = model if isinstance(model, pv.HookedModel) else pv.HookedModel(model)
                stands = hooked.read(prompts, sites=bank.sites, span="last_prompt_token")
                shifts += (stands.values[0] @ bank.units[0, 0]).tolist()
    return shifts


def made(way: str) -> tuple[Any, Any]:
    """A model, and what `prevent` is given."""
    hf, _ = subject("qwen2", "without reentry" if way == "recomputed" else "off")
    return hf, hf if way == "hooked after" else pv.HookedModel(hf)


def work(rank: int, folder: str) -> None:
    """What each process does; the first writes down weights and readings."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    torch.set_num_threads(1)
    store = torch.distributed.FileStore(str(Path(folder) / "meeting"), RANKS)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    try:
        mesh = init_device_mesh("cpu", (RANKS,))
        for way in WAYS:
            hf, model = made(way)
            for block in hf.model.layers:
                fully_shard(block, mesh=mesh)
            fully_shard(hf, mesh=mesh)
            mine = slice(2 * rank, 2 * rank + 2)
            shifts = train(hf, model, mine, steered=True, read=way == "read meanwhile")
            for module in hf.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()
            whole = {name: weight.detach().full_tensor() for name, weight in hf.named_parameters()}
            if rank == 0:
                torch.save({"weights": whole, "shifts": shifts}, Path(folder) / f"{way}.pt")
    finally:
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("sharded")
    torch.multiprocessing.spawn(work, args=(str(folder),), nprocs=RANKS)
    return {way: torch.load(folder / f"{way}.pt", weights_only=True) for way in WAYS}


def alone(way: str, *, steered: bool) -> tuple[dict[str, Tensor], list[float]]:
    hf, model = made(way)
    shifts = train(hf, model, slice(0, 2 * RANKS), steered=steered, read=way == "read meanwhile")
    return {name: weight.detach() for name, weight in hf.named_parameters()}, shifts


@pytest.mark.parametrize("way", WAYS)
def test_two_processes_that_share_weights_train_as_one(together: Any, way: str) -> None:
    wanted, shifts = alone(way, steered=True)
    plain, _ = alone(way, steered=False)
    got = together[way]["weights"]
    assert got.keys() == wanted.keys()
    assert max(float((got[name] - wanted[name]).abs().max()) for name in wanted) < 1e-5
    assert max(float((got[name] - plain[name]).abs().max()) for name in plain) > 1e-3
    assert together[way]["shifts"] == pytest.approx(shifts, abs=1e-4)
    assert len(shifts) == (2 * STEPS if way == "read meanwhile" else 0)
