"""A judge that looks up what people said: scores from a CSV file."""

import csv
import os
from collections.abc import Iterable, Mapping
from hashlib import sha256
from io import StringIO
from pathlib import Path

from pvcore.errors import JudgeFailure, TraitError

_TEXTS = ("question", "answer")
_COHERENCE = "coherence"
Row = Mapping[str, str]


class HumanJudge:
    """Gives the scores that people wrote into a CSV file (UTF-8, comma-separated, a header).

    Columns: `question`, `answer`, `coherence`, and one for each trait under its name. Question and
    answer are compared as they are, but for spaces at their ends and kinds of line end. A pair
    without a row, and a cell that is no number from 0 to 100, is a `JudgeFailure` when asked for;
    so is, at once, a file that lacks a column or holds one pair twice with other scores.
    """

    method = "human"

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(path)
        content, header, rows = _read(self._path)
        self._identity = sha256(content).hexdigest()[:16]
        self._traits = tuple(name for name in header if name not in (*_TEXTS, _COHERENCE))
        self._rows: dict[tuple[str, str], tuple[int, Row]] = {}
        for number, row in rows:
            key = _key(row["question"], row["answer"])
            earlier, same = self._rows.setdefault(key, (number, row))
            scored = (*self._traits, _COHERENCE)
            if any(row[name].strip() != same[name].strip() for name in scored):
                raise JudgeFailure(
                    f"{path}: row {number} scores the pair of row {earlier} otherwise; wanted one "
                    "judgement for each pair. Settle on one"
                )

    @property
    def identity(self) -> str:
        """What decides its scores: the file as it was read."""
        return self._identity

    def trait(self, trait: str, question: str, answer: str) -> float:
        """What was written in the column of the trait."""
        if trait not in self._traits:
            raise TraitError(
                f"got trait {trait!r}; {self._path} has columns for "
                f"{', '.join(self._traits) or 'no trait'}. Add a column under its name"
            )
        return self._score(trait, question, answer)

    def coherence(self, question: str, answer: str) -> float:
        """What was written in the column `coherence`."""
        return self._score(_COHERENCE, question, answer)

    def _score(self, column: str, question: str, answer: str) -> float:
        found = self._rows.get(_key(question, answer))
        if found is None:
            raise JudgeFailure(
                f"{self._path}: has no row for the question {question[:60]!r} and the answer "
                f"{answer[:60]!r}; wanted one. Have it judged"
            )
        number, row = found
        try:
            score = float(row[column].replace("_", "?"))  # to Python 1_0 is a ten
        except ValueError:
            score = -1.0
        if not 0 <= score <= 100:
            raise JudgeFailure(
                f"{self._path}: row {number}, column {column!r}: got {row[column]!r}; wanted a "
                "number from 0 to 100. Correct the cell"
            )
        return score


def _key(question: str, answer: str) -> tuple[str, str]:
    return _plain(question), _plain(answer)


def _plain(text: str) -> str:
    # Spreadsheets change line ends and trim cells when they save.
    return text.replace("\r\n", "\n").replace("\r", "\n").strip()


def _read(path: Path) -> tuple[bytes, tuple[str, ...], Iterable[tuple[int, Row]]]:
    """The file, its header, and the rows by their numbers as a spreadsheet counts, from 2."""
    try:
        content = path.read_bytes()
        text = StringIO(content.decode("utf-8-sig"), newline="")
        lines = [line for line in csv.reader(text, strict=True) if line]
    except OSError as error:
        raise JudgeFailure(
            f"{path}: cannot be read ({error.strerror}); wanted a CSV file of judgements. "
            "Check the path"
        ) from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise JudgeFailure(
            f"{path}: got text that is no CSV in UTF-8 ({error}); wanted a CSV file of "
            "judgements. Save it as one"
        ) from error
    header = tuple(name.strip() for name in lines[0]) if lines else ()
    missing = [name for name in (*_TEXTS, _COHERENCE) if name not in header]
    if missing or len(set(header)) < len(header) or "" in header:
        raise JudgeFailure(
            f"{path}: got the columns {', '.join(map(repr, header)) or 'none'}; wanted question, "
            "answer, coherence and one for each trait, each once. Correct the header"
        )
    for number, line in enumerate(lines[1:], start=2):
        if len(line) != len(header):
            raise JudgeFailure(
                f"{path}: row {number} has {len(line)} cells; wanted {len(header)}. Correct the row"
            )
    rows = (dict(zip(header, line, strict=True)) for line in lines[1:])
    return content, header, list(enumerate(rows, start=2))
