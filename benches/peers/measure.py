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
from benches.loading import called, config_of
from benches.peers.adapters import PEERS, Entry
from benches.peers.subject import KINDS, SMALL, Kind
from benches.random_models import Shape
from benches.record import ROOT, Cell, Check, Record

NAME = "peers"
# Where a peer's packages are put: beside the environment, never into it.
FOLDER = ROOT / ".venv" / "peers"
# Without these two right there is nothing to compare with.
NEEDED = ("pvcore", "torch-hook")


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One group of the table: jobs, and at which size. `share` of the rounds are enough for it."""

    batch: int
    kinds: tuple[Kind, ...]
    new_tokens: int = 48
    configurations: int | None = None
    samples: int = 0
    share: float = 1.0

    def __str__(self) -> str:
        if self.samples:
            return f"{self.samples} samples"
        kinds = "" if self.configurations is None else f", {self.configurations} configurations"
        return f"batch {self.batch}{kinds}"


GENERATING: tuple[Kind, ...] = ("steer", "everywhere", "watch", "both", "rows")
# Published protocols, in what a CPU can do: 16 configurations in one batch (a fork of vLLM), batch
# 256 at 128 new tokens (EasySteer), and 1000 samples read at all layers (vllm-lens).
CASES = (
    Case(batch=1, kinds=GENERATING),
    Case(batch=8, kinds=GENERATING),
    Case(batch=16, kinds=("rows",), configurations=16, share=0.6),
    Case(
        batch=256,
        kinds=("steer", "everywhere", "rows"),
        configurations=16,
        new_tokens=12,
        share=0.1,
    ),
    Case(batch=1, kinds=("extract",), samples=1000, share=0.2),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How much is measured. `peers` are names of adapters, by default all."""

    shape: Shape = SMALL
    model: str | None = None
    cases: tuple[Case, ...] = CASES
    rounds: int = 30
    peers: tuple[str, ...] = tuple(PEERS)


QUICK = Settings(
    shape=Shape(hidden=64, layers=2, vocabulary=128),
    cases=(
        Case(batch=2, kinds=GENERATING, new_tokens=4),
        Case(batch=1, kinds=("extract",), samples=40, new_tokens=4),
    ),
    rounds=1,
    peers=("pvcore", "torch-hook", "paper"),
)


def measure(settings: Settings, *, command: str) -> Record:
    """Every peer beside plain generation in its own process; wrong results have no speed."""
    found = {
        (name, case): _run(name, case, settings)
        for case in settings.cases
        for name in settings.peers
    }
    broken = [
        f"{PEERS[name].title}: {reason}"
        for (name, _), one in found.items()
        if name in NEEDED
        for reason in (*one["wrong"].values(), *filter(None, [one["failure"]]))
    ]
    cells: dict[str, Cell] = {}
    for (name, case), one in found.items():
        entry = PEERS[name]
        for kind in case.kinds:
            label = f"{case}/{entry.title}/{KINDS[kind]}"
            cells[label] = _cell(one, kind, entry, broken[0] if broken else "")
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


def _cell(found: Mapping[str, Any], kind: Kind, entry: Entry, broken: str) -> Cell:
    if broken or kind in found["wrong"]:
        return Cell(status="failed", reason=broken or found["wrong"][kind])
    if kind in found["cells"]:
        return Cell(**found["cells"][kind])
    if found["failure"]:
        return Cell(status="failed", reason=found["failure"])
    if kind in entry.unwritten:
        return Cell(status="not measured", reason="its adapter does not ask for this job")
    return Cell(status="unsupported", reason="")


def _run(name: str, case: Case, settings: Settings) -> dict[str, Any]:
    """One peer's process; what it printed, or why it printed nothing."""
    entry = PEERS[name]
    if all(kind in entry.unwritten for kind in case.kinds):
        return {"cells": {}, "wrong": {}, "failure": ""}
    try:
        paths = installed(name, entry)
        words = [sys.executable, "-m", "benches.peers.worker", name, *_words(case, settings)]
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


def _words(case: Case, settings: Settings) -> list[str]:
    """The size of a case on the worker's command line."""
    shape, rounds = settings.shape, max(round(settings.rounds * case.share), 1)
    words = ["--hidden", shape.hidden, "--layers", shape.layers, "--vocabulary", shape.vocabulary]
    words += ["--batch", case.batch, "--new-tokens", case.new_tokens, "--rounds", rounds]
    words += ["--samples", case.samples]
    words += [] if case.configurations is None else ["--configurations", case.configurations]
    words += [] if settings.model is None else ["--model", settings.model]
    return [*map(str, words), *(word for kind in case.kinds for word in ("--kind", kind))]


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
            capture_output=True,
            text=True,
        )
        Path(mark).write_text(wanted)
    return [str(folder)]


def _workload(settings: Settings) -> dict[str, record.Plain]:
    what = f"Qwen2 of {settings.shape}, random weights"
    if settings.model is not None:
        what = called(settings.model, config_of(settings.model))
    return {
        "ratio": (
            "CPU time beside plain `hf.generate`, and for samples beside a bare forward without "
            "logits, on the same weights in the same process"
        ),
        "model": what,
        "dtype": "float32",
        "new tokens": ", ".join(
            f"{case.new_tokens} at {case}" for case in settings.cases if not case.samples
        ),
        "tokens of a prompt or sample": 16,
        "vectors": 7,
        "rounds": settings.rounds,
        "same tokens as hooks of plain torch": "checked first for every figure",
    }
