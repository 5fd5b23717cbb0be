"""Answers: what was asked and paid for, kept in one file that only grows."""

import json
import os
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path

from pvcore.errors import AnswersError

Record = Mapping[str, object]
_BEGINNING = b'{"pvcore_answer": '


class Answers:
    """Answers by the hash of their question; on disk where a path is given, else in memory.

    The file holds one JSON object a line and is only ever appended to, each line by one write that
    reaches the disk before the call returns. A line that a kill cut short is passed over when the
    file is read, and the next one begins on a line of its own. Several processes may share a file;
    each sees what was there when it began. `AnswersError` for a file that is something else.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        self._path = None if path is None else Path(path)
        self._known: dict[str, Record] = {}
        if self._path is not None and self._path.exists():
            self._known.update(_read(self._path))

    def __len__(self) -> int:
        return len(self._known)

    def get(self, key: str) -> Record | None:
        return self._known.get(key)

    def put(self, key: str, answer: Record) -> None:
        """Keep an answer; raises `AnswersError` where it cannot be written."""
        if self._path is not None:
            _append(self._path, {"pvcore_answer": key, "answer": dict(answer)})
        self._known[key] = answer


def key_of(question: Record) -> str:
    """The hash that names a question: the same for the same content, whatever its order."""
    return sha256(json.dumps(question, sort_keys=True).encode()).hexdigest()


def _append(path: Path, record: Record) -> None:
    # A newline on both sides: what a kill left of an earlier line can't run into this one.
    line = b"\n" + json.dumps(record).encode() + b"\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            written = os.write(file, line)
            os.fsync(file)
        finally:
            os.close(file)
    except OSError as error:
        raise AnswersError(
            f"{path}: an answer cannot be kept ({error.strerror}); wanted a file in a folder that "
            "can be written, with room. Make some, or give another path"
        ) from error
    if written < len(line):
        raise AnswersError(
            f"{path}: an answer was kept in part ({written} of {len(line)} bytes); wanted room "
            "for it. Make some on the disk"
        )


def _read(path: Path) -> dict[str, Record]:
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise AnswersError(
            f"{path}: cannot be read ({error.strerror}); wanted a file of answers, or none. "
            "Give another path"
        ) from error
    known: dict[str, Record] = {}
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        if not (line.startswith(_BEGINNING) or _BEGINNING.startswith(line)):
            raise AnswersError(
                f"{path}: line {number} is no answer kept by pvcore; wanted a file of answers, or "
                "none. Give another path: nothing was written to this one"
            )
        if (kept := _kept(line)) is not None:
            known[kept[0]] = kept[1]
    return known


def _kept(line: bytes) -> tuple[str, Record] | None:
    """The key and answer of a line; None for a line that was cut short."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    key, answer = record.get("pvcore_answer"), record.get("answer")
    return (key, answer) if isinstance(key, str) and isinstance(answer, dict) else None
