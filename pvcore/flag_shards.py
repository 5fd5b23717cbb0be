"""Shards: what a scan has scored, as Parquet files that are there whole or not at all.

A shard is a fixed stretch of rows, so that a resumed scan knows what is done from the names alone.
Its rejected rows are written first; the scored ones are the commit. Each file's footer holds the
fingerprint of the scan and its counts: a file that was cut short has no footer and is made again.
Disks forget single bits: between the rows and Parquet's own footer lies a checksum of all else.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pvcore.errors import FlagError
from pvcore.files import clear_drafts, write_durably
from pvcore.flag_tokens import Rejected, Scored

SCORES, REJECTED, REPLIES, UNANSWERED = "scores", "rejected", "replies", "unanswered"
FOLDERS = ("", SCORES, REJECTED, REPLIES, UNANSWERED)
KEY, SEAL, DIGEST = b"pvcore", b"pvcore sha256 ", 32
KEYS = ("id", "source", "row", "n_prompt_tokens", "n_response_tokens")
SCORE_KINDS = ("response_mean", "last_prompt_token", "difference")


@dataclass(frozen=True, slots=True, kw_only=True)
class Footer:
    """What a shard holds. `digest` is over what its rows said, `share` of the data behind it.

    `unanswered` of the scored rows were drawn into a subset and lack an own reply.
    """

    fingerprint: str
    shard: int
    scored: int
    rejected: int
    tokens: int
    digest: str
    share: float
    unanswered: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """The rows of one shard with their scores `[sample, column]`, NaN where there is none."""

    footer: Footer
    samples: Sequence[Scored]
    rejected: Sequence[Rejected]
    columns: Sequence[str]
    scores: NDArray[Any]
    unanswered: Sequence[Rejected] = ()


def score_columns(traits: Sequence[str], sites: Sequence[object]) -> list[str]:
    """The score columns in order, as in `evil/resid_post.19/response_mean`."""
    return [f"{trait}/{site}/{kind}" for trait in traits for site in sites for kind in SCORE_KINDS]


def scores_path(folder: Path, shard: int) -> Path:
    return folder / SCORES / f"part-{shard:06d}.parquet"


def rejected_path(folder: Path, shard: int) -> Path:
    return folder / REJECTED / f"part-{shard:06d}.parquet"


def unanswered_path(folder: Path, shard: int) -> Path:
    return folder / UNANSWERED / f"part-{shard:06d}.parquet"


def folder_of(out: object) -> Path:
    """The folder of a scan as it was given; an empty name would be the folder one is in."""
    if not isinstance(out, str | PathLike) or not str(out):
        raise FlagError(f"got out {out!r}; wanted the folder that the scores go to")
    return Path(out)


def prepare(folder: Path) -> None:
    """Make the folders of a scan."""
    try:
        for name in FOLDERS:
            (folder / name).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FlagError(
            f"got {folder}, where nothing can be written ({error.strerror}); wanted a folder of "
            "your own"
        ) from error


def clear(folder: Path) -> None:
    """Remove what killed writes left in a folder; only for who holds it, or others lose theirs."""
    try:
        for name in FOLDERS:
            clear_drafts(folder / name)
    except OSError as error:
        raise FlagError(
            f"got {folder}, where drafts of an earlier scan cannot be removed ({error.strerror})"
        ) from error


def write_shard(folder: Path, shard: Shard) -> None:
    """Write a shard for good: it is committed when its scores are in place."""
    number = shard.footer.shard
    try:
        for path, rows in (
            (rejected_path(folder, number), shard.rejected),
            (unanswered_path(folder, number), shard.unanswered),
        ):
            if rows:
                write_durably(path, _reasons_bytes(rows, shard.footer))
            else:
                # What an earlier attempt may have left behind.
                path.unlink(missing_ok=True)
        write_durably(scores_path(folder, number), _scores_bytes(shard))
    except OSError as error:
        raise FlagError(
            f"{scores_path(folder, number)}: cannot be written ({error.strerror}); wanted room in "
            "a folder you may write to. Make some and start again: what is done stays done"
        ) from error


def footer_of(folder: Path, shard: int) -> Footer | None:
    """The footer of a shard; None where it has to be made, or made again."""
    found = _footer(scores_path(folder, shard))
    if found is None or found.shard != shard:
        return None
    for path, count in (
        (rejected_path(folder, shard), found.rejected),
        (unanswered_path(folder, shard), found.unanswered),
    ):
        if count and _footer(path) != found:
            return None
    return found


def footers(folder: Path) -> Iterator[Footer]:
    """The footers of all whole shards, in order."""
    for path in sorted((folder / SCORES).glob("part-*.parquet")):
        number = path.stem.partition("-")[2]
        if number.isdigit() and (found := footer_of(folder, int(number))) is not None:
            yield found


def names(folder: Path) -> Iterator[tuple[str, str, int]]:
    """Id, source and row of every row in a whole shard, of the rejected ones too."""
    for footer in footers(folder):
        paths = [scores_path(folder, footer.shard)]
        if footer.rejected:
            paths.append(rejected_path(folder, footer.shard))
        for path in paths:
            table = _read(path, ["id", "source", "row"])
            yield from zip(*(column.to_pylist() for column in table.columns), strict=True)


def tables(folder: Path, shards: int, columns: Sequence[str] | None = None) -> Iterator[Any]:
    """The scored rows of a finished scan of so many shards, one by one, as pyarrow tables."""
    yield from _tables([scores_path(folder, shard) for shard in range(shards)], columns)


def rejected_tables(folder: Path, shards: int) -> Iterator[Any]:
    """The rejected rows of a finished scan, shard by shard, as pyarrow tables."""
    yield from _tables(_there(rejected_path(folder, shard) for shard in range(shards)))


def unanswered_tables(folder: Path, shards: int) -> Iterator[Any]:
    """The rows of a finished subset that were drawn and lack an own reply, as `rejected_tables`."""
    yield from _tables(_there(unanswered_path(folder, shard) for shard in range(shards)))


def _there(paths: Iterable[Path]) -> Iterator[Path]:
    """Those that exist: a shard in which nothing was rejected has no such file."""
    return (path for path in paths if path.exists())


def _tables(paths: Iterable[Path], columns: Sequence[str] | None = None) -> Iterator[Any]:
    for path in paths:
        try:
            table = _read(path, columns)
        except (OSError, ValueError) as error:
            raise FlagError(
                f"{path}: cannot be read ({' '.join(str(error).split())[:120]}); wanted a shard of "
                "a finished scan. Flag the same data again: only this shard is made anew"
            ) from error
        yield table


def _read(path: Path, columns: Sequence[str] | None = None) -> Any:
    """A shard's table. Raises `OSError` or `ValueError` for a file that is not what was written."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with pq.ParquetFile(pa.BufferReader(_verified(path))) as file:
        return file.read(columns=None if columns is None else list(columns))


def _footer(path: Path) -> Footer | None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        metadata = pq.read_metadata(pa.BufferReader(_verified(path)))
        found = Footer(**json.loads((metadata.metadata or {})[KEY]))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    rows = {REJECTED: found.rejected, UNANSWERED: found.unanswered}
    return found if metadata.num_rows == rows.get(path.parent.name, found.scored) else None


def _sealed(content: bytes) -> bytes:
    """A Parquet file with its checksum in front of its footer, where readers never look."""
    place = _footer_place(content)
    return content[:place] + SEAL + sha256(content).digest() + content[place:]


def _verified(path: Path) -> bytes:
    """The bytes of a sealed file. Raises `ValueError` where any is not what was written.

    Checked before anything is parsed: pyarrow ends the process over some spoiled footers.
    """
    content = path.read_bytes()
    place = _footer_place(content)
    start = place - len(SEAL) - DIGEST
    plain = sha256(content[: max(start, 0)])
    plain.update(content[place:])
    if start < 0 or content[start:place] != SEAL + plain.digest():
        raise ValueError("it was cut short, or bytes of it are not those that were written")
    return content


def _footer_place(content: bytes) -> int:
    """Where Parquet's footer begins: its length stands in front of the last four bytes."""
    return max(len(content) - 8 - int.from_bytes(content[-8:-4], "little"), 0)


def _scores_bytes(shard: Shard) -> bytes:
    import pyarrow as pa

    samples = shard.samples
    arrays: dict[str, Any] = {
        "id": pa.array([one.id for one in samples], pa.string()),
        "source": pa.array([one.source for one in samples], pa.string()),
        "row": pa.array([one.row for one in samples], pa.int64()),
        "n_prompt_tokens": pa.array([one.prompt_length for one in samples], pa.int32()),
        "n_response_tokens": pa.array([b - a for a, b in (s.reply for s in samples)], pa.int32()),
    }
    for at, name in enumerate(shard.columns):
        values = np.ascontiguousarray(shard.scores[:, at])
        arrays[name] = pa.array(values, mask=np.isnan(values))
    return _parquet(pa.table(arrays), shard.footer)


def _reasons_bytes(reasons: Sequence[Rejected], footer: Footer) -> bytes:
    import pyarrow as pa

    names = ("id", "source", "row", "field", "reason")
    rows: list[Mapping[str, Any]] = [asdict(one) for one in reasons]
    kinds = [pa.int64() if name == "row" else pa.string() for name in names]
    arrays = {
        name: pa.array([_writable(row[name]) for row in rows], kind)
        for name, kind in zip(names, kinds, strict=True)
    }
    return _parquet(pa.table(arrays), footer)


def _writable(value: str | int) -> str | int:
    """A reason may quote what no file can hold."""
    return value.encode(errors="replace").decode() if isinstance(value, str) else value


def _parquet(table: Any, footer: Footer) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    held = json.dumps(asdict(footer)).encode()
    sink = pa.BufferOutputStream()
    pq.write_table(table.replace_schema_metadata({KEY: held}), sink, compression="zstd")
    return _sealed(bytes(sink.getvalue()))
