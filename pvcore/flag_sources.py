"""Sources of training data: files and data sets, read row by row in bounded memory.

A row is handed on as it lies in its source, so that rows that were done before cost next to
nothing; `decode` makes the record of one. A row that cannot be read is a `RowDefect` in its place;
a file that cannot be read on is one `SourceError`.
"""

import glob
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pvcore.errors import SourceError
from pvcore.flag_lines import json_lines, line_pieces
from pvcore.flag_rows import BESIDE, KEYS, RowDefect, each_once, is_filled, is_unicode
from pvcore.flag_tables import csv_bytes, csv_rows, parquet_rows

Kind = Literal["json lines", "csv", "parquet", "rows"]
Sources = str | PathLike[str] | Iterable[Any] | Mapping[str, Any]
Standing = tuple[int, int, int] | None

SUFFIXES: Mapping[str, Kind] = {
    ".jsonl": "json lines",
    ".ndjson": "json lines",
    ".json": "json lines",
    ".csv": "csv",
    ".parquet": "parquet",
}


@dataclass(frozen=True, slots=True)
class RawRow:
    """One row as it lies in its source: a line, a record, or the reason why it is neither."""

    row: int
    content: Any
    share: float  # of the source that is behind this row; NaN where its length is unknown


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """One file, or one iterable of mappings. `name` stands in every row and report."""

    name: str
    kind: Kind
    path: Path | None = None
    held: Any = field(default=None, repr=False)

    def rows(self, known: frozenset[str], beside: frozenset[str] = BESIDE) -> Iterator[RawRow]:
        """Every row in order; of columns only the known ones are loaded.

        Of those `beside` a conversation a data set's rows keep only whether they are there.
        """
        if self.path is None:
            yield from self._held_rows(known, beside)
            return
        reader = {"json lines": json_lines, "csv": csv_rows, "parquet": parquet_rows}[self.kind]
        for row, content, share in self._told(reader(self.path, known)):
            yield RawRow(row, content, share)

    def pieces(self) -> Iterator[tuple[int, bytes]]:
        """The rows of a text file as they lie there, for a copy: a long one in several pieces.

        The header of a CSV is row -1.
        """
        assert self.path is not None, "only files have bytes"
        yield from self._told((csv_bytes if self.kind == "csv" else line_pieces)(self.path))

    def _told(self, found: Iterator[Any]) -> Iterator[Any]:
        """What a reader finds, which begins with its row; where it fails, one `SourceError`."""
        row = -1
        try:
            for one in found:
                row = one[0]
                yield one
        except (OSError, EOFError, zlib.error, ValueError) as error:
            raise SourceError(
                f"{self.name}: cannot be read after row {row} ({_brief(error)}); wanted a whole "
                f"{self.kind} file. Mend it and scan into another out, as it is another file "
                "then, or leave it out"
            ) from error

    def _held_rows(self, known: frozenset[str], beside: frozenset[str]) -> Iterator[RawRow]:
        size = _length(self.held)
        rows = enumerate(iter(self.held))
        while True:
            try:
                row, record = next(rows)
                record = own(_narrowed(record, known, beside))
            except StopIteration:
                return
            except Exception as error:
                raise SourceError(
                    f"{self.name}: reading it raised {type(error).__name__}: {_brief(error)}; "
                    "wanted an iterable of mappings. Mend it, or leave it out"
                ) from error
            if row == 0 and isinstance(record, str | PathLike | list | tuple):
                raise SourceError(
                    f"{self.name}: got a {type(self.held).__name__} of {type(record).__name__}; "
                    "wanted mappings, or a list where paths or data sets are meant"
                )
            yield RawRow(row, record, (row + 1) / size if size else float("nan"))

    def fingerprint(self) -> dict[str, str | int]:
        """What a resumed scan compares: the whole content of a file; of data sets the name only.

        Rows of a data set are compared as they come by again.
        """
        if self.path is None:
            return {"kind": self.kind}
        digest, size = sha256(), 0
        try:
            with self.path.open("rb") as file:
                while piece := file.read(1 << 20):
                    digest.update(piece)
                    size += len(piece)
        except OSError as error:
            raise SourceError(
                f"{self.name}: cannot be read ({_brief(error)}); wanted a file you may read"
            ) from error
        return {"kind": self.kind, "bytes": size, "sha256": digest.hexdigest()}

    @property
    def weight(self) -> float | None:
        """How much of the work it is, in bytes of file; None where that cannot be known."""
        if self.path is not None:
            try:
                return float(self.path.stat().st_size)
            except OSError:  # it was read, and is gone
                return None
        size = _length(self.held)
        return None if size is None else 1000.0 * size


def standing(sources: Sequence[Source]) -> list[Standing]:
    """Of each, what a file cannot be written to without changing; None for what is no file now."""
    found: list[Standing] = []
    for one in sources:
        try:
            about = None if one.path is None else one.path.stat()
        except OSError:  # it is gone
            about = None
        found.append(about and (about.st_ino, about.st_size, about.st_mtime_ns))
    return found


def _length(held: Any) -> int | None:
    """How many rows there are to come; None where that is not known, as of a bar over a stream."""
    try:
        return len(held)
    except TypeError:
        return None


def decode(content: Any) -> Any:
    """The record of a row's content. Raises `RowDefect`."""
    if isinstance(content, RowDefect):
        raise content
    if not isinstance(content, bytes):
        return content
    try:
        return json.loads(content, object_pairs_hook=each_once)
    except UnicodeDecodeError as error:
        raise RowDefect("", f"got a byte at {error.start} that is no UTF-8; wanted UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise RowDefect("", f"got no JSON ({_brief(error)}); wanted one object a line") from None


def _narrowed(record: Any, known: frozenset[str], beside: frozenset[str]) -> Any:
    """A record without what is never looked at, such as images; its names stay. All, if none known.

    What may not stand beside a conversation is only ever asked whether it is there.
    """
    if not known or not isinstance(record, dict):
        return record
    told = {name: is_filled(record[name]) or None for name in beside if name in record}
    return {name: told.get(name, one) if name in known else None for name, one in record.items()}


def own(value: Any) -> Any:
    """A copy: an iterable may fill one record again and again, while its rows wait to be scored.

    Arrays of objects, as pandas makes of lists, become lists.
    """
    if isinstance(value, dict):
        return {name: own(held) for name, held in value.items()}
    if isinstance(value, np.ndarray) and value.dtype == object:
        value = value.tolist()
    return [own(held) for held in value] if isinstance(value, list) else value


def resolve(sources: Sources, *, without: Path | None = None) -> list[Source]:
    """The sources meant: a path, a glob, a data set, a mapping of names to these, or a list.

    No glob finds what lies in the folder `without`, where a scan keeps its own tables. Raises
    `SourceError` for what is not there, is no known kind, or comes twice.
    """
    found = list(_resolved(sources, "", without))
    if not found:
        raise SourceError("got no sources; wanted a file, a glob or a data set at least")
    names = [source.name for source in found]
    if odd := [name for name in names if not is_unicode(name)]:
        raise SourceError(
            f"got {odd[0]!a}, a name that is no UTF-8; wanted one that can be written down. "
            "Rename the file, or name it yourself: {name: path}"
        )
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise SourceError(f"got {', '.join(twice)} twice; wanted each source once")
    named: dict[Path, str] = {}
    for source in found:
        if source.path is not None:
            other = named.setdefault(source.path.resolve(), source.name)
            if other != source.name:
                raise SourceError(
                    f"got {other} and {source.name}, which are one file; wanted each source once"
                )
    return found


def _resolved(sources: Any, name: str, without: Path | None) -> Iterator[Source]:
    if isinstance(sources, str | PathLike):
        yield from _files(str(sources), name, without)
    elif isinstance(sources, Mapping):
        for key, value in sources.items():
            if not isinstance(key, str) or not key.strip():
                raise SourceError(f"got {key!r} as the name of a source; wanted text")
            yield from _resolved(value, key, without)
    elif _is_list_of_sources(sources):
        for place, value in enumerate(sources):
            yield from _resolved(value, f"rows-{place}" if _is_rows(value) else "", without)
    elif _is_rows(sources):
        _check_rows(sources)
        yield Source(name=name or "rows", kind="rows", held=sources)
    else:
        raise SourceError(
            f"got {type(sources).__name__} as a source; wanted a path, a glob, an iterable of "
            "mappings (such as a datasets.Dataset), a mapping of names to these, or a list"
        )


def _check_rows(value: Any) -> None:
    """Refuse what can be iterated and yields no rows, before each of its entries is rejected."""
    kind = type(value).__name__
    if isinstance(value, set | frozenset):
        raise SourceError(f"got a {kind} as a source, which has no order; wanted a list")
    if hasattr(value, "iterrows"):
        raise SourceError(
            f"got a {kind} as a source, which yields its columns' names; wanted mappings: give "
            "frame.to_dict('records')"
        )
    first = value[0] if isinstance(value, list | tuple) and value else None
    if isinstance(first, Mapping) and any(set(pair) <= set(first) for pair in KEYS):
        raise SourceError(
            f"got a {kind} of messages as a source; wanted rows that hold conversations: give "
            "[{'messages': chat}, ...]"
        )


def _is_rows(value: object) -> bool:
    return isinstance(value, Iterable) and not isinstance(value, str | bytes | PathLike | Mapping)


def _is_list_of_sources(value: object) -> bool:
    """A list or tuple whose first entry is itself a source, and no row."""
    if not isinstance(value, list | tuple) or not value:
        return False
    return isinstance(value[0], str | PathLike) or _is_rows(value[0])


def _files(pattern: str, name: str, without: Path | None) -> Iterator[Source]:
    if Path(pattern).is_dir():
        raise SourceError(f"got the folder {pattern}; wanted files: write {pattern}/*.jsonl")
    paths = [pattern] if Path(pattern).is_file() else _matching(pattern, without)
    if not paths:
        raise SourceError(f"got {pattern}, where there is no file; wanted a file or a glob")
    for path in paths:
        suffixes = [part.casefold() for part in Path(path).suffixes]
        packed = suffixes[-1:] == [".gz"]
        ending = (suffixes[:-1] if packed else suffixes)[-1:]
        kind = SUFFIXES.get(ending[0]) if ending else None
        if kind is None or (packed and kind == "parquet"):
            raise SourceError(
                f"got {path}; wanted a file ending in {', '.join(SUFFIXES)} (.gz after text)"
            )
        label = Path(path).as_posix() if not name or len(paths) > 1 else name
        yield Source(name=label, kind=kind, path=Path(path))


def _matching(pattern: str, without: Path | None) -> list[str]:
    paths = [path for path in glob.glob(pattern, recursive=True) if Path(path).is_file()]
    folder = None if without is None else without.resolve()
    return sorted(path for path in paths if folder not in Path(path).resolve().parents)


def _brief(error: BaseException) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__
