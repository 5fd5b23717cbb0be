"""Cleaned copies: the same data without the rows that were flagged."""

import gzip
from collections import Counter
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pvcore.errors import FlagError
from pvcore.files import written_durably
from pvcore.flag_json import json_line
from pvcore.flag_origin import Origin
from pvcore.flag_sources import Source
from pvcore.flag_tables import BUFFER, arrow_errors, parquet_batches


@dataclass(frozen=True, slots=True, kw_only=True)
class Cleaned:
    """One copy: the file, and how many rows it has and lacks."""

    path: Path
    kept: int
    flagged: int
    rejected: int


class _Sieve:
    """Which rows of a source stay, and the count of the others."""

    def __init__(self, flagged: NDArray[np.int64], rejected: set[int]) -> None:
        self._flagged, self._rejected = frozenset(flagged.tolist()), rejected
        self.kept = self.flagged = self.rejected = 0

    def keeps(self, row: int) -> bool:
        if row in self._rejected:
            self.rejected += 1
        elif row in self._flagged:
            self.flagged += 1
        else:
            self.kept += 1
            return True
        return False


def write_clean(
    sources: Sequence[Source],
    folder: Path,
    flagged: Mapping[str, NDArray[np.int64]],
    rejected: Mapping[str, set[int]],
    origin: Origin,
) -> dict[str, Cleaned]:
    """Copy the sources without some rows; each copy appears whole, under the source's file name.

    Raises `FlagError`, without a copy, where a source is not what was scored.
    """
    origin.check_files(sources)
    made = {}
    for source, path in zip(sources, check_places(sources, folder), strict=True):
        none = np.empty(0, dtype=np.int64)
        sieve = _Sieve(flagged.get(source.name, none), rejected.get(source.name, set()))
        _copied(source, path, sieve, origin)
        made[source.name] = Cleaned(
            path=path, kept=sieve.kept, flagged=sieve.flagged, rejected=sieve.rejected
        )
    return made


def check_places(sources: Sequence[Source], folder: Path) -> list[Path]:
    """Where the copy of each source will lie; `FlagError` where two would, or a source does."""
    names = [_file_name(source) for source in sources]
    twice = sorted(name for name, count in Counter(names).items() if count > 1)
    if twice:
        raise FlagError(
            f"got {twice[0]} from two folders; wanted file names that differ. Clean them one by one"
        )
    paths = [folder / name for name in names]
    for source, path in zip(sources, paths, strict=True):
        if source.path is not None and path.exists() and path.samefile(source.path):
            raise FlagError(f"got {folder}, where {source.name} itself lies; give another folder")
    return paths


def _file_name(source: Source) -> str:
    if source.path is not None:
        return source.path.name
    safe = "".join(c if c.isalnum() or c in "-_." else "-" for c in source.name)
    return f"{safe}.jsonl"


def _copied(source: Source, path: Path, sieve: _Sieve, origin: Origin) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_durably(path) as draft:
            if source.kind == "parquet":
                with arrow_errors():
                    _copy_parquet(source, draft, sieve)
            else:
                _copy_lines(source, draft, sieve, origin)
    except OSError as error:
        raise FlagError(f"got {path}, which cannot be written: {error.strerror}") from error
    except ValueError as error:
        raise FlagError(
            f"got {source.name}, which cannot be copied ({' '.join(str(error).split())[:160]}); "
            "wanted columns of types that Parquet files hold. Leave the odd column out, and flag "
            "what is left"
        ) from error


def _copy_lines(source: Source, draft: Path, sieve: _Sieve, origin: Origin) -> None:
    packed = source.path is not None and source.path.suffix.casefold() == ".gz"
    with draft.open("wb") as raw:
        # Without a name or date inside, equal data gives equal bytes.
        out: Any = gzip.GzipFile("", "wb", fileobj=raw, mtime=0) if packed else raw
        with closing(_lines(source, sieve, origin)) as lines:
            for line in lines:
                out.write(line)
        if packed:
            out.close()


def _lines(source: Source, sieve: _Sieve, origin: Origin) -> Generator[bytes, None, None]:
    if source.path is not None:
        last, kept = -1, True  # the header of a table stays
        for row, piece in source.pieces():
            if row != last:
                last, kept = row, sieve.keeps(row)
            if kept:
                yield piece
        return
    witness = origin.witness(source)
    for raw in source.rows(frozenset()):
        if witness is not None:
            witness.see(raw)
        if sieve.keeps(raw.row):
            yield json_line(raw.content, f"{source.name}: row {raw.row}") + b"\n"
    origin.check_rows(source, witness)


def _copy_parquet(source: Source, draft: Path, sieve: _Sieve) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    assert source.path is not None, "only files are tables"
    row = 0
    with (
        pq.ParquetFile(source.path, pre_buffer=False, buffer_size=BUFFER) as file,
        pq.ParquetWriter(draft, file.schema_arrow) as out,
    ):
        for batch in parquet_batches(file):
            kept = [sieve.keeps(row + at) for at in range(batch.num_rows)]
            row += batch.num_rows
            # Slices, for there are types of columns that pyarrow cannot filter.
            stretches = [batch.slice(first, count) for first, count in _stretches(kept)]
            out.write_table(pa.Table.from_batches(stretches, batch.schema))


def _stretches(kept: Sequence[bool]) -> Iterator[tuple[int, int]]:
    """First row and length of each stretch of rows that are kept."""
    first = 0
    for stays, rows in groupby(kept):
        count = len(list(rows))
        if stays:
            yield first, count
        first += count
