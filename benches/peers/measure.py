"""The comparison with peers: an environment and a process for each, one table for all."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benches import record
from benches.peers.adapters import PEERS, Entry
from benches.peers.subject import KINDS, SMALL
from benches.random_models import Shape
from benches.record import ROOT, Cell, Check, Record

NAME = "peers"
# Where a peer's packages are put: beside the environment, never into it.
FOLDER = ROOT / ".venv" / "peers"
# Without these two right there is nothing to compare with.
NEEDED = ("pvcore", "torch-hook")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How much is measured. `peers` are names of adapters, by default all."""

    shape: Shape = SMALL
    batches: tuple[int, ...] = (1, 8)
    new_tokens: int = 48
    rounds: int = 30
    peers: tuple[str, ...] = tuple(PEERS)


QUICK = Settings(
    shape=Shape(hidden=64, layers=2, vocabulary=128),
    batches=(2,),
    new_tokens=4,
    rounds=1,
    peers=("pvcore", "torch-hook", "paper"),
)


def measure(settings: Settings, *, command: str) -> Record:
    """Every peer beside plain generation in its own process; wrong results have no speed."""
    found = {
        (name, batch): _run(name, batch, settings)
        for batch in settings.batches
        for name in settings.peers
    }
    broken = [
        f"{PEERS[name].title}: {reason}"
        for (name, _), one in found.items()
        if name in NEEDED
        for reason in one["wrong"].values()
    ]
    cells: dict[str, Cell] = {}
    for (name, batch), one in found.items():
        for kind, title in KINDS.items():
            label = f"batch {batch}/{PEERS[name].title}/{title}"
            cells[label] = _cell(one, kind, broken[0] if broken else "")
    return Record(
        name=NAME,
        command=command,
        commit=record.commit(),
        date=record.today(),
        versions=record.versions(),
        device=record.device(torch.device("cpu")),
        workload=_workload(settings),
        checks={"jobs of pvcore and of plain hooks": Check(worst=len(broken), bound=0)},
        cells=cells,
    )


def _cell(found: Mapping[str, Any], kind: str, broken: str) -> Cell:
    if broken or kind in found["wrong"]:
        return Cell(status="failed", reason=broken or found["wrong"][kind])
    if kind in found["cells"]:
        return Cell(**found["cells"][kind])
    if found["failure"]:
        return Cell(status="failed", reason=found["failure"])
    return Cell(status="unsupported", reason="")


def _run(name: str, batch: int, settings: Settings) -> dict[str, Any]:
    """One peer's process; what it printed, or why it printed nothing."""
    entry, shape = PEERS[name], settings.shape
    try:
        paths = installed(name, entry)
        words = [sys.executable, "-m", "benches.peers.worker", name]
        words += ["--hidden", str(shape.hidden), "--layers", str(shape.layers)]
        words += ["--vocabulary", str(shape.vocabulary), "--batch", str(batch)]
        words += ["--new-tokens", str(settings.new_tokens), "--rounds", str(settings.rounds)]
        path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), *paths])
        done = subprocess.run(
            words,
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=True,
        )
        found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    except (subprocess.CalledProcessError, ValueError, IndexError) as error:
        text = getattr(error, "stderr", "") or str(error)
        reason = text.strip().splitlines()[-1][:200]
        return {"cells": {}, "wrong": {}, "failure": f"{entry.title}: {reason}"}
    return found | {"failure": ""}


def installed(name: str, entry: Entry) -> list[str]:
    """The folder of a peer's packages, filled the first time, without touching what it shares."""
    if not entry.packages:
        return []
    folder = FOLDER / name
    mark = folder / "packages.txt"
    wanted = "\n".join(entry.packages)
    if not mark.exists() or mark.read_text() != wanted:
        words = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade"]
        subprocess.run(
            [*words, "--target", str(folder), *entry.packages],
            check=True,
            stderr=subprocess.PIPE,
            text=True,
        )
        Path(mark).write_text(wanted)
    return [str(folder)]


def _workload(settings: Settings) -> dict[str, record.Plain]:
    return {
        "ratio": "CPU time beside plain `hf.generate` on the same weights in the same process",
        "model": "Qwen2, random weights",
        "hidden": settings.shape.hidden,
        "layers": settings.shape.layers,
        "vocabulary": settings.shape.vocabulary,
        "dtype": "float32",
        "new tokens": settings.new_tokens,
        "vectors": 7,
        "rounds": settings.rounds,
        "same tokens as hooks of plain torch": "checked first for every figure",
    }
