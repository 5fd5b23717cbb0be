"""Lines of training data: JSON lines, plain or packed, of which none is ever held too long.

Raises `ValueError` or `OSError` for a file that cannot be read on.
"""

import gzip
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pvcore.flag_rows import RowDefect
from pvcore.flag_tables import BOM

LONGEST_LINE = 1 << 24
# The start of a file in another encoding, which would otherwise be a million defective rows.
MARKS = {
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
    b"PK": "a zip archive",
    b"\x1f\x8b": "gzip (name it .gz)",
}


def json_lines(path: Path, known: frozenset[str]) -> Iterator[tuple[int, Any, float]]:
    """Every line that is not blank: its number, its bytes or `RowDefect`, and its share."""
    size = max(path.stat().st_size, 1)
    with path.open("rb") as raw:
        packed = path.suffix.casefold() == ".gz"
        stream = gzip.GzipFile(fileobj=raw) if packed else raw
        for row, begins, line in _bounded_lines(stream):
            content: Any = line if row or not begins else _checked_start(line)
            if not begins or _is_blank(content):
                continue
            if len(content) > LONGEST_LINE:
                content = RowDefect("", f"got a line over {LONGEST_LINE} bytes; wanted less")
            yield row, content, raw.tell() / size


def line_pieces(path: Path) -> Iterator[tuple[int, bytes]]:
    """The same lines as they lie in the file, for a copy of it: a long one in several pieces."""
    packed = path.suffix.casefold() == ".gz"
    with gzip.open(path, "rb") if packed else path.open("rb") as stream:
        wanted = True
        for row, begins, piece in _bounded_lines(stream):
            if begins:
                wanted = not _is_blank(piece if row else piece.removeprefix(BOM))
            if wanted:
                yield row, piece


def _bounded_lines(stream: Any) -> Iterator[tuple[int, bool, bytes]]:
    """Lines under their number; one that is too long in pieces, of which one begins it."""
    row, begins = -1, True
    while piece := stream.readline(LONGEST_LINE + 1):
        row += begins
        yield row, begins, piece
        begins = piece.endswith(b"\n")


def _is_blank(line: bytes) -> bool:
    return len(line) <= LONGEST_LINE and not line.strip()


def _checked_start(line: bytes) -> bytes:
    for mark, what in MARKS.items():
        if line.startswith(mark):
            raise ValueError(f"it begins as {what}, not as UTF-8 text")
    line = line.removeprefix(BOM)
    if line.lstrip().startswith(b"["):
        raise ValueError("it begins with a JSON array; one object a line is wanted")
    return line
