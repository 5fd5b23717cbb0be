"""Tables of training data: CSV and Parquet, read by pyarrow batch by batch.

Readers yield `(row, record or RowDefect, share of the file behind it)`, and raise `ValueError` or
`OSError` for a file that cannot be read on.
"""

import gzip
import re
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from itertools import zip_longest
from pathlib import Path
from typing import Any

from pvcore.errors import FlagError
from pvcore.flag_rows import ASIDE, RowDefect

ROWS = 512
# No row of a CSV may be longer: the reader would take it for two.
BLOCK = 1 << 23
# Bytes of a Parquet file that are unpacked together, and those read at once of a column.
BATCH, BUFFER = 1 << 22, 1 << 20
# Where a quoted cell begins, what it holds up to its last quote, and what may follow that.
OPENING = re.compile(rb'(?:^(?:\xef\xbb\xbf)?|(?<=[,\r]))"')
CELL = re.compile(rb'[^"]*(?:""[^"]*)*')
AFTER_CELL = (b"", b",", b"\r", b"\n")
ROW_END = re.compile(rb"\r\n?|\n")
BOM = b"\xef\xbb\xbf"
ENCODING_MARKS, PACKED = (b"\xff\xfe", b"\xfe\xff"), b"\x1f\x8b"

Found = Iterator[tuple[int, Any, float]]


def header(path: Path) -> Iterator[tuple[int, list[str]]]:
    """The names of a table's columns, as row -1; nothing of an empty file."""
    import pyarrow.parquet as pq

    if path.suffix.casefold() == ".parquet":
        with arrow_errors():
            yield -1, pq.read_schema(path).names
    elif (names := _header(path)) is not None:
        yield -1, names


def csv_rows(path: Path, known: frozenset[str]) -> Found:
    """Rows under a header, every cell as text; rows count from 0 below the header."""
    names = _header(path)
    if names is None:
        return
    for row, record, share in _csv_records(path, names, _wanted(names, known)):
        yield row, record if isinstance(record, RowDefect) else _as_text(record), share


def csv_bytes(path: Path) -> Iterator[tuple[int, bytes]]:
    """The header as row -1 and every row, as they lie in the file, for a copy of it."""
    names = _header(path)
    if names is None:
        return
    with closing(csv_lines(path)) as lines:
        yield -1, next(lines)
        # Read as it was scored, too: a row that counts otherwise here would be another row.
        records = _csv_records(path, names, names[:1])
        for row, (line, record) in enumerate(zip_longest(lines, records)):
            if line is None or record is None:
                raise FlagError(
                    f"got {path}, where it is not plain which bytes are row {row}; wanted rows "
                    "that all readers tell apart alike. Write the table anew, and flag that"
                )
            yield row, line


def _csv_records(path: Path, names: list[str], wanted: list[str]) -> Found:
    """Records in order, their cells as bytes."""
    # A row that does not fit the reader notes in UTF-8, and gives up where it is none. Latin-1 has
    # a character for every byte.
    as_latin = not check_rows(path)
    misfits: dict[int, RowDefect] = {}
    size = max(path.stat().st_size, 1)
    with path.open("rb") as raw, arrow_errors():
        stream: Any = gzip.GzipFile(fileobj=raw) if path.suffix.casefold() == ".gz" else raw
        reader = _csv_reader(stream, names, wanted, misfits, as_latin)
        with reader:
            row = 0
            for batch in reader:
                share = raw.tell() / size
                for record in batch.to_pylist():
                    while row + 2 in misfits:  # the reader counts from 1, and the header too
                        yield row, misfits.pop(row + 2), share
                        row += 1
                    yield row, _from_latin(record) if as_latin else record, share
                    row += 1
            for number in sorted(misfits):
                yield number - 2, misfits[number], 1.0


def _csv_reader(
    stream: Any, names: list[str], wanted: list[str], misfits: dict[int, RowDefect], as_latin: bool
) -> Any:
    import pyarrow as pa
    from pyarrow import csv

    def note(row: Any) -> str:
        misfits[row.number] = RowDefect(
            "", f"got {row.actual_columns} cells; wanted {row.expected_columns}"
        )
        return "skip"

    if as_latin:
        if stream.read(len(BOM)) != BOM:
            stream.seek(0)
        names, wanted = (
            [name.encode().decode("latin-1") for name in some] for some in (names, wanted)
        )
    return csv.open_csv(
        stream,
        read_options=csv.ReadOptions(
            use_threads=False, block_size=BLOCK, encoding="latin-1" if as_latin else "utf8"
        ),
        parse_options=csv.ParseOptions(newlines_in_values=True, invalid_row_handler=note),
        convert_options=csv.ConvertOptions(
            column_types={name: pa.binary() for name in names},
            include_columns=wanted,
            strings_can_be_null=False,
        ),
    )


def _from_latin(record: dict[str, bytes]) -> dict[str, bytes]:
    return {
        name.encode("latin-1").decode(): cell.decode().encode("latin-1")
        for name, cell in record.items()
    }


@contextmanager
def arrow_errors() -> Iterator[None]:
    """As `ValueError` what pyarrow raises as errors of its own."""
    import pyarrow as pa

    try:
        yield
    except pa.ArrowException as error:
        if isinstance(error, ValueError | OSError):
            raise
        raise ValueError(str(error)) from error


def parquet_rows(path: Path, known: frozenset[str]) -> Found:
    """Rows of all row groups in order."""
    import pyarrow.parquet as pq

    # Otherwise every column of a row group would be held whole.
    with arrow_errors(), pq.ParquetFile(path, pre_buffer=False, buffer_size=BUFFER) as file:
        total = max(file.metadata.num_rows, 1)
        wanted = _wanted(file.schema_arrow.names, known)
        _each_once(file.schema_arrow.names)
        row = 0
        for batch in parquet_batches(file, wanted):
            for record in _records(batch):
                yield row, record, (row + 1) / total
                row += 1


def parquet_batches(file: Any, columns: list[str] | None = None) -> Iterator[Any]:
    """A Parquet file in batches of some hundred rows, of fewer where rows are long.

    What its writer put on one page, a thousand rows at most, is unpacked together all the same.
    """
    for number in range(file.num_row_groups):
        group = file.metadata.row_group(number)
        rows = BATCH * group.num_rows // max(group.total_byte_size, 1)
        yield from file.iter_batches(
            batch_size=max(1, min(ROWS, rows)),
            row_groups=[number],
            columns=columns,
            use_threads=False,
        )


def _records(batch: Any) -> Iterator[Any]:
    try:
        yield from batch.to_pylist()
        return
    except UnicodeDecodeError:
        pass
    for place in range(batch.num_rows):
        try:
            yield batch.slice(place, 1).to_pylist()[0]
        except UnicodeDecodeError as error:
            yield RowDefect("", f"got a byte at {error.start} that is no UTF-8; wanted UTF-8")


def _header(path: Path) -> list[str] | None:
    """The names of a CSV's columns; None for an empty file."""
    import csv as lines

    with closing(csv_lines(path)) as rows:
        first = next(rows, None)
    if first is None:
        return None
    if first.endswith(b"\r"):
        raise ValueError("its header ends in a bare CR; wanted lines that end in LF or CRLF")
    try:
        names = next(lines.reader([first.decode("utf-8-sig")]), [])
    except lines.Error as error:
        raise ValueError(f"its header is no line of a CSV: {error}") from error
    _each_once(names)
    return names


def check_rows(path: Path) -> bool:
    """Whether every row is UTF-8.

    Raises `ValueError` for a quote that nothing closes: readers take all behind it for one cell.
    Such a quote ends with the file, or within a line further down, where another cell's begins.
    """
    sound = True
    for row in csv_lines(path):
        sound = sound and (row.isascii() or _is_utf8(row))
    return sound


def _is_utf8(row: bytes) -> bool:
    try:
        row.decode()
    except UnicodeDecodeError:
        return False
    return True


def csv_lines(path: Path) -> Generator[bytes, None, None]:
    """Every row as it lies in the file, the header first; blank lines are no rows.

    Raises `ValueError` for a row longer than any reader takes, and as `check_rows`.
    """
    packed = path.suffix.casefold() == ".gz"
    opened = size = 0  # the line of the quote that is open, and the bytes of the row so far
    row: list[bytes] = []
    with gzip.open(path, "rb") if packed else path.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(BLOCK + 1), b""), start=1):
            if number == 1 or len(line) > BLOCK or size > 2 * BLOCK:
                _check_line(number, line, size)
            at = start = 0
            while at < len(line):
                if not opened:
                    found = OPENING.search(line, at)
                    stop = found.start() if found else len(line)
                    for end in ROW_END.finditer(line, at, stop):
                        yield from _whole(row, line[start : end.end()])
                        start = end.end()
                    at, opened = (found.end(), number) if found else (stop, 0)
                    continue
                held = CELL.match(line, at)
                at = held.end() + 1 if held else len(line)
                if at > len(line):
                    break  # the cell goes on in the next line
                if opened < number and line[at : at + 1] not in AFTER_CELL:
                    raise ValueError(f"the quote opened in line {opened} ends amid line {number}")
                opened = 0
            row.append(line[start:])
            size = len(line) - start + (0 if start else size)
    if opened:
        raise ValueError(f"the quote opened in line {opened} is never closed")
    yield from _whole(row, b"")


def _check_line(number: int, line: bytes, before: int) -> None:
    if number == 1 and line.startswith(ENCODING_MARKS):
        raise ValueError("it begins as UTF-16, not as UTF-8 text")
    if number == 1 and line.startswith(PACKED):
        raise ValueError("it begins as gzip (name it .gz), not as UTF-8 text")
    if len(line) > BLOCK:
        raise ValueError(f"line {number} is longer than {BLOCK} bytes")
    if before > 2 * BLOCK:
        raise ValueError(f"the row that goes on in line {number} is longer than {2 * BLOCK} bytes")


def _whole(begun: list[bytes], rest: bytes) -> Iterator[bytes]:
    row = b"".join([*begun, rest])
    begun.clear()
    if row.strip(b"\r\n"):
        yield row


def _each_once(names: list[str]) -> None:
    if len(set(names)) != len(names):
        raise ValueError(f"got columns {', '.join(names)[:120]}; wanted each name once")


def _wanted(names: list[str], known: frozenset[str]) -> list[str]:
    wanted = [name for name in names if name in known]
    if not set(wanted) - ASIDE:
        raise ValueError(
            f"got columns {', '.join(names)[:120]}; wanted messages, or a pair such as prompt and "
            "response"
        )
    return wanted


def _as_text(record: dict[str, bytes]) -> Any:
    found = {}
    for name, cell in record.items():
        try:
            found[name] = cell.decode("utf-8")
        except UnicodeDecodeError as error:
            return RowDefect(
                name, f"got a byte at {error.start} that is no UTF-8; wanted text in UTF-8"
            )
    return found
