"""Files: written whole or not at all."""

import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Long files are written in pieces, so that no single call holds the whole of one.
PIECE = 1 << 20
DRAFT = re.compile(r"\..+\.[0-9a-f]{16}\.tmp")


def text_lines(path: Path) -> list[str]:
    """The lines of a UTF-8 file, without a byte order mark.

    Only line breaks end one: `str.splitlines` also cuts at U+2028 and others that text may hold.
    Raises `OSError` or `UnicodeDecodeError`.
    """
    return path.read_text(encoding="utf-8-sig").split("\n")


def write_whole(path: Path, content: bytes) -> None:
    """Write beside `path` and move it there, so that no reader ever meets half a file.

    Raises `OSError` with nothing changed at `path`.
    """
    draft = _draft(path)
    try:
        with draft.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def write_durably(path: Path, content: bytes) -> None:
    """Like `write_whole`, and once it returns not even a power cut takes the file back.

    The rename itself is on the disk only when the folder is.
    """
    with written_durably(path) as draft:
        file = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        try:
            view = memoryview(content)
            while view:
                view = view[os.write(file, view[:PIECE]) :]
        finally:
            os.close(file)


@contextmanager
def written_durably(path: Path) -> Iterator[Path]:
    """Like `write_durably` for what is written bit by bit: gives the draft that becomes `path`."""
    draft = _draft(path)
    try:
        yield draft
        with draft.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(draft, path)
        sync_folder(path.parent)
    finally:
        draft.unlink(missing_ok=True)


def _draft(path: Path) -> Path:
    # The same folder keeps the rename within one file system, where it is atomic.
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")


def sync_folder(folder: Path) -> None:
    """Bring a folder's names to the disk, where the system can (Windows keeps them by itself)."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def clear_drafts(folder: Path) -> None:
    """Remove what writes that were killed have left behind in a folder; no other hidden file."""
    for draft in folder.glob(".*.tmp"):
        if DRAFT.fullmatch(draft.name):
            draft.unlink(missing_ok=True)
