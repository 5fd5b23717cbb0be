"""The feed of a scan: rows read and tokenised in a thread of their own, ahead of the scoring.

A shard is a number of rows, and rows may be long: they pass in portions of so many bytes at most.
"""

import queue
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import chain, count, islice
from typing import Any, TypeVar

from pvcore.errors import FlagError
from pvcore.flag_origin import Tally, Witness
from pvcore.flag_shards import Footer
from pvcore.flag_sources import RawRow, Source
from pvcore.flag_tokens import Reading, Rejected, Sample, said_by

T = TypeVar("T")
# Bytes of rows that pass together: more gains nothing, and a few portions are held at once. The
# first are few, so that scoring begins while most is still to be read, and soon many, because rows
# that pass together make fuller batches.
FIRST, GROWTH, WINDOW = 1 << 16, 8, 1 << 23
# About what an object of Python takes beside its content.
OBJECT = 64
# How long a thread that has nowhere to put its work sleeps before it looks whether anybody is left.
PATIENCE = 0.2

Row = tuple[Source, RawRow]


@dataclass(frozen=True, slots=True, kw_only=True)
class Portion:
    """Rows of one shard: to be scored, or `held` already and then without samples.

    `ends` tells the last portion of its shard, whose `digest` is over all rows of the shard.
    """

    shard: int
    held: Footer | None
    samples: Sequence[Sample]
    rejected: Sequence[Rejected]
    digest: str
    share: float
    ends: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Feed:
    """Where the rows come from and how they are read. `held` knows the shards already made.

    `begins` is told the name of each data set, and a mark of its first 1, 2, 4, ... rows.
    """

    sources: Sequence[Source]
    reading: Reading
    shard_rows: int
    held: Callable[[int], Footer | None]
    begins: Callable[[str, int, str], None] = lambda name, count, mark: None
    witnesses: dict[str, Witness] = field(default_factory=dict)

    def portions(self) -> Iterator[Portion]:
        """Every shard in order, in one portion or more."""
        total, rows = self._weight(), self._rows()
        for shard in count():
            first = next(rows, None)
            if first is None:
                return
            stretch = chain([first], islice(rows, self.shard_rows - 1))
            held = self.held(shard)
            if held is None:
                yield from self._read(shard, stretch, total)
            else:
                yield self._passed(shard, stretch, held, total)

    def tallies(self) -> dict[str, Tally]:
        """What came by of each data set, once all portions have."""
        return {name: witness.tally for name, witness in self.witnesses.items()}

    def _rows(self) -> Iterator[Row]:
        form = self.reading.form
        for source in self.sources:
            witness = None
            if source.path is None:
                witness = self.witnesses[source.name] = Witness(source, form)
            for raw in source.rows(form.known, form.beside):
                if witness is not None:
                    witness.see(raw)
                    # What goes on where it was left shows it by its rows alone: a reader of files
                    # is no iterator itself, and a progress bar around one has a length.
                    count = raw.row + 1
                    if count & raw.row == 0:
                        self.begins(source.name, count, str(witness.tally["sha256"]))
                yield source, raw

    def _read(self, shard: int, rows: Iterator[Row], total: float) -> Iterator[Portion]:
        digest = sha256()
        # By the shard and not by the run: a shard made after a stop is cut as it always was.
        for window, ends in _windows(rows, WINDOW if shard else min(FIRST, WINDOW), WINDOW):
            found, said = self.reading.samples(window, digest)
            yield Portion(
                shard=shard,
                held=None,
                samples=[one for one in found if isinstance(one, Sample)],
                rejected=[one for one in found if isinstance(one, Rejected)],
                digest=said,
                share=self._share(window[-1], total),
                ends=ends,
            )

    def _passed(self, shard: int, rows: Iterator[Row], held: Footer, total: float) -> Portion:
        """A shard that is there. Files were compared as a whole; rows of data sets are compared.

        So are rows of files beside a data set: where that has become shorter, they have moved up.
        """
        first = last = next(rows)
        known = all(source.path is not None for source in self.sources)
        digest = sha256()
        for row in chain([first], rows):
            last = row
            if not known:
                digest.update(said_by(row[0].name, row[1], self.reading.form).mark)
        if not known and held.digest != digest.hexdigest():
            raise FlagError(
                f"got other rows between row {first[1].row} of {first[0].name} and row "
                f"{last[1].row} of {last[0].name} than when they were scored; wanted the same data "
                "in the same order. Give another out"
            )
        return Portion(
            shard=shard,
            held=held,
            samples=[],
            rejected=[],
            digest=held.digest,
            share=self._share(last, total),
            ends=True,
        )

    def _weight(self) -> float:
        weights = [source.weight for source in self.sources]
        known = [weight for weight in weights if weight is not None]
        return sum(known) if len(known) == len(weights) else float("nan")

    def _share(self, row: Row, total: float) -> float:
        """Of all data behind a row; NaN where nobody knows how much there is."""
        source, raw = row
        before = self.sources[: self.sources.index(source)]
        passed = sum(one.weight or 0.0 for one in before) + raw.share * (source.weight or 0.0)
        return passed / total if total else 1.0


def _windows(rows: Iterable[Row], size: int, most: int) -> Iterator[tuple[list[Row], bool]]:
    """Rows that hold so many bytes together, or one that holds more; and whether they are the last.

    The size grows from one to the next, up to `most`. A row is asked for when there is room for
    it, so that never more than one is held besides.
    """
    window: list[Row] = []
    held = 0
    for row in rows:
        weight = heft(row[1].content, size)
        if window and held + weight > size:
            yield window, False
            window, held, size = [], 0, min(GROWTH * size, most)
        window.append(row)
        held += weight
    if window:
        yield window, True


def heft(content: Any, most: int) -> int:
    """About how many bytes of memory a row takes; from `most` on it is not counted further."""
    total, left = 0, [content]
    while left and total < most:
        one = left.pop()
        total += OBJECT
        if isinstance(one, str | bytes):
            total += len(one)
        elif isinstance(one, Mapping):
            left.extend(one.values())
        elif isinstance(one, list | tuple):
            left.extend(one)
        else:
            total += getattr(one, "nbytes", 0)  # arrays and tensors
    return total


def ahead(items: Iterator[T], depth: int) -> Generator[T, None, None]:
    """The items, made in a thread at most so many ahead; what it raises is raised here.

    Leaving the loop early stops the thread.
    """
    ready: queue.Queue[tuple[str, Any]] = queue.Queue(maxsize=depth)
    gone = threading.Event()

    def put(entry: tuple[str, Any]) -> bool:
        while not gone.is_set():
            try:
                ready.put(entry, timeout=PATIENCE)
                return True
            except queue.Full:
                continue
        return False

    def make() -> None:
        try:
            for item in items:
                if not put(("item", item)):
                    return
            put(("end", None))
        except BaseException as error:
            put(("error", error))

    thread = threading.Thread(target=make, name="pvcore-feed", daemon=True)
    thread.start()
    try:
        while True:
            kind, value = ready.get()
            if kind == "end":
                return
            if kind == "error":
                raise value
            yield value
    finally:
        gone.set()
        thread.join()
