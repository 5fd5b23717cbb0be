"""Exports: what a monitor saw, as lines of JSON, a Parquet table or OpenTelemetry attributes."""

import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pvcore.alarms import Alarm
from pvcore.errors import ExportError
from pvcore.files import write_whole
from pvcore.transcripts import Reply, Summary, Transcript

FORMAT = 1
Attribute = str | int | float | bool


def write_jsonl(transcripts: Sequence[Transcript], path: str | Path) -> None:
    """Write one JSON object a conversation, to a file that appears whole; NaN becomes null.

    Each holds `messages`, `replies` (tokens, and by `trait/site` the projection before the reply
    and at each token), `summaries` and `alarms`. `ExportError` where nothing can be written, or for
    a message with a field that JSON cannot hold.
    """
    lines = [_line(document(one, number)) for number, one in enumerate(transcripts)]
    _write(Path(path), b"".join(lines))


def document(transcript: Transcript, number: int = 0) -> dict[str, Any]:
    """One conversation as plain data that JSON can hold."""
    columns = _columns(transcript)
    return {
        "format": FORMAT,
        "conversation": number,
        "messages": [_message(message, number) for message in transcript.messages],
        "replies": [
            {
                "message": reply.message,
                "tokens": list(reply.tokens),
                "before": {name: _number(reply.before[at]) for name, at in columns.items()},
                "projections": {
                    name: [_number(value) for value in reply.projections[at]]
                    for name, at in columns.items()
                },
            }
            for reply in transcript.replies
        ],
        "summaries": [_plain(summary) for summary in transcript.summaries()],
        "alarms": [_alarm(alarm) for alarm in transcript.alarms],
    }


def write_parquet(transcripts: Sequence[Transcript], path: str | Path) -> None:
    """Write one row a token: `conversation`, `message`, `token`, `text`, and `trait/site` columns.

    Token -1 is the last prompt token before a reply, whose projection foretells it. Projections
    are float32, null where unknown. The file appears whole. `ExportError` where nothing can be
    written, or for conversations watched on different banks.
    """
    import pyarrow as pa
    import pyarrow.parquet as parquet

    if not transcripts:
        raise ExportError("got no conversations to write; wanted at least one")
    names = list(_columns(transcripts[0]))
    if any(list(_columns(one)) != names for one in transcripts):
        raise ExportError(
            "got conversations watched on different traits or sites; write a table for each bank"
        )
    rows = [row for number, one in enumerate(transcripts) for row in _rows(one, number)]
    schema = pa.schema(
        [(name, pa.int32()) for name in ("conversation", "message", "token")]
        + [("text", pa.string())]
        + [(name, pa.float32()) for name in names],
        metadata={"pvcore": json.dumps({"format": FORMAT})},
    )
    sheet = io.BytesIO()
    parquet.write_table(pa.Table.from_pylist(rows, schema=schema), sheet)
    _write(Path(path), sheet.getvalue())


def attributes(
    seen: Transcript | Alarm, *, model: str = "", prefix: str = "pvcore"
) -> dict[str, Attribute]:
    """OpenTelemetry attributes of a conversation, for its span, or of an alarm, for an event.

    Names are dotted and lower case, as in `pvcore.projection.evil.resid_post_19.mean`; what is
    unknown is left out, because an attribute has no null. `model` becomes `gen_ai.request.model`.
    `ExportError` for traits whose names differ only in what attributes do not tell apart.
    """
    found: dict[str, Attribute] = {"gen_ai.operation.name": "chat"}
    if model:
        found["gen_ai.request.model"] = model
    if isinstance(seen, Alarm):
        known = {name: value for name, value in _alarm(seen).items() if value is not None}
        return found | {f"{prefix}.alarm.{name}": value for name, value in known.items()}
    found[f"{prefix}.alarms"] = len(seen.alarms)
    names = _attribute_names(seen.traits)
    for summary in seen.summaries():
        place = str(summary.site).replace(".", "_")
        stem = f"{prefix}.projection.{names[summary.trait]}.{place}"
        for name in ("before", "mean", "max", "last", "first_alarm", "alarm_message"):
            value = getattr(summary, name)
            if value is not None and math.isfinite(value):
                found[f"{stem}.{name}"] = value
    return found


def _attribute_names(traits: Sequence[str]) -> dict[str, str]:
    """By trait its part of a name; `ExportError` where two have the same."""
    owners: dict[str, str] = {}
    for trait in traits:
        name = "".join(sign if sign.isalnum() else "_" for sign in trait.lower())
        if owners.setdefault(name, trait) != trait:
            raise ExportError(
                f"got traits {owners[name]!r} and {trait!r}, whose attributes would both be named "
                f"{name!r}; rename one, as in vector.rename(...)"
            )
    return {trait: name for name, trait in owners.items()}


def _columns(transcript: Transcript) -> dict[str, tuple[int, int]]:
    """By `trait/site`, where its numbers stand."""
    return {
        f"{trait}/{site}": (k, place)
        for k, trait in enumerate(transcript.traits)
        for place, site in enumerate(transcript.sites)
    }


def _rows(transcript: Transcript, number: int) -> Iterator[dict[str, Any]]:
    columns = _columns(transcript)
    for reply in transcript.replies:
        stem = {"conversation": number, "message": reply.message}
        before = {name: _number(reply.before[at]) for name, at in columns.items()}
        yield {**stem, "token": -1, "text": "", **before}
        for token, text in enumerate(reply.tokens):
            values = _values(reply, columns, token)
            yield {**stem, "token": token, "text": text, **values}


def _values(
    reply: Reply, columns: Mapping[str, tuple[int, int]], token: int
) -> dict[str, float | None]:
    return {name: _number(reply.projections[(*at, token)]) for name, at in columns.items()}


def _number(value: Any) -> float | None:
    number = float(value)
    return number if math.isfinite(number) else None


def _plain(record: Summary | Alarm) -> dict[str, Any]:
    """A flat record as JSON can hold it."""
    found = {name: getattr(record, name) for name in record.__dataclass_fields__}
    return {
        name: _number(value) if isinstance(value, float) else value
        for name, value in (found | {"site": str(record.site)}).items()
    }


def _alarm(alarm: Alarm) -> dict[str, Any]:
    """An alarm of a conversation names the reply; `chat` counts along whatever call made it."""
    found = _plain(alarm)
    del found["message" if alarm.message is None else "chat"]
    return found


def _message(message: Mapping[str, object], number: int) -> dict[str, object]:
    for name, value in message.items():
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ExportError(
                f"conversation {number}: got a message whose field {name!r} JSON cannot hold "
                f"({error}); wanted text, finite numbers, lists and objects: leave the field out"
            ) from None
    return dict(message)


def _line(found: Mapping[str, object]) -> bytes:
    try:
        return json.dumps(found, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:  # a lone surrogate, which JSON can hold only escaped
        return json.dumps(found).encode() + b"\n"


def _write(path: Path, content: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, content)
    except OSError as error:
        raise ExportError(
            f"got {path}, which cannot be written ({error}); wanted a file in a folder you may "
            "write to"
        ) from error
