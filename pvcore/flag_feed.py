"""The feed of a scan: rows read and tokenised in a thread of their own, ahead of the scoring."""

import queue
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from pvcore.errors import FlagError
from pvcore.flag_origin import Tally, Witness
from pvcore.flag_shards import Footer
from pvcore.flag_sources import RawRow, Source
from pvcore.flag_tokens import Reading, Rejected, Sample

T = TypeVar("T")
# How long a thread that has nowhere to put its work sleeps before it looks whether anybody is left.
PATIENCE = 0.2

Row = tuple[Source, RawRow]


@dataclass(frozen=True, slots=True, kw_only=True)
class Portion:
    """The rows of one shard: to be scored, or `held` already and then without samples."""

    shard: int
    held: Footer | None
    samples: Sequence[Sample]
    rejected: Sequence[Rejected]
    digest: str
    share: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Feed:
    """Where the rows come from and how they are read. `held` knows the shards already made."""

    sources: Sequence[Source]
    reading: Reading
    shard_rows: int
    held: Callable[[int], Footer | None]
    witnesses: dict[str, Witness] = field(default_factory=dict)

    def portions(self) -> Iterator[Portion]:
        """Every shard in order."""
        total = self._weight()
        for shard, rows in enumerate(_stretches(self._rows(), self.shard_rows)):
            yield self._portion(shard, rows, self._share(rows[-1], total))

    def tallies(self) -> dict[str, Tally]:
        """What came by of each data set, once all portions have."""
        return {name: witness.tally for name, witness in self.witnesses.items()}

    def _rows(self) -> Iterator[Row]:
        form = self.reading.form
        for source in self.sources:
            witness = None
            if source.path is None:
                witness = self.witnesses[source.name] = Witness(source, form)
            for raw in source.rows(form.known):
                if witness is not None:
                    witness.see(raw)
                yield source, raw

    def _portion(self, shard: int, rows: Sequence[Row], share: float) -> Portion:
        held = self.held(shard)
        plain = held is not None and all(source.path is not None for source, _ in rows)
        found: list[Sample | Rejected] = []
        digest = held.digest if held is not None else ""
        if not plain:
            found, digest = self.reading.samples(rows)
        if held is not None and held.digest != digest:
            first, last = rows[0], rows[-1]
            raise FlagError(
                f"got other rows between row {first[1].row} of {first[0].name} and row "
                f"{last[1].row} of {last[0].name} than when they were scored; wanted the same data "
                "in the same order. Give another out"
            )
        return Portion(
            shard=shard,
            held=held,
            samples=[] if held else [one for one in found if isinstance(one, Sample)],
            rejected=[] if held else [one for one in found if isinstance(one, Rejected)],
            digest=digest,
            share=share,
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


def _stretches(rows: Iterable[Row], size: int) -> Iterator[list[Row]]:
    stretch: list[Row] = []
    for row in rows:
        stretch.append(row)
        if len(stretch) == size:
            yield stretch
            stretch = []
    if stretch:
        yield stretch


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
