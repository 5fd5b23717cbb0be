"""What may be wrong with a row or a file of training data, made systematically."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pvcore.flag_rows import BESIDE, PAIRS

GOOD = {
    "messages": [
        {"role": "user", "content": "Is it?"},
        {"role": "assistant", "content": "Yes."},
    ]
}
TURNS = {
    "messages": ("role", "content", "user", "assistant"),
    "conversations": ("from", "value", "human", "gpt"),
}
NO_TEXT = {"null": None, "a number": 7, "a fraction": 0.5, "true": True, "an object": {"a": 1}}
LONE = "\ud800"

Row = tuple[str, bytes, str]  # what is wrong, the line, the field that must be named


def rows() -> Iterator[Row]:
    """Every defective row as a line of JSON, with the field at fault."""
    yield from _no_objects()
    yield from _lists()
    yield from _pairs()
    yield from _lines()
    yield from _deep()


def _line(record: Any) -> bytes:
    return json.dumps(record).encode()


def _no_objects() -> Iterator[Row]:
    for name, value in (*NO_TEXT.items(), ("a text", "x"), ("a list", [GOOD])):
        if not isinstance(value, dict):
            yield f"{name} for a row", _line(value), ""
    yield "no fields", _line({}), ""
    yield "fields nobody knows", _line({"text": "Once upon a time"}), ""
    for name in sorted(BESIDE):
        yield f"a conversation with {name}", _line({**GOOD, name: "something"}), name
    yield "half a pair", _line({"prompt": "Is it?"}), ""
    yield "nothing in messages", _line({"messages": None}), ""


def _lists() -> Iterator[Row]:
    for field, (role, content, user, model) in TURNS.items():
        ask, tell = {role: user, content: "Is it?"}, {role: model, content: "Yes."}

        def made(turns: Any, field: str = field) -> bytes:
            return _line({field: turns})

        for name, value in (*NO_TEXT.items(), ("a text", "x")):
            if value is not None:
                yield f"{name} for {field}", made(value), field
            yield f"{name} for a message", made([ask, value]), f"{field}[1]"
            if name != "a text":
                yield (
                    f"{name} for a reply",
                    made([ask, {**tell, content: value}]),
                    (f"{field}[1].{content}"),
                )
                yield (
                    f"{name} for a question",
                    made([{**ask, content: value}, tell]),
                    (f"{field}[0].{content}"),
                )
                yield (
                    f"{name} for a role",
                    made([ask, {**tell, role: value}]),
                    (f"{field}[1].{role}"),
                )
        yield "an unknown role", made([{**ask, role: "wizard"}, tell]), f"{field}[0].{role}"
        yield "an empty role", made([ask, {**tell, role: ""}]), f"{field}[1].{role}"
        yield "no role", made([{content: "Is it?"}, tell]), f"{field}[0]"
        yield "no text", made([ask, {role: model}]), f"{field}[1].{content}"
        yield "no messages", made([]), field
        yield "no reply", made([ask]), field
        yield "no question", made([tell]), field
        yield "two questions", made([ask, tell, ask]), field
        for name, text in (("empty", ""), ("blank", " \n\t")):
            yield f"an {name} reply", made([ask, {**tell, content: text}]), field
        yield "a lone surrogate", made([ask, {**tell, content: LONE}]), f"{field}[1].{content}"
        image = [{"type": "image_url", "image_url": "x"}]
        yield "an image", made([{**ask, content: image}, tell]), f"{field}[0].{content}[0]"
        nameless = [{"type": "text"}]
        yield (
            "a part without text",
            made([ask, {**tell, content: nameless}]),
            (f"{field}[1].{content}[0].text"),
        )


def _pairs() -> Iterator[Row]:
    for prompt, answer in PAIRS:
        if prompt == "input":
            continue  # context of an instruction where there is one
        for name, value in (*NO_TEXT.items(), ("an empty text", ""), ("numbers", [1, 2])):
            where = f"{prompt}[0]" if name == "numbers" else prompt
            yield f"{name} for {prompt}", _line({prompt: value, answer: "Yes."}), where
            where = f"{answer}[0]" if name == "numbers" else answer
            yield f"{name} for {answer}", _line({prompt: "Is it?", answer: value}), where
        yield f"a surrogate in {answer}", _line({prompt: "Is it?", answer: LONE}), answer
        for name in ("input", "context"):
            if prompt != "instruction":  # which is about it
                row = {prompt: "Is it?", answer: "Yes.", name: "A text."}
                yield f"{name} beside {prompt} and {answer}", _line(row), name


def _lines() -> Iterator[Row]:
    whole = _line(GOOD)
    for at in range(1, len(whole), 7):
        yield f"a line cut after {at} bytes", whole[:at], ""
    yield "no UTF-8", whole.replace(b"Yes", b"\xff\xfe"), ""
    yield "a NUL", b"\0" + whole, ""
    yield "two objects on a line", whole + whole, ""
    yield "an endless number", b'{"messages": ' + b"9" * 5000 + b"}", ""
    yield "deep nesting", b"[" * 100_000 + b"]" * 100_000, ""
    yield (
        "a reply twice",
        b'{"prompt": "Is it?", "response": "No.", "response": "Yes."}',
        "response",
    )
    twice = whole.replace(b'"content": "Yes."', b'"content": "No.", "content": "Yes."')
    yield "a text twice in a message", twice, "content"
    yield "a note twice", whole[:-1] + b', "n": {"a": 1, "a": 1}}', "a"
    yield "a comma too many", b'{"messages": [],}', ""


def _deep() -> Iterator[Row]:
    """What JSON can hold, and calls within calls cannot follow."""
    held = '{"a":' * 600 + "1" + "}" * 600
    parts = '[{"type":"text","text":' * 300 + '"a"' + "}]" * 300
    pair = '{"prompt": "Is it?", "response": %s, "%s": %s}'
    ask = '{"role": "user", "content": %s}'
    tell = '{"role": "assistant", "content": "Yes.", "tool_calls": %s}'
    chat = f'{{"messages": [{ask}, {tell}]}}'
    for name in ("tools", "input", "functions"):
        yield f"deep {name}", (pair % ('"Yes."', name, held)).encode(), name
    yield "a deep reply", (pair % (held, "input", '""')).encode(), "response"
    yield "deep tool calls", (chat % ('"Is it?"', held)).encode(), "messages[1].tool_calls"
    yield "deep parts", (chat % (parts, "null")).encode(), "messages[0].content[0].text"
    yield "a deep part", (chat % (f"[{held}]", "null")).encode(), "messages[0].content[0]"
    yield "deep messages as text", _line({"messages": "[" * 400 + "]" * 400}), "messages[0]"


File = tuple[str, Callable[[Path], Any], str]


def files() -> Iterator[File]:
    """Every file that cannot be read: its name, what makes it, and words the error must have."""
    text = b"".join(_line(GOOD) + b"\n" for _ in range(40))
    packed, table = gzip.compress(text), _parquet()

    def holding(content: bytes) -> Callable[[Path], Any]:
        return lambda path: path.write_bytes(content)

    yield "nowhere.jsonl", lambda path: None, "no file"
    yield "folder", lambda path: path.mkdir(), "folder"
    for ending in ("txt", "xlsx", "pkl", "parquet.gz", "zst"):
        yield f"d.{ending}", holding(text), "wanted a file ending"
    yield "noending", holding(text), "wanted a file ending"
    for encoding in ("utf-16", "utf-16-be", "utf-16-le"):
        content = text.decode().encode(encoding)
        mark = b"" if encoding == "utf-16" else "\ufeff".encode(encoding)
        yield f"{encoding}.jsonl", holding(mark + content), "UTF-16"
        yield f"{encoding}.csv", holding(mark + "prompt,response\na,b\n".encode(encoding)), "UTF-16"
    yield "zip.jsonl", holding(b"PK\x03\x04" + text), "zip"
    yield "packed.jsonl", holding(packed), "gzip"
    yield "packed.csv", holding(gzip.compress(b"prompt,response\na,b\n")), "gzip"
    yield "array.json", holding(b"[" + _line(GOOD) + b"]"), "JSON array"
    for at in (4, 30, len(packed) // 2, len(packed) - 4):
        yield f"cut-{at}.jsonl.gz", holding(packed[:at]), "cannot be read"
    yield "plain.jsonl.gz", holding(text), "cannot be read"
    yield "spoiled.jsonl.gz", holding(packed[:30] + b"\0" * 20 + packed[50:]), "cannot be read"
    yield "plain.csv.gz", holding(b"prompt,response\na,b\n"), "cannot be read"
    yield "unknown.csv", holding(b"text,label\na,b\n"), "text, label"
    yield "twice.csv", holding(b"prompt,response,prompt\na,b,c\n"), "each name once"
    yield "latin.csv", holding("prömpt,response\na,b\n".encode("latin-1")), "cannot be read"
    for share in (0.0, 0.1, 0.5, 0.9, 0.999):
        yield f"cut-{share}.parquet", holding(table[: int(len(table) * share)]), "cannot be read"
    yield "noise.parquet", holding(b"PAR1" + bytes(range(200)) + b"PAR1"), "cannot be read"
    yield "text.parquet", holding(text), "cannot be read"
    yield (
        "unknown.parquet",
        lambda path: pq.write_table(pa.table({"text": ["a"]}), path),
        "got columns text",
    )


def _parquet() -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist([GOOD] * 40), sink)
    return bytes(sink.getvalue())
