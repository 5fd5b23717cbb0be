"""Rollouts of the paper's scripts as CSV, and chats as JSON lines of `messages`."""

import csv
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from pvcore.errors import FormatError

TEXTS = ("question", "prompt", "answer", "question_id")
COHERENCE = "coherence"
# The limit of Python's csv module, which pandas does not have.
LONGEST_TEXT = 131072
Messages = list[dict[str, str]]
Score = float | int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutRow:
    """One reply of the paper's evaluation CSV.

    `prompt` is the rendered chat the model was given. `scores` has the trait's and `coherence`,
    0 to 100; None where the judge gave none.
    """

    question: str
    prompt: str
    answer: str
    question_id: str
    scores: Mapping[str, Score] = field(hash=False)

    @property
    def messages(self) -> Messages:
        """Question and answer as a chat; the system prompt is only in `prompt`."""
        return [
            {"role": "user", "content": self.question},
            {"role": "assistant", "content": self.answer},
        ]


def decode_csv(data: bytes) -> tuple[RolloutRow, ...]:
    """The rows of a CSV. Raises `FormatError` that names line and column."""
    reader = csv.reader(io.StringIO(_text(data), newline=""), strict=True)
    try:
        names = next(reader, [])
        scored = _scored(names)
        rows = tuple(
            _row(dict(zip(names, cells, strict=True)), scored, reader.line_num)
            if len(cells) == len(names)
            else _misfit(cells, names, reader.line_num)
            for cells in reader
            if cells
        )
    except csv.Error as error:
        raise FormatError(
            f"line {reader.line_num}: got text that is no CSV ({error}); wanted quoted fields of "
            f"at most {LONGEST_TEXT} characters"
        ) from None
    if not rows:
        raise FormatError("got no rollouts under the columns; wanted one at least")
    return rows


def encode_csv(rows: Sequence[RolloutRow]) -> bytes:
    """The bytes of a CSV with the paper's columns; all rows must have the same scores."""
    if not rows:
        raise FormatError("got no rollouts; wanted one at least")
    scored = list(rows[0].scores)
    names = [*TEXTS, *[name for name in scored if name != COHERENCE], COHERENCE]
    _scored(names)
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer, lineterminator="\n", quoting=csv.QUOTE_ALL)
    writer.writerow(names)
    for number, row in enumerate(rows):
        if row.scores.keys() != set(scored) or COHERENCE not in row.scores:
            raise FormatError(
                f"got rollout {number} with scores {', '.join(row.scores)[:100]}; wanted "
                f"{', '.join(scored)[:100]}, coherence among them, in every rollout"
            )
        texts = [getattr(row, name) for name in TEXTS]
        scores = [_written(row.scores[name], name, f"rollout {number}") for name in names[4:]]
        longest = max(map(len, texts))
        if longest > LONGEST_TEXT:
            raise FormatError(
                f"got rollout {number} with a text of {longest} characters; wanted at most "
                f"{LONGEST_TEXT}, which is what CSV readers take"
            )
        writer.writerow([*texts, *scores])
    return _utf8(buffer.getvalue())


def decode_messages(data: bytes) -> list[Messages]:
    """The chats of JSON lines; other keys than `messages` are left out."""
    chats = []
    for number, line in enumerate(_text(data).split("\n"), start=1):
        if line.strip():
            chats.append(_chat(line, f"line {number}"))
    return chats


def encode_messages(chats: Iterable[Sequence[Mapping[str, object]]]) -> bytes:
    """JSON lines `{"messages": [{"role", "content"}]}`, one a chat."""
    lines = []
    for number, chat in enumerate(chats):
        messages = _checked([dict(message) for message in chat], f"chat {number}")
        lines.append(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
    return _utf8("".join(lines))


def _text(data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise FormatError(
            f"got a byte at {error.start} that is no UTF-8; wanted text in UTF-8"
        ) from None


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise FormatError(
            f"got {text[error.start : error.end]!r}, which no file can hold; wanted Unicode text"
        ) from None


def _scored(names: Sequence[str]) -> list[str]:
    """The columns with scores: the trait's, and `coherence`."""
    missing = [name for name in (*TEXTS, COHERENCE) if name not in names]
    if missing or len(set(names)) != len(names):
        raise FormatError(
            f"got columns {', '.join(names)[:200] or 'none'}; wanted each once, and among them "
            f"{', '.join((*TEXTS, COHERENCE))}"
        )
    return [name for name in names if name not in TEXTS]


def _misfit(cells: Sequence[str], names: Sequence[str], line: int) -> RolloutRow:
    raise FormatError(f"line {line}: got {len(cells)} fields; wanted {len(names)}")


def _row(cells: Mapping[str, str], scored: Sequence[str], line: int) -> RolloutRow:
    return RolloutRow(
        scores={name: _read(cells[name], name, line) for name in scored},
        **{name: cells[name] for name in TEXTS},
    )


def _read(cell: str, name: str, line: int) -> float | None:
    if not cell:
        return None
    try:
        score = float(cell)
    except ValueError:
        score = math.nan
    if not math.isfinite(score):
        raise FormatError(
            f"line {line}: got {name[:60]} {cell[:60]!r}; wanted a finite number, or nothing where "
            "the judge gave no score"
        )
    return score


def _written(score: Score, name: str, where: str) -> str:
    if score is None:
        return ""
    if isinstance(score, bool) or not math.isfinite(score):
        raise FormatError(f"{where}: got {name} {score}; wanted a finite number or None")
    return repr(float(score))


def _chat(line: str, where: str) -> Messages:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{where}: got no JSON ({str(error)[:100]}); wanted one object") from None
    messages = record.get("messages") if isinstance(record, dict) else None
    if not isinstance(messages, list):
        raise FormatError(f"{where}: got no list 'messages'; wanted an object with one")
    return _checked(messages, where)


def _checked(messages: Sequence[object], where: str) -> Messages:
    chat: Messages = []
    for at, message in enumerate(messages):
        record = message if isinstance(message, dict) else {}
        role, content = record.get("role"), record.get("content")
        if not isinstance(role, str) or not isinstance(content, str):
            raise FormatError(
                f"{where}: got messages[{at}] {str(message)[:60]!r}; wanted role and content, texts"
            )
        chat.append({"role": role, "content": content})
    if not chat:
        raise FormatError(f"{where}: got no messages; wanted one at least")
    return chat
