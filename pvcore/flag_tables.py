"""Tables of training data: CSV and Parquet, read by pyarrow batch by batch.

Readers yield `(row, record or RowDefect, share of the file behind it)`, and raise `ValueError` or
`OSError` for a file that cannot be read on.
"""

import gzip
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pvcore.flag_rows import RowDefect

ROWS = 512
# No row of a CSV may be longer: the reader would take it for two.
BLOCK = 1 << 23
# Bytes of a Parquet file that are unpacked together, and those read at once of a column.
BATCH, BUFFER = 1 << 22, 1 << 20
# Where a quoted cell begins, what it holds up to its last quote, and what may follow that.
OPENING = re.compile(rb'(?:^(?:\xef\xbb\xbf)?|(?<=[,\r]))"')
CELL = re.compile(rb'[^"]*(?:""[^"]*)*')
AFTER_CELL = (b"", b",", b"\r", b"\n")
ENCODING_MARKS = (b"\xff\xfe", b"\xfe\xff")

Found = Iterator[tuple[int, Any, float]]


def csv_rows(path: Path, known: frozenset[str]) -> Found:
    """Rows under a header, every cell as text; rows count from 0 below the header."""
    names = _header(path)
    if names is None:
        return
    for row, record, share in _csv_records(path, names, _wanted(names, known)):
        yield row, record if isinstance(record, RowDefect) else _as_text(record), share


def csv_cells(path: Path) -> Iterator[tuple[int, list[bytes] | None]]:
    """The header as row -1 and every row, each cell as its bytes, for a copy of the file.

    None stands for a row that is no row of this table.
    """
    names = _header(path)
    if names is None:
        return
    yield -1, [name.encode() for name in names]
    for row, record, _ in _csv_records(path, names, names):
        yield row, None if isinstance(record, RowDefect) else list(record.values())


def _csv_records(path: Path, names: list[str], wanted: list[str]) -> Found:
    import pyarrow as pa
    from pyarrow import csv

    misfits: dict[int, RowDefect] = {}

    def note(row: Any) -> str:
        misfits[row.number] = RowDefect(
            "", f"got {row.actual_columns} cells; wanted {row.expected_columns}"
        )
        return "skip"

    check_quotes(path)
    size = max(path.stat().st_size, 1)
    with path.open("rb") as raw:
        stream = gzip.GzipFile(fileobj=raw) if path.suffix.casefold() == ".gz" else raw
        reader = csv.open_csv(
            stream,
            read_options=csv.ReadOptions(use_threads=False, block_size=BLOCK),
            parse_options=csv.ParseOptions(newlines_in_values=True, invalid_row_handler=note),
            convert_options=csv.ConvertOptions(
                column_types={name: pa.binary() for name in names},
                include_columns=wanted,
                strings_can_be_null=False,
            ),
        )
        with reader:
            row = 0
            for batch in reader:
                share = raw.tell() / size
                for record in batch.to_pylist():
                    while row + 2 in misfits:  # the reader counts from 1, and the header too
                        yield row, misfits.pop(row + 2), share
                        row += 1
                    yield row, record, share
                    row += 1
            for number in sorted(misfits):
                yield number - 2, misfits[number], 1.0


def parquet_rows(path: Path, known: frozenset[str]) -> Found:
    """Rows of all row groups in order."""
    import pyarrow.parquet as pq

    # Otherwise every column of a row group would be held whole.
    with pq.ParquetFile(path, pre_buffer=False, buffer_size=BUFFER) as file:
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

    packed = path.suffix.casefold() == ".gz"
    with gzip.open(path, "rb") if packed else path.open("rb") as file:
        first = file.readline(BLOCK)
        if not first:
            return None
        if first.startswith(ENCODING_MARKS):
            raise ValueError("it begins as UTF-16, not as UTF-8 text")
        text = first.decode("utf-8-sig")
    try:
        names = next(lines.reader([text]), [])
    except lines.Error as error:
        raise ValueError(
            f"its header is no line of a CSV: {error}; wanted lines that end in LF or CRLF"
        ) from error
    _each_once(names)
    return names


def check_quotes(path: Path) -> None:
    """Raises `ValueError` for a quote that nothing closes: readers take all behind it for one cell.

    Such a quote ends with the file, or within a line further down, where another cell's begins.
    """
    packed = path.suffix.casefold() == ".gz"
    opened = 0  # the line of the quote that is open
    with gzip.open(path, "rb") if packed else path.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(BLOCK + 1), b""), start=1):
            if len(line) > BLOCK:
                raise ValueError(f"line {number} is longer than {BLOCK} bytes")
            at = 0
            while at < len(line):
                if not opened:
                    found = OPENING.search(line, at)
                    at, opened = (found.end(), number) if found else (len(line), 0)
                    continue
                held = CELL.match(line, at)
                at = held.end() + 1 if held else len(line)
                if at > len(line):
                    break  # the cell goes on in the next line
                if opened < number and line[at : at + 1] not in AFTER_CELL:
                    raise ValueError(f"the quote opened in line {opened} ends amid line {number}")
                opened = 0
    if opened:
        raise ValueError(f"the quote opened in line {opened} is never closed")


def _each_once(names: list[str]) -> None:
    if len(set(names)) != len(names):
        raise ValueError(f"got columns {', '.join(names)[:120]}; wanted each name once")


def _wanted(names: list[str], known: frozenset[str]) -> list[str]:
    wanted = [name for name in names if name in known]
    if not wanted:
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
