"""Sources of training data: files and data sets, read row by row in bounded memory.

A row is handed on as it lies in its source, so that rows that were done before cost next to
nothing; `decode` makes the record of one. A row that cannot be read is a `RowDefect` in its place;
a file that cannot be read on is one `SourceError`.
"""

import glob
import json
import os
import stat
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pvcore.errors import SourceError
from pvcore.flag_blanks import is_filled
from pvcore.flag_lines import json_lines, line_pieces
from pvcore.flag_rows import BESIDE, Form, RowDefect, each_once, is_unicode
from pvcore.flag_shapes import (
    SUFFIXES,
    Kind,
    brief,
    check_rows,
    is_data,
    is_list_of_sources,
    is_row,
    is_rows,
)
from pvcore.flag_tables import csv_bytes, csv_rows, header, parquet_rows

Sources = str | PathLike[str] | Iterable[Any] | Mapping[str, Any]
Standing = tuple[int, int, int] | None
# No conversation is, and calls in calls end somewhere.
DEEPEST = 100


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

    def columns(self) -> list[str] | None:
        """The names of all columns; None where only the rows say them, or there are none."""
        if self.path is None:
            names = getattr(self.held, "column_names", None)
            return names if isinstance(names, list) else None
        found = self._told(header(self.path)) if self.kind in ("csv", "parquet") else iter(())
        return next((names for _, names in found), None)

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
                f"{self.name}: cannot be read after row {row} ({brief(error)}); wanted a whole "
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
                    f"{self.name}: reading it raised {type(error).__name__}: {brief(error)}; "
                    "wanted an iterable of mappings. Mend it, or leave it out"
                ) from error
            if row == 0 and not (isinstance(record, RowDefect | None) or is_row(record)):
                plain = "; data.with_format(None) gives them" if is_data(self.held) else ""
                raise SourceError(
                    f"{self.name}: got a {type(self.held).__name__} of {type(record).__name__}; "
                    f"wanted mappings{plain}, or a list where paths or data sets are meant"
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
                f"{self.name}: cannot be read ({brief(error)}); wanted a file you may read"
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
        raise RowDefect("", f"got no JSON ({brief(error)}); wanted one object a line") from None


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

    Arrays of objects, as pandas makes of lists, become lists. A row that is nested deeper than any
    conversation, or holds itself, becomes its own defect.
    """
    try:
        return _copied(value, DEEPEST)
    except RowDefect as defect:
        return defect


def _copied(value: Any, deep: int) -> Any:
    if not deep:
        raise RowDefect("", f"got objects nested more than {DEEPEST} deep; wanted text")
    if isinstance(value, dict):
        return {name: _copied(held, deep - 1) for name, held in value.items()}
    if isinstance(value, np.ndarray) and value.dtype == object:
        value = value.tolist()
    return [_copied(held, deep - 1) for held in value] if isinstance(value, list) else value


def resolve(sources: Sources, *, without: Path | None = None) -> list[Source]:
    """The sources meant: a path, a glob, a data set, a mapping of names to these, or a list.

    A file is called by its path, one data set `rows`, one at place 2 of a list `rows-2`. In a
    mapping what holds one thing is called by its name, as in `{"good": "d/*.jsonl"}` where one
    file matches. Of more each has a name that begins with it: `good/a.jsonl`, a file's path from
    the folder that all of them lie in; `good/2`, a data set's place; `good/mine` in a mapping.

    No glob finds what lies in the folder `without`, where a scan keeps its own tables. Raises
    `SourceError` for what is not there, is no known kind, or comes twice.
    """
    found = list(_resolved(sources, without))
    if not found:
        raise SourceError("got no sources; wanted a file, a glob or a data set at least")
    names = Counter(source.name for source in found)
    if odd := [name for name in names if not is_unicode(name)]:
        raise SourceError(
            f"got {odd[0]!a}, a name that is no UTF-8; wanted one that can be written down. "
            "Rename the file, or name it yourself: {name: path}"
        )
    twice = sorted(name for name, count in names.items() if count > 1)
    if twice:
        raise SourceError(
            f"got {', '.join(twice)} twice; wanted each source once, under a name of its own"
        )
    named: dict[Path, str] = {}
    for source in found:
        if source.path is not None:
            other = named.setdefault(source.path.resolve(), source.name)
            if other != source.name:
                raise SourceError(
                    f"got {other} and {source.name}, which are one file; wanted each source once"
                )
    return found


def check_columns(sources: Sequence[Source], form: Form) -> None:
    """Raise `SourceError` where a column that the form names is none of a table's."""
    wanted = [name for name in (form.prompt, form.answer) if name]
    for source in sources if wanted else ():
        names = source.columns()
        if lost := [name for name in wanted if names is not None and name not in names]:
            raise SourceError(
                f"{source.name}: got {lost[0]!r} as a column's name; it has {brief(names)}. Name "
                "two of these, or none where rows hold messages or a known pair"
            )


def _resolved(
    sources: Any, without: Path | None, name: str = "rows", among: str = "rows-"
) -> Iterator[Source]:
    """The sources; a data set is called `name`, or in a list by its place behind `among`."""
    if isinstance(sources, str | PathLike):
        yield from _files(str(sources), without)
    elif isinstance(sources, Mapping):
        for key, value in sources.items():
            if not isinstance(key, str) or not key.strip():
                raise SourceError(f"got {key!r} as the name of a source; wanted text")
            yield from _named(key, value, without)
    elif is_list_of_sources(sources):
        for place, value in enumerate(sources):
            yield from _resolved(value, without, f"{among}{place}", among)
    elif is_rows(sources):
        check_rows(sources)
        yield Source(name=name, kind="rows", held=sources)
    else:
        raise SourceError(
            f"got {type(sources).__name__} as a source; wanted a path, a glob, an iterable of "
            "mappings (such as a datasets.Dataset), a mapping of names to these, or a list"
        )


def _named(name: str, value: Any, without: Path | None) -> Iterator[Source]:
    """What a mapping holds under a name: of that name, or of names that begin with it."""
    found = list(_resolved(value, without, among=""))
    if len(found) == 1 and not isinstance(value, Mapping):
        yield replace(found[0], name=name)
        return
    whole = [os.path.abspath(one.path) for one in found if one.path is not None]
    folder = os.path.commonpath([os.path.dirname(path) for path in whole]) if whole else ""
    for one in found:
        tail = one.name
        if one.path is not None and tail == one.path.as_posix():
            tail = Path(os.path.relpath(one.path, folder)).as_posix()
        yield replace(one, name=f"{name}/{tail}")


def _files(pattern: str, without: Path | None) -> Iterator[Source]:
    there = _look(pattern)
    if there == "folder":
        raise SourceError(f"got the folder {pattern}; wanted files: write {pattern}/*.jsonl")
    paths = [pattern] if there == "file" else _matching(pattern, without)
    if not paths:
        raise SourceError(f"got {brief(pattern)}, where there is no file; wanted a file or a glob")
    for path in paths:
        suffixes = [part.casefold() for part in Path(path).suffixes]
        packed = suffixes[-1:] == [".gz"]
        ending = (suffixes[:-1] if packed else suffixes)[-1:]
        kind = SUFFIXES.get(ending[0]) if ending else None
        if kind is None or (packed and kind == "parquet"):
            raise SourceError(
                f"got {path}; wanted a file ending in {', '.join(SUFFIXES)} (.gz after text)"
            )
        yield Source(name=Path(path).as_posix(), kind=kind, path=Path(path))


def _look(path: str) -> Literal["file", "folder", ""]:
    """What lies at a path. Raises `SourceError` where that cannot be looked up."""
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return ""
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise SourceError(
            f"got {brief(path)}, which cannot be looked up ({why}); wanted the path of a file, or "
            "a glob, in a folder you may read"
        ) from error
    return "file" if stat.S_ISREG(mode) else "folder" if stat.S_ISDIR(mode) else ""


def _matching(pattern: str, without: Path | None) -> list[str]:
    folder = None if without is None else without.resolve()
    # Of a link that leads nowhere or in a circle too, which `Path.resolve` refuses.
    found = [
        path
        for path in sorted(glob.glob(pattern, recursive=True))
        if folder not in Path(os.path.realpath(path)).parents
    ]
    kinds = {path: _look(path) for path in found}
    if lost := next((path for path, kind in kinds.items() if not kind), None):
        raise SourceError(
            f"got {pattern}, which matches {lost}, where there is no file (a broken link?); wanted "
            "files alone. Mend or remove it"
        )
    return [path for path, kind in kinds.items() if kind == "file"]
