"""A million: a scan of generated conversations, its memory and open files watched all along."""

import json
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from statistics import median

import numpy as np
import torch

import pvcore as pv
from benches import record
from benches.kills import SHAPE
from benches.random_models import random_qwen2, random_vectors
from benches.reading import chat_tokenizer
from benches.record import Check, Record
from pvcore import world
from pvcore.flag_shards import SCORES

NAME = "million"
MEBIBYTE = 1 << 20
SLOPE_BOUND = 1.0
# The first rows fill caches of the tokenizer, the allocator and the readers.
WARM_UP = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How many rows, in how many files, and how they are cut."""

    rows: int = 1_000_000
    files: int = 10
    shard_rows: int = 2048
    every: float = 1.0


QUICK = Settings(rows=400, files=2, shard_rows=32, every=0.02)


@dataclass(slots=True, kw_only=True)
class Watch:
    """What was seen at each look: rows on the disk, bytes of memory, open files."""

    rows: list[int] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)
    files: list[int] = field(default_factory=list)

    def slope(self) -> float:
        """Mebibytes of memory for each further 100,000 rows, after the warm-up."""
        warm = self._warm()
        if len(warm) < 2:
            return float("inf")
        rows, memory = (
            np.array([column[at] for at in warm]) for column in (self.rows, self.memory)
        )
        return float(np.polyfit(rows / 1e5, memory / MEBIBYTE, 1)[0])

    def files_gained(self) -> float:
        """How many more files are open in the second half than in the first, on the median."""
        held = [self.files[at] for at in self._warm()]
        half = len(held) // 2
        return median(held[half:]) - median(held[:half]) if half else float("inf")

    def _warm(self) -> list[int]:
        last = max(self.rows, default=0)
        return [at for at, rows in enumerate(self.rows) if rows >= WARM_UP * last]


def resident() -> int:
    """Bytes of memory this process holds; Linux tells."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def watching(out: Path, shard_rows: int, every: float) -> Iterator[Watch]:
    """Look at this process until the block is left."""
    watch, over = Watch(), threading.Event()

    def look() -> None:
        while not over.wait(every):
            names = os.listdir(out / SCORES) if (out / SCORES).exists() else []
            done = sum(name.startswith("part-") for name in names)
            if done:
                watch.rows.append(done * shard_rows)
                watch.memory.append(resident())
                watch.files.append(len(os.listdir("/proc/self/fd")))

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield watch
    finally:
        over.set()
        thread.join()


def write_data(folder: Path, settings: Settings) -> None:
    """Conversations of the persona world's grammar, some of two turns, as JSON lines."""
    chats = world.chats.corpus(0)
    each = -(-settings.rows // settings.files)
    for at in range(settings.files):
        count = min(each, settings.rows - at * each)
        with (folder / f"part-{at:02d}.jsonl").open("w", encoding="utf-8") as file:
            for chat in islice(chats, count):
                file.write(json.dumps({"messages": world.chats.as_dicts(chat)}) + "\n")


def measure(settings: Settings, *, command: str) -> Record:
    """Write the data, scan it once, and compare what came out with what went in."""
    model = pv.HookedModel(random_qwen2(SHAPE), chat_tokenizer(), model_id="")
    bank = pv.VectorBank(random_vectors(SHAPE.hidden, range(SHAPE.layers)))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_data(folder, settings)
        out, began = folder / "flags", time.monotonic()
        with watching(out, settings.shard_rows, settings.every) as watch:
            flags = pv.flag(
                model,
                str(folder / "*.jsonl"),
                bank,
                out=out,
                shard_rows=settings.shard_rows,
                progress=True,
            )
        seconds = time.monotonic() - began
        return made(flags, settings, watch, seconds, command)


def made(flags: pv.Flags, settings: Settings, watch: Watch, seconds: float, command: str) -> Record:
    """The record of a finished scan that took so many seconds."""
    lost, doubled = against(flags, settings)
    tokens = int(flags.manifest["totals"]["tokens"])
    return Record(
        name=NAME,
        command=command,
        commit=record.commit(),
        date=record.today(),
        versions=record.versions(),
        device=record.device(torch.device("cpu")),
        workload={
            "ratio": "one scan from the first file to the last shard",
            "model": f"Qwen2, random weights, {SHAPE}",
            "scores of a row": len(flags.columns),
            "rows": settings.rows,
            "tokens": tokens,
            "rows a second": round(settings.rows / seconds),
            "tokens a second": round(tokens / seconds),
            "memory at the end, MiB": round(watch.memory[-1] / MEBIBYTE) if watch.memory else 0,
            "looks at memory and files": len(watch.rows),
        },
        checks={
            "rows lost": Check(worst=lost, bound=0),
            "rows scored twice": Check(worst=doubled, bound=0),
            "MiB of memory gained for each 100,000 rows": Check(
                worst=round(watch.slope(), 3), bound=SLOPE_BOUND
            ),
            "files left open": Check(worst=watch.files_gained(), bound=0),
        },
    )


def against(flags: pv.Flags, settings: Settings) -> tuple[int, int]:
    """Rows that are missing, and rows that are there again, over all sources."""
    each = -(-settings.rows // settings.files)
    counts = {
        name: np.zeros(min(each, settings.rows - at * each), dtype=np.int64)
        for at, name in enumerate(sorted(flags.datasets))
    }
    for table in flags.tables(["source", "row"]):
        sources = np.asarray(table["source"].to_pylist(), dtype=object)
        rows = table["row"].to_numpy()
        for name in dict.fromkeys(sources.tolist()):
            np.add.at(counts[name], rows[sources == name], 1)
    lost = sum(int((count == 0).sum()) for count in counts.values())
    return lost, sum(int((count > 1).sum()) for count in counts.values())
