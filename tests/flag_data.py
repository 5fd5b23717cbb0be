"""Training data for the tests of flagging: conversations for the tiny models, in every form."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

import pvcore as pv
from tests.families import N_LAYERS, build, tokenizer
from tests.subjects import vector

Chat = list[dict[str, str]]
SITES = [pv.resid_post(layer) for layer in range(N_LAYERS)]


def model(seed: int = 0) -> pv.HookedModel:
    return pv.HookedModel(build("qwen2", seed=seed), tokenizer(), model_id="tiny/qwen2")


def bank(*traits: str, sites: Sequence[pv.Site] = tuple(SITES)) -> pv.VectorBank:
    names = traits or ("evil", "humor")
    return pv.VectorBank([vector(name, sites, seed=sum(map(ord, name))) for name in names])


def chat(number: int, *, turns: int = 1) -> Chat:
    """A short conversation; each number gives another one, of another length."""
    made: Chat = []
    for turn in range(turns):
        made.append({"role": "user", "content": f"Ask {number} {'why? ' * (number % 4)}{turn}"})
        made.append({"role": "assistant", "content": f"Say {number * 7} " + "no " * (number % 5)})
    return made


def chats(count: int, *, first: int = 0) -> list[Chat]:
    return [chat(number) for number in range(first, first + count)]


def as_messages(chat: Chat) -> dict[str, Any]:
    return {"messages": chat}


def as_sharegpt(chat: Chat) -> dict[str, Any]:
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    turns = [{"from": names[one["role"]], "value": one["content"]} for one in chat]
    return {"conversations": turns}


def as_pair(chat: Chat) -> dict[str, Any]:
    return {"prompt": chat[0]["content"], "response": chat[1]["content"]}


def write_jsonl(path: Path, rows: Sequence[Any]) -> Path:
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_parquet(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    pq.write_table(pa.Table.from_pylist(list(rows)), path, row_group_size=7)
    return path


WRITERS: dict[str, Callable[[Path, Sequence[Any]], Path]] = {
    ".jsonl": write_jsonl,
    ".jsonl.gz": write_jsonl,
    ".csv": write_csv,
    ".parquet": write_parquet,
}


def table(flags: pv.Flags) -> dict[tuple[str, int], dict[str, Any]]:
    """Every scored row by source and row."""
    rows = [row for part in flags.tables() for row in part.to_pylist()]
    found = {(row["source"], row["row"]): row for row in rows}
    assert len(found) == len(rows), "a row was scored twice"
    return found


def scores(flags: pv.Flags) -> dict[tuple[str, int], list[float]]:
    return {
        key: [value for name, value in row.items() if "/" in name]
        for key, row in table(flags).items()
    }


def furthest(got: dict[Any, list[float]], wanted: dict[Any, list[float]]) -> float:
    """The largest difference between two sets of scores of the same rows, beside their size."""
    assert got.keys() == wanted.keys()
    size = max(abs(value) for row in wanted.values() for value in row)
    gaps = [abs(a - b) for key in wanted for a, b in zip(got[key], wanted[key], strict=True)]
    return max(gaps) / size
