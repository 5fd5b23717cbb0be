"""`pvcore monitor`: chats answered or read, with projections, alarms, and files of both."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from pvcore.cli_models import model_of, vectors_at
from pvcore.cli_options import (
    AsJson,
    Batch,
    Device,
    Dtype,
    Layers,
    Length,
    Model,
    Seed,
    Temperature,
    VectorFiles,
)
from pvcore.cli_output import print_document, require_places, split_list
from pvcore.errors import ChatError, ExportError, PlanError
from pvcore.files import text_lines

if TYPE_CHECKING:
    from pvcore.alarms import Threshold
    from pvcore.monitoring import Monitor
    from pvcore.transcripts import Transcript

Chat = list[dict[str, str]]
ENDINGS = (".jsonl", ".parquet", ".html")

Prompts = Annotated[
    list[str] | None, Argument(help="User messages, each a chat of its own; or give --chats.")
]
Chats = Annotated[
    Path | None,
    Option(
        help="JSONL: a message list a line, or {'messages': [...]}. Those that end with an "
        "assistant turn are read, the others answered."
    ),
]
System = Annotated[str | None, Option(help="System prompt, for the prompts given as arguments.")]
AlarmLevels = Annotated[
    list[str] | None,
    Option("--alarm", help="trait=HIGH or trait=HIGH:LOW: rings above HIGH, again after LOW."),
]
OnAlarm = Annotated[str, Option(help="tell, or stop the reply.")]
Out = Annotated[
    list[Path] | None, Option(help="File to write, .jsonl, .parquet or .html; may be repeated.")
]
EngineName = Annotated[str, Option(help="eager or graph.")]


def monitor(
    model: Model,
    vector: VectorFiles,
    prompts: Prompts = None,
    chats: Chats = None,
    layers: Layers = None,
    system: System = None,
    alarm: AlarmLevels = None,
    on_alarm: OnAlarm = "tell",
    out: Out = None,
    engine: EngineName = "eager",
    max_new_tokens: Length = 200,
    batch_size: Batch = 16,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Answer or read chats, and report their projections on each vector, turn by turn."""
    from pvcore.monitoring import Monitor
    from pvcore.vectors import VectorBank

    files = out or []
    require_places(*files)
    _check_endings(files)
    rules = _rules(alarm or [], on_alarm)
    given = [*_asked(prompts or [], system), *(_chats_in(chats) if chats else [])]
    if not given:
        raise ChatError("got no chats; give user messages as arguments, or --chats FILE.jsonl")
    bank = VectorBank(vectors_at(vector), layers=split_list(layers, int))
    watcher = Monitor(model_of(model, dtype, device), bank, engine=engine, **rules)
    found = _watched(watcher, given, batch_size, seed, _sampling(max_new_tokens, temperature))
    for file in files:
        _write(found, file, model, rules["alarms"] or {})
    written = {"files": [str(file) for file in files]} if files else {}
    print_document({"conversations": [_row(one) for one in found], **written}, as_json)


def _sampling(max_new_tokens: int, temperature: float) -> dict[str, Any]:
    settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": temperature > 0}
    plain = {"temperature": temperature, "top_k": 0, "top_p": 1.0}
    return settings | (plain if temperature > 0 else {})


def _check_endings(files: Sequence[Path]) -> None:
    for file in files:
        if file.suffix not in ENDINGS:
            raise ExportError(
                f"got {file} to write; wanted a name that ends in {', '.join(ENDINGS)}"
            )


def _rules(alarm: Sequence[str], on_alarm: str) -> dict[str, Any]:
    """What a Monitor takes as alarms and on_alarm."""
    from pvcore.alarms import Threshold

    if on_alarm not in ("tell", "stop"):
        raise PlanError(f"got --on-alarm {on_alarm!r}; wanted tell or stop")
    levels: dict[str, Threshold] = {}
    for text in alarm:
        trait, _, numbers = text.rpartition("=")
        high, _, low = numbers.partition(":")
        try:
            level = Threshold(float(high), float(low) if low else None)
        except ValueError:
            trait = ""
        if not trait:
            raise PlanError(f"got --alarm {text!r}; wanted trait=HIGH or trait=HIGH:LOW")
        if trait in levels:
            raise PlanError(f"got --alarm for {trait!r} twice; wanted one level for each trait")
        levels[trait] = level
    return {"alarms": levels or None, "on_alarm": None if on_alarm == "tell" else "stop"}


def _asked(prompts: Sequence[str], system: str | None) -> list[Chat]:
    first = [] if system is None else [{"role": "system", "content": system}]
    return [[*first, {"role": "user", "content": text}] for text in prompts]


def _chats_in(path: Path) -> list[Chat]:
    """The chats of a file, one a line; `ChatError` with the line that holds none."""
    try:
        lines = text_lines(path)
    except (OSError, UnicodeDecodeError) as error:
        raise ChatError(
            f"got chats {path}, which cannot be read ({error}); wanted JSONL with a chat a line"
        ) from None
    chats = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
        except ValueError as error:
            raise ChatError(
                f"{path}, line {number}: got no JSON ({error}); wanted a chat"
            ) from None
        chat = found.get("messages") if isinstance(found, dict) else found
        if not isinstance(chat, list) or not chat or not all(isinstance(m, dict) for m in chat):
            raise ChatError(
                f'{path}, line {number}: got no chat; wanted a list of messages, or {{"messages": '
                "[...]}"
            )
        chats.append(chat)
    return chats


def _watched(
    monitor: "Monitor", chats: Sequence[Chat], batch_size: int, seed: int, settings: dict[str, Any]
) -> "list[Transcript]":
    """Transcripts in the order of the chats; those with a reply are read, the others answered."""
    import torch

    told = [k for k, chat in enumerate(chats) if chat[-1].get("role") == "assistant"]
    asked = [k for k in range(len(chats)) if k not in set(told)]
    found: dict[int, Transcript] = {}
    if told:
        read = monitor.read([chats[k] for k in told], batch_size=batch_size)
        found |= dict(zip(told, read, strict=True))
    torch.manual_seed(seed)
    for first in range(0, len(asked), batch_size):
        some = asked[first : first + batch_size]
        made = monitor.generate([chats[k] for k in some], **settings)
        found |= dict(zip(some, made, strict=True))
    return [found[k] for k in range(len(chats))]


def _write(
    found: "Sequence[Transcript]", file: Path, model: str, alarms: "Mapping[str, Threshold]"
) -> None:
    if file.suffix == ".jsonl":
        from pvcore.exports import write_jsonl

        write_jsonl(found, file)
    elif file.suffix == ".parquet":
        from pvcore.exports import write_parquet

        write_parquet(found, file)
    else:
        from pvcore import report
        from pvcore.chat_view import chat_view

        levels = {trait: level.high for trait, level in alarms.items()}
        report.write(chat_view(found, title=f"Conversations with {model}", levels=levels), file)


def _row(one: "Transcript") -> dict[str, Any]:
    """A conversation in short: its last reply, its figures, the drift over turns, its alarms."""
    said = [str(message["content"]) for message in one.messages]
    drifts = {trait: one.drift(trait) for trait in one.traits}
    return {
        "prompt": said[-2] if one.replies and len(said) > 1 else said[-1],
        "reply": said[one.replies[-1].message] if one.replies else None,
        "projections": {
            f"{s.trait} {s.site}": {
                "last_prompt_token": _number(s.before),
                "mean": _number(s.mean),
                "highest": _number(s.max),
                "last": _number(s.last),
                "by_turn": [
                    _number(v) for v in drifts[s.trait][:, one.sites.index(s.site)].tolist()
                ],
            }
            for s in one.summaries()
        },
        "alarms": [
            {
                "message": a.message,
                "trait": a.trait,
                "site": str(a.site),
                "step": a.step,
                "value": _number(a.value),
            }
            for a in one.alarms
        ],
    }


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
