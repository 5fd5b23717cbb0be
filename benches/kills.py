"""Kills: a scan of training data stopped at every step of its writing, and what is left of it.

A warmed process forks one child for each attempt. A child is killed by SIGKILL in its k-th write,
fsync or rename, with part of the bytes on the disk; what is there is then cut short as a power cut
may leave it; a resumed child may be killed again. At last one runs to the end, and every row of
its result is compared with an undisturbed scan.
"""

import json
import os
import random
import shutil
import signal
import stat
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

import pvcore as pv
from benches import record, rounds
from benches.random_models import Shape, random_qwen2, random_vectors
from benches.reading import chat_tokenizer
from benches.record import Check, Record
from pvcore import world

NAME = "kills"
Operation = Literal["write", "fsync", "replace"]
OPERATIONS: tuple[Operation, ...] = ("write", "fsync", "replace")
TORN = (0.0, 0.3, 0.99)
SHARD_ROWS = 4
# Vocabulary of the chats' own tokenizer.
SHAPE = Shape(hidden=64, layers=2, vocabulary=2112)
Table = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How many points, and how many rows a scan has."""

    points: int = 300
    rows: int = 18
    seed: int = 0


QUICK = Settings(points=12)


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """Where a child dies: in the `nth` call of an operation, after a share of its effect.

    `torn` is the share of the newest file that the disk keeps, None for all of it. `again` is where
    the resumed child dies.
    """

    operation: Operation
    nth: int
    share: float
    torn: float | None = None
    again: "Point | None" = None
    exact: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came of one point: whether it struck, and rows against the undisturbed scan."""

    struck: bool
    lost: int
    duplicated: int
    altered: int


class Killer:
    """Kills its process in the nth call of an operation, which it counts from now on."""

    def __init__(self, point: Point | None) -> None:
        self.counts = dict.fromkeys(OPERATIONS, 0)
        self._point = point
        for operation in OPERATIONS:
            setattr(os, operation, self._wrapped(operation, getattr(os, operation)))

    def _wrapped(self, operation: Operation, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any) -> Any:
            self.counts[operation] += 1
            point = self._point
            if point and (operation, self.counts[operation]) == (point.operation, point.nth):
                self._strike(operation, real, given, point.share)
            return real(*given)

        return call

    def _strike(
        self, operation: Operation, real: Callable[..., Any], given: tuple[Any, ...], share: float
    ) -> None:
        if operation == "write":
            real(given[0], bytes(given[1])[: int(len(given[1]) * share)])
        elif operation == "fsync" and not stat.S_ISDIR(os.fstat(given[0]).st_mode):
            os.ftruncate(given[0], int(os.fstat(given[0]).st_size * share))
        elif share >= 0.5:
            real(*given)
        os.kill(os.getpid(), signal.SIGKILL)


class Subject:
    """The data, the model and the bank that every child inherits."""

    def __init__(self, settings: Settings, folder: Path) -> None:
        self.folder = folder
        self.model = pv.HookedModel(random_qwen2(SHAPE), chat_tokenizer(), model_id="")
        self.bank = pv.VectorBank(random_vectors(SHAPE.hidden, [0, 1], traits=("evil", "humor")))
        self.data = folder / "data.jsonl"
        chats = [chat for _, chat in world.chats.finetuning_chats(None, settings.rows, seed=1)]
        rows: list[Any] = [{"id": f"chat {at}", "messages": one} for at, one in enumerate(chats)]
        rows[5], rows[-1] = {"id": "none"}, {"messages": [{"role": "user"}]}
        self.data.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def scan(self, out: Path, exact: bool) -> pv.Flags:
        return pv.flag(
            self.model,
            self.data,
            self.bank,
            out=out,
            shard_rows=SHARD_ROWS,
            difference="exact" if exact else "approximate",
            max_new_tokens=2,
        )

    def child(self, out: Path, point: Point | None, exact: bool, result: Path | None) -> bool:
        """One attempt in a process of its own; whether it was killed."""
        child = os.fork()
        if child == 0:
            try:
                killer = Killer(point)
                flags = self.scan(out, exact)
                if result is not None:
                    result.write_text(json.dumps(killer.counts | {"rows": rows_of(flags)}))
            finally:
                os._exit(0)
        _, status = os.waitpid(child, 0)
        return os.WIFSIGNALED(status)


def rows_of(flags: pv.Flags) -> list[tuple[str, Table]]:
    """Every row of a scan as it was written, scored and rejected."""
    found = [row for table in flags.tables() for row in table.to_pylist()]
    return [(f"{row['source']}:{row['row']}", row) for row in (*found, *flags.rejected())]


def points(settings: Settings, counts: Mapping[bool, Mapping[str, int]]) -> list[Point]:
    """Every call of every operation with every share, drawn evenly down to as many as wanted."""
    draw = random.Random(settings.seed)
    every = [
        Point(operation=operation, nth=nth, share=share, torn=torn, exact=exact)
        for exact in (False, True)
        for operation in OPERATIONS
        for nth in range(1, counts[exact][operation] + 1)
        for share in TORN
        for torn in (None, *TORN)
    ]
    chosen = [draw.choice(every) for _ in range(max(settings.points - len(every), 0))]
    chosen += draw.sample(every, min(settings.points, len(every)))
    return [one if draw.random() < 0.5 else _again(one, counts, draw) for one in chosen]


def _again(point: Point, counts: Mapping[bool, Mapping[str, int]], draw: random.Random) -> Point:
    operation = draw.choice(OPERATIONS)
    # What is left to do is less than all, so that a late call may never come.
    nth = draw.randint(1, max(counts[point.exact][operation] // 2, 1))
    second = Point(operation=operation, nth=nth, share=draw.choice(TORN))
    kept = {name: getattr(point, name) for name in ("operation", "nth", "share", "torn", "exact")}
    return Point(**kept, again=second)


def tear(out: Path, share: float) -> None:
    """Cut the file written last down to a share of its length."""
    written = [path for path in out.rglob("*") if path.is_file() and path.name != ".lock"]
    if written:
        newest = max(written, key=lambda path: path.stat().st_mtime_ns)
        os.truncate(newest, int(newest.stat().st_size * share))


def attempt(subject: Subject, point: Point, wanted: Mapping[str, Table]) -> Outcome:
    """One point from the first kill to the last row."""
    out, result = subject.folder / "out", subject.folder / "result.json"
    shutil.rmtree(out, ignore_errors=True)
    result.unlink(missing_ok=True)
    struck = subject.child(out, point, point.exact, None)
    if point.torn is not None:
        tear(out, point.torn)
    if point.again is not None:
        subject.child(out, point.again, point.exact, None)
    subject.child(out, None, point.exact, result)
    rows = json.loads(result.read_text())["rows"] if result.exists() else []
    found = dict(rows)
    return Outcome(
        struck=struck,
        lost=len(wanted.keys() - found.keys()),
        duplicated=len(rows) - len(found),
        altered=sum(found[key] != wanted[key] for key in found.keys() & wanted.keys())
        + len(found.keys() - wanted.keys()),
    )


def _struck(settings: Settings) -> tuple[list[Point], list[Outcome]]:
    """Every point in turn, and what came of it."""
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory() as folder:
        subject = Subject(settings, Path(folder))
        counts, wanted = {}, {}
        # What a first scan imports and compiles, every child would have to import anew. Its
        # threads are gone when it is done: a fork would copy none.
        list(rows_of(subject.scan(subject.folder / "warm", exact=True)))
        for exact in (False, True):
            result = subject.folder / f"whole-{exact}.json"
            subject.child(subject.folder / f"whole-{exact}", None, exact, result)
            held = json.loads(result.read_text())
            wanted[exact] = dict(held.pop("rows"))
            counts[exact] = held
        chosen = points(settings, counts)
        with rounds.bars() as progress:
            for point in progress.track(chosen, description=NAME):
                outcomes.append(attempt(subject, point, wanted[point.exact]))
                progress.refresh()
    return chosen, outcomes


def measure(settings: Settings, *, command: str) -> Record:
    """A record of what was found wrong over all points."""
    torch.set_num_threads(1)
    chosen, outcomes = _struck(settings)
    return Record(
        name=NAME,
        command=command,
        commit=record.commit(),
        date=record.today(),
        versions=record.versions(),
        device=record.device(torch.device("cpu")),
        workload={
            "ratio": "rows of a scan that was killed, against an undisturbed one",
            "kill points": len(outcomes),
            "that struck": sum(one.struck for one in outcomes),
            "killed again while resumed": sum(point.again is not None for point in chosen),
            "with a file cut short": sum(point.torn is not None for point in chosen),
            "rows": settings.rows,
            "rows of a shard": SHARD_ROWS,
        },
        checks={
            f"rows {what}": Check(worst=sum(getattr(one, what) for one in outcomes), bound=0)
            for what in ("lost", "duplicated", "altered")
        },
    )
