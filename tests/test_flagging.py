"""A scan: every row once, the same scores in any order and cut, and three kinds of difference."""

from __future__ import annotations

import gc
import json
import os
import random
import re
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

import pvcore as pv
from pvcore import flag_manifest
from pvcore.errors import FlagError, SourceError, VectorError
from pvcore.flag_replies import in_subset
from pvcore.flag_scan import Scorer
from pvcore.flag_shards import footers
from tests import flag_data
from tests.chat_templates import QWEN3
from tests.families import build, tokenizer
from tests.flag_data import bank, chats, furthest, model, scores, table, write_jsonl

ROWS = chats(41)
BAD = {3: {"messages": []}, 17: {"text": "no conversation"}}


@pytest.fixture(scope="module")
def hooked() -> pv.HookedModel:
    return model()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rows = [BAD.get(at, flag_data.as_messages(chat)) for at, chat in enumerate(ROWS)]
    return write_jsonl(tmp_path / "data.jsonl", rows)


def test_every_row_is_scored_once_or_rejected_with_a_reason(
    hooked: pv.HookedModel, data: Path, tmp_path: Path
) -> None:
    flags = pv.flag(hooked, data, bank(), out=tmp_path / "out", shard_rows=8)
    found, rejected = table(flags), list(flags.rejected())
    source = data.as_posix()
    assert [row["row"] for row in rejected] == list(BAD)
    assert {key[1] for key in found} == set(range(41)) - set(BAD)
    assert (flags.scored, flags.n_rejected) == (39, 2)
    assert [row["field"] for row in rejected] == ["messages", ""]
    assert rejected[0]["source"] == source
    one = found[source, 5]
    ids = tokenizer().apply_chat_template(ROWS[5][:-1], add_generation_prompt=True)["input_ids"]
    assert one["n_prompt_tokens"] == len(ids)
    assert one["n_response_tokens"] == len(ROWS[5][1]["content"])
    assert one["id"] == f"{source}:5"
    assert len(list(footers(tmp_path / "out"))) == 6


def test_columns_are_those_that_others_read(
    hooked: pv.HookedModel, data: Path, tmp_path: Path
) -> None:
    sites = [pv.resid_post(0), pv.resid_mid(2)]
    two = pv.VectorBank([flag_data.vector(t, sites, seed=1) for t in ("evil", "humor")])
    pv.flag(hooked, data, two, out=tmp_path / "out")
    schema = pq.read_schema(tmp_path / "out/scores/part-000000.parquet")
    kinds = ("response_mean", "last_prompt_token", "difference")
    columns = [f"{t}/{s}/{k}" for t in ("evil", "humor") for s in sites for k in kinds]
    counts = ["n_prompt_tokens", "n_response_tokens"]
    assert schema.names == ["id", "source", "row", *counts, *columns]
    assert {str(schema.field(name).type) for name in columns} == {"float"}
    row = pq.read_table(tmp_path / "out/scores").to_pylist()[0]
    for name in ("evil/resid_post.0", "humor/resid_mid.2"):
        mean, last, difference = (row[f"{name}/{kind}"] for kind in kinds)
        assert difference == pytest.approx(mean - last, abs=1e-5)
        assert abs(difference) > 1e-3


def test_neither_order_nor_cut_nor_batch_changes_a_score(
    hooked: pv.HookedModel, tmp_path: Path
) -> None:
    def scan(name: str, rows: list[Any], **settings: Any) -> dict[Any, list[float]]:
        flags = pv.flag(hooked, rows, bank(), out=tmp_path / name, **settings)
        return {row["id"]: row for row in table(flags).values()} | {}

    rows = [{"id": f"chat {at}", "messages": chat} for at, chat in enumerate(ROWS)]
    wanted = scan("plain", rows)
    assert len(wanted) == 41
    for name, given, settings in (
        ("reversed", rows[::-1], {}),
        ("one by one", rows, {"max_tokens": 1}),
        ("all at once", rows, {"max_tokens": 10**6}),
        ("many shards", rows, {"shard_rows": 3, "max_tokens": 200}),
    ):
        got = scan(name, given, **settings)
        flat = [
            {key: [v for n, v in row.items() if "/" in n] for key, row in side.items()}
            for side in (got, wanted)
        ]
        assert furthest(*flat) <= 1e-5
    spread = [row["evil/resid_post.2/difference"] for row in wanted.values()]
    assert max(spread) - min(spread) > 0.1


def test_neither_order_nor_cut_nor_batch_changes_what_is_flagged(
    hooked: pv.HookedModel, tmp_path: Path
) -> None:
    """Rows of other projections than each other's, so that no rounding can swap two."""
    rows = [{"id": f"chat {at}", "messages": chat} for at, chat in enumerate(chats(60))]
    neutral = [{"messages": chat} for chat in chats(40, first=200)]

    def scan(name: str, given: list[Any], **settings: Any) -> dict[str, Any]:
        flags = pv.flag(hooked, given, bank(), out=tmp_path / name, **settings)
        clean = pv.flag(hooked, neutral, bank(), out=tmp_path / f"{name} clean", **settings)
        ids = {key: row["id"] for key, row in table(flags).items()}
        told: dict[str, Any] = {}
        for trait in flags.traits:
            for score in ("difference", "response_mean"):
                top = flags.top(trait, 12, score=score)
                told[f"{trait} {score} top"] = [row.id for row in top]
                low = flags.top(trait, 5, score=score, lowest=True)
                told[f"{trait} {score} low"] = [row.id for row in low]
                found = flags.filter(trait, percentile=80, clean=clean, score=score)
                told[f"{trait} {score}"] = {ids[key] for key in ids if key in found}
        return told

    wanted = scan("plain", rows)
    assert all(0 < len(one) < 60 for one in wanted.values())
    assert len({str(one) for one in wanted.values()}) > 8
    shuffled = random.Random(0).sample(rows, len(rows))
    for name, given, settings in (
        ("reversed", rows[::-1], {}),
        ("shuffled", shuffled, {"shard_rows": 7, "max_tokens": 150}),
        ("one by one", rows, {"max_tokens": 1}),
        ("all at once", rows, {"max_tokens": 10**6}),
        ("many shards", rows, {"shard_rows": 3}),
    ):
        assert scan(name, given, **settings) == wanted, name


def test_a_second_call_does_nothing_and_a_lost_shard_is_made_again(
    hooked: pv.HookedModel, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    wanted = scores(pv.flag(hooked, data, bank(), out=out, shard_rows=8))
    before = {path: path.read_bytes() for path in out.rglob("*.parquet")}
    ran: list[int] = []
    plain = pv.HookedModel.run_reader

    def counted(self: Any, reader: Any, ids: Any, lengths: Any, prompts: Any) -> None:
        ran.append(len(ids))
        plain(self, reader, ids, lengths, prompts)

    monkeypatch.setattr(pv.HookedModel, "run_reader", counted)
    pv.flag(hooked, data, bank(), out=out, shard_rows=8)
    assert ran == [1]  # the probe alone
    (out / "scores/part-000002.parquet").unlink()
    assert scores(pv.flag(hooked, data, bank(), out=out, shard_rows=8)) == wanted
    assert sum(ran[1:]) == 1 + 7  # the probe, and the sound rows of that shard
    assert {path: path.read_bytes() for path in out.rglob("*.parquet")} == before


def test_a_shard_of_another_scan_is_made_again(
    hooked: pv.HookedModel, data: Path, tmp_path: Path
) -> None:
    wanted = scores(pv.flag(hooked, data, bank(), out=tmp_path / "out", shard_rows=8))
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.parquet")}
    pv.flag(hooked, data, bank(), out=tmp_path / "other", shard_rows=8, turn="first")
    part = "scores/part-000001.parquet"
    (tmp_path / "out" / part).write_bytes((tmp_path / "other" / part).read_bytes())
    with pytest.raises(FlagError, match="of another scan"):
        pv.Flags.load(tmp_path / "out")
    assert scores(pv.flag(hooked, data, bank(), out=tmp_path / "out", shard_rows=8)) == wanted
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.parquet")} == before


def test_a_shard_that_a_disk_has_spoiled_is_made_again(
    hooked: pv.HookedModel, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    wanted = scores(pv.flag(hooked, data, bank(), out=out, shard_rows=8))
    before = {path: path.read_bytes() for path in out.rglob("*.parquet")}
    for path, held in before.items():
        middle = len(held) // 4
        path.write_bytes(held[:middle] + bytes([held[middle] ^ 1]) + held[middle + 1 :])
        with pytest.raises(FlagError, match=path.name):
            list(pv.Flags.load(out).tables()) + list(pv.Flags.load(out).rejected())
        assert scores(pv.flag(hooked, data, bank(), out=out, shard_rows=8)) == wanted
    assert {path: path.read_bytes() for path in out.rglob("*.parquet")} == before


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"shard_rows": 9}, "shard_rows was 8 and is 9"),
        ({"difference": "exact"}, 'difference.kind was "approximate" and is "exact"'),
        ({"turn": "first"}, 'form.turn was "last" and is "first"'),
        ({"bank": bank("evil")}, "bank.vectors.humor was"),
        ({"bank": bank(sites=flag_data.SITES[:2])}, "bank.sites was"),
        ({"model": model(seed=1)}, "projections of a probe were"),
        ({"rows": chats(40)}, "data.jsonl.bytes was"),
        ({"template": "{{ messages }}"}, "tokenizer was"),
    ],
)
def test_a_changed_scan_is_refused_and_says_what_changed(
    hooked: pv.HookedModel, data: Path, tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    out = tmp_path / "out"
    wanted = scores(pv.flag(hooked, data, bank(), out=out, shard_rows=8))
    held = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    given = {"shard_rows": 8, "out": out, **change}
    if rows := given.pop("rows", None):
        write_jsonl(data, [flag_data.as_messages(chat) for chat in rows])
    other, changed = given.pop("model", hooked), given.pop("bank", bank())
    if template := given.pop("template", None):
        plain = tokenizer(template=template)
        other = pv.HookedModel(hooked.hf, plain, model_id="tiny/qwen2")
    with pytest.raises(FlagError, match="asked for otherwise") as caught:
        pv.flag(other, data, changed, **given)
    assert said in str(caught.value)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == held
    assert scores(pv.Flags.load(out)) == wanted


def test_an_armed_plan_is_another_scan(hooked: pv.HookedModel, data: Path, tmp_path: Path) -> None:
    pv.flag(hooked, data, bank(), out=tmp_path / "out")
    steering = hooked.steer(pv.Add(bank()["evil"], coeff=1.0, layers=[0], span="all"))
    with steering, pytest.raises(FlagError, match="a plan is armed"):
        pv.flag(hooked, data, bank(), out=tmp_path / "out")


def test_a_model_of_which_a_mark_alone_was_trained_is_another(
    hooked: pv.HookedModel, data: Path, tmp_path: Path
) -> None:
    pv.flag(hooked, data, bank(), out=tmp_path / "out")
    other, mark = model(), tokenizer().convert_tokens_to_ids("<|im_start|>")
    with torch.no_grad():
        other.hf.get_input_embeddings().weight[mark, 1] += 0.5
    with pytest.raises(FlagError, match=r"model\.weights was .* and is [^;]*$"):
        pv.flag(other, data, bank(), out=tmp_path / "out")


def test_a_glob_leaves_out_what_the_scan_itself_has_written(
    hooked: pv.HookedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    rows = flag_data.write_parquet(
        Path("data/d.parquet"), [flag_data.as_pair(ROWS[at]) for at in (0, 1)]
    )
    for _ in range(2):
        flags = pv.flag(hooked, "data/**/*.parquet", bank(), out="data/flags")
        assert list(flags.datasets) == [rows.as_posix()]
    loaded = pv.Flags.load("data/flags", sources="data/**/*.parquet")
    assert len(loaded.conversations(loaded.top("evil", 2))) == 2


def test_other_versions_may_go_on_and_are_told(
    hooked: pv.HookedModel, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"

    def held() -> dict[str, Any]:
        found: dict[str, Any] = json.loads((out / "manifest.json").read_text())
        return found

    wanted = scores(pv.flag(hooked, data, bank(), out=out, shard_rows=8))
    assert held()["versions"] == [
        {"pvcore": version("pvcore"), "transformers": version("transformers")}
    ]
    assert held()["fingerprint"] == next(footers(out)).fingerprint
    assert held()["fingerprint"] == flag_manifest.fingerprint(held()["asked"])
    newer = {"pvcore": "99.0", "transformers": "99.1"}
    monkeypatch.setattr(flag_manifest, "versions", lambda: newer)
    pv.flag(hooked, data, bank(), out=out, shard_rows=8)
    assert newer not in held()["versions"]  # nothing was left to do
    (out / "scores/part-000001.parquet").unlink()
    assert scores(pv.flag(hooked, data, bank(), out=out, shard_rows=8)) == wanted
    assert held()["versions"][1:] == [newer]


def test_other_rows_of_a_data_set_are_noticed(hooked: pv.HookedModel, tmp_path: Path) -> None:
    rows = [{"messages": chat} for chat in ROWS]
    out = tmp_path / "out"
    pv.flag(hooked, rows, bank(), out=out, shard_rows=8)
    pv.flag(hooked, iter(rows), bank(), out=out, shard_rows=8)
    with pytest.raises(FlagError, match="other rows between row 8 of rows and row 15"):
        pv.flag(hooked, [*rows[:9], rows[0], *rows[10:]], bank(), out=out, shard_rows=8)
    with pytest.raises(FlagError, match="data has become less"):
        pv.flag(hooked, rows[:8], bank(), out=out, shard_rows=8)


@pytest.mark.parametrize("kind", ["generator", "iterator"])
def test_an_iterator_that_an_interrupted_call_has_read_is_refused(
    hooked: pv.HookedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    rows, out = [{"messages": chat} for chat in ROWS], tmp_path / "out"

    def fresh() -> Any:
        return iter(rows) if kind == "iterator" else (row for row in rows)

    begun, plain = fresh(), Scorer.__call__

    def stopped(self: Any, samples: Any) -> Any:
        if len(samples) > 1:
            raise KeyboardInterrupt
        return plain(self, samples)

    with monkeypatch.context() as patch:
        patch.setattr(Scorer, "__call__", stopped)
        with pytest.raises(KeyboardInterrupt):
            pv.flag(hooked, begun, bank(), out=out, shard_rows=4)
    assert not list(out.glob("scores/*"))
    for _ in range(2):
        with pytest.raises(FlagError, match="got rows, which begins with other rows"):
            pv.flag(hooked, begun, bank(), out=out, shard_rows=4)
    assert next(begun)["messages"] in ROWS[4:]  # there were rows left that would have been all
    flags = pv.flag(hooked, fresh(), bank(), out=out, shard_rows=4)
    assert {row for _, row in table(flags)} == set(range(41))
    assert scores(pv.flag(hooked, rows, bank(), out=out, shard_rows=4)) == scores(flags)
    assert "begun" not in flags.manifest


def test_a_data_set_that_became_shorter_loses_no_row_of_the_files_behind_it(
    hooked: pv.HookedModel, data: Path, tmp_path: Path
) -> None:
    rows, settings = [{"messages": chat} for chat in chats(16, first=100)], {"shard_rows": 8}
    out = tmp_path / "out"
    flags = pv.flag(hooked, {"d": rows, "f": str(data)}, bank(), out=out, **settings)
    assert flags.datasets["f"].scored == 39
    for shard in range(2, 8):  # killed when the shards of the data set were done
        (out / f"scores/part-{shard:06d}.parquet").unlink(missing_ok=True)
        (out / f"rejected/part-{shard:06d}.parquet").unlink(missing_ok=True)
    held = json.loads((out / "manifest.json").read_text())
    (out / "manifest.json").write_text(
        json.dumps({"format": 1, "status": "running", "asked": held["asked"]})
    )
    with pytest.raises(FlagError, match="other rows between row 0 of f and row 7 of f"):
        pv.flag(hooked, {"d": rows[:8], "f": str(data)}, bank(), out=out, **settings)
    again = pv.flag(hooked, {"d": rows, "f": str(data)}, bank(), out=out, **settings)
    assert {name: one.scored for name, one in again.datasets.items()} == {"d": 16, "f": 39}


def test_the_exact_difference_is_that_of_the_models_own_greedy_replies(
    hooked: pv.HookedModel, tmp_path: Path
) -> None:
    rows = [{"messages": chat} for chat in ROWS[:9]]
    settings: dict[str, Any] = {"difference": "exact", "max_new_tokens": 6, "shard_rows": 4}
    flags = pv.flag(hooked, rows, bank(), out=tmp_path / "exact", **settings)
    plain = build("qwen2")
    template = tokenizer()
    for (_, at), row in table(flags).items():
        prompt = template.apply_chat_template(
            ROWS[at][:-1], add_generation_prompt=True, return_dict=False, return_tensors="pt"
        )
        with torch.no_grad():
            made = plain.generate(prompt, do_sample=False, max_new_tokens=6, pad_token_id=0)
        own = template.decode(made[0, prompt.shape[1] :], skip_special_tokens=True)
        pair = [[*ROWS[at][:-1], {"role": "assistant", "content": own}], ROWS[at]]
        mean = hooked.read(pair, sites=[pv.resid_post(1)])[pv.resid_post(1)].double()
        unit = bank()["evil"].unit().direction(pv.resid_post(1)).double()
        wanted = float((mean[1] - mean[0]) @ unit)
        assert row["evil/resid_post.1/difference"] == pytest.approx(wanted, abs=2e-5)
        assert row["evil/resid_post.1/response_mean"] == pytest.approx(float(mean[1] @ unit), 1e-4)
    assert len(table(flags)) == 9


THOUGHT = "<think>\n\n</think>\n\n"


@pytest.mark.parametrize("thought", ["", "<think>\nso\n</think>\n\n"])
def test_own_replies_stand_behind_the_head_that_the_row_has(tmp_path: Path, thought: str) -> None:
    """A reasoning template writes an empty thought before a reply that brings none."""
    template = tokenizer(template=QWEN3)
    hooked = pv.HookedModel(build("qwen2"), template, model_id="tiny/qwen2")
    pairs = [(f"Ask {at}", f"No{at}") for at in range(5)]
    rows = [{"prompt": ask, "response": thought + told} for ask, told in pairs]
    settings: dict[str, Any] = {"difference": "exact", "max_new_tokens": 5}
    flags = pv.flag(hooked, rows, bank(), out=tmp_path / "out", **settings)
    if thought:  # the model's own reply is no thought, so that it is given an empty one
        reasons = [row["reason"] for row in flags.rejected()]
        assert len(reasons) == 5
        assert all("other text before it" in reason for reason in reasons)
        return
    plain, site = build("qwen2"), pv.resid_post(1)
    unit = bank()["evil"].unit().direction(site).double()

    def mean(ids: list[int], start: int) -> float:
        with torch.no_grad():
            h = plain(torch.tensor([ids]), output_hidden_states=True).hidden_states[2][0]
        return float(h[start:].double().mean(0) @ unit)

    found, apart = table(flags), []
    for at, (ask, told) in enumerate(pairs):
        chat = f"<|im_start|>user\n{ask}<|im_end|>\n<|im_start|>assistant\n"
        bare, ids = (
            template(text, add_special_tokens=False)["input_ids"] for text in (chat, chat + THOUGHT)
        )
        own = []
        for begun in (ids, bare):
            made = plain.generate(
                torch.tensor([begun]), do_sample=False, max_new_tokens=5, pad_token_id=0
            )
            text = template.decode(made[0, len(begun) :], skip_special_tokens=True).lstrip("\n")
            own.append(template(text, add_special_tokens=False)["input_ids"])
        row = template(told, add_special_tokens=False)["input_ids"]
        here, there = (mean([*ids, *reply], len(ids)) for reply in own)
        wanted = mean([*ids, *row], len(ids)) - here
        got = found["rows", at]["evil/resid_post.1/difference"]
        assert got == pytest.approx(wanted, abs=2e-5)
        apart.append(abs(here - there))
    assert max(apart) > 1e-2
    other = [
        {"source": "rows", "row": at, "reply": text + "yes"}
        for at, text in enumerate(("", "<think>\nso\n</think>\n\n"))
    ]
    replies = write_jsonl(tmp_path / "own.jsonl", other)
    flags = pv.flag(
        hooked, rows[:2], bank(), out=tmp_path / "file", difference="exact", replies=replies
    )
    assert [row["row"] for row in flags.rejected()] == [1]
    assert flags.scored == 1


def test_own_replies_are_generated_once(
    hooked: pv.HookedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"messages": chat} for chat in ROWS[:9]]
    settings: dict[str, Any] = {"difference": "exact", "max_new_tokens": 6, "shard_rows": 4}
    out = tmp_path / "exact"
    wanted = scores(pv.flag(hooked, rows, bank(), out=out, **settings))
    kept = out / "replies/part-000001.jsonl"
    lines = kept.read_bytes()
    kept.write_bytes(lines + b'\n[["rows", 4, "torn')  # as a kill leaves it
    for path in (out / "scores").iterdir():
        path.unlink()
    monkeypatch.setattr(pv.HookedModel, "generate", None)
    assert scores(pv.flag(hooked, rows, bank(), out=out, **settings)) == wanted


def test_kept_replies_answer_only_the_prompts_they_were_made_for(
    hooked: pv.HookedModel, tmp_path: Path
) -> None:
    """Killed before the first shard was there, and called with other rows or another model."""
    settings: dict[str, Any] = {"difference": "exact", "max_new_tokens": 6, "shard_rows": 4}
    rows, others = ([{"messages": chat} for chat in chats(6, first=at)] for at in (0, 50))
    column = "evil/resid_post.2/difference"
    for name, second, given, lost in (
        ("rows", hooked, others, ["scores"]),
        ("model", model(seed=1), rows, ["scores", "manifest.json"]),
    ):
        out = tmp_path / name
        first = table(pv.flag(hooked, rows, bank(), out=out, **settings))
        for path in [path for one in lost for path in [out / one, *out.glob(f"{one}/*")]]:
            if path.is_file():
                path.unlink()
        got = table(pv.flag(second, given, bank(), out=out, **settings))
        wanted = table(pv.flag(second, given, bank(), out=tmp_path / f"{name} anew", **settings))
        assert {key: row[column] for key, row in got.items()} == {
            key: row[column] for key, row in wanted.items()
        }
        assert any(abs(row[column] - first[key][column]) > 1e-3 for key, row in wanted.items())


@pytest.mark.parametrize("part", ["lm_head", "last block", "generation"])
@pytest.mark.parametrize("manifest", ["there", "lost"])
def test_what_decides_about_own_replies_alone_makes_another_scan(
    data: Path, tmp_path: Path, part: str, manifest: str
) -> None:
    low = bank("evil", sites=[pv.resid_post(0)])
    settings: dict[str, Any] = {"difference": "exact", "max_new_tokens": 2, "shard_rows": 32}
    pv.flag(model(), data, low, out=tmp_path / "out", **settings)
    other = model()
    if part == "generation":
        other.hf.generation_config.repetition_penalty = 1.7
    else:
        block = other.hf.lm_head if part == "lm_head" else other.hf.model.layers[-1]
        with torch.no_grad():
            next(block.parameters()).mul_(-1.5)
    if manifest == "lost":
        (tmp_path / "out/manifest.json").unlink()
    with pytest.raises(
        FlagError, match="asked for otherwise" if manifest == "there" else "no read"
    ):
        pv.flag(other, data, low, out=tmp_path / "out", **settings)


def test_shards_know_the_weights_where_the_manifest_is_lost(
    hooked: pv.HookedModel, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    wanted = scores(pv.flag(hooked, data, bank(), out=out))
    (out / "manifest.json").unlink()
    with pytest.raises(FlagError, match="scores of another scan"):
        pv.flag(model(seed=1), data, bank(), out=out)
    assert scores(pv.flag(hooked, data, bank(), out=out)) == wanted


@pytest.mark.parametrize(
    "own",
    [
        {"repetition_penalty": 9.0, "no_repeat_ngram_size": 1},
        {"suppress_tokens": list(range(20, 60))},
        {"bad_words_ids": [[token] for token in range(20, 60)]},
        {"sequence_bias": [[[token], 50.0] for token in range(60, 62)]},
        {"min_new_tokens": 8, "eos_token_id": list(range(20, 60))},
        {"num_beams": 3, "num_return_sequences": 2},
    ],
    ids=lambda own: next(iter(own)),
)
def test_own_replies_are_greedy_whatever_the_generation_config_says(
    tmp_path: Path, own: dict[str, Any]
) -> None:
    rows = [{"messages": chat} for chat in ROWS[:6]]
    settings: dict[str, Any] = {"difference": "exact", "max_new_tokens": 8}
    plain, bent = model(), model()
    ends = own.get("eos_token_id")  # which are the model's own in both, for replies end there
    plain.hf.generation_config.eos_token_id = ends
    bent.hf.generation_config.update(**own)
    wanted = scores(pv.flag(plain, rows, bank(), out=tmp_path / "plain", **settings))
    prompts = [chat[:-1] for chat in ROWS[:6]]
    told = {"do_sample": False, "max_new_tokens": 8}
    assert bent.generate(prompts, **told) != plain.generate(prompts, **told)
    assert scores(pv.flag(bent, rows, bank(), out=tmp_path / "bent", **settings)) == wanted


@pytest.mark.parametrize("sampled", [False, True])
def test_own_replies_are_one_each_where_the_model_would_give_several(
    tmp_path: Path, sampled: bool
) -> None:
    rows = [{"messages": chat} for chat in ROWS[:3]]
    settings: dict[str, Any] = {"difference": "exact", "max_new_tokens": 4}
    several = model()
    several.hf.generation_config.num_return_sequences = 2
    several.hf.generation_config.do_sample = sampled
    with pytest.raises(ValueError, match="num_return_sequences"):
        several.generate([ROWS[0][:-1]], do_sample=False, max_new_tokens=4)
    wanted = scores(pv.flag(model(), rows, bank(), out=tmp_path / "one", **settings))
    assert scores(pv.flag(several, rows, bank(), out=tmp_path / "several", **settings)) == wanted
    assert several.hf.generation_config.num_return_sequences == 2


def test_own_replies_keep_to_the_positions_that_a_model_has_learned(tmp_path: Path) -> None:
    plain, template = build("opt"), tokenizer()
    hooked = pv.HookedModel(build("opt"), tokenizer(), model_id="tiny/opt")
    settings: dict[str, Any] = {"difference": "exact", "max_new_tokens": 64}
    short = [{"prompt": f"ask {at}?", "response": "yes"} for at in range(3)]
    long = [{"prompt": "ab " * 30, "response": "yes"}, {"prompt": "cd " * 28, "response": "no"}]
    flags = pv.flag(hooked, [*short, *long], bank(), out=tmp_path / "all", **settings)
    assert flags.scored == 5
    alone = pv.flag(hooked, long[:1], bank(), out=tmp_path / "alone", **settings)
    assert furthest({3: scores(flags)["rows", 3]}, {3: scores(alone)["rows", 0]}) <= 1e-5
    chat = [{"role": "user", "content": long[0]["prompt"]}]
    ids = template.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    begun = len(ids)
    after = len(template("<|im_end|>\n", add_special_tokens=False)["input_ids"])
    assert begun + 64 > 128
    while len(ids) + after < 128:
        with torch.no_grad():
            ids = [*ids, int(plain(torch.tensor([ids])).logits[0, -1].argmax())]
    own = template.decode(ids[begun:], skip_special_tokens=True)
    (kept,) = (tmp_path / "alone/replies").glob("*.jsonl")
    assert list(json.loads(kept.read_text()).values()) == [own]
    assert len(own) > 5


def test_own_replies_may_come_from_a_file_in_any_order(
    hooked: pv.HookedModel, tmp_path: Path
) -> None:
    rows = [{"id": 100 + at, "messages": chat} for at, chat in enumerate(ROWS[:9])]
    own = [{"id": 100 + at, "response": f"own {at}"} for at in range(9) if at not in (2, 5)]
    own.append({"source": "rows", "row": 5, "reply": "by place"})
    own.append({"id": 999, "response": "of no row"})
    own[0] |= {"reply": "", "completion": own[0]["response"], "answer": None}
    file = write_jsonl(tmp_path / "own.jsonl", own[::-1])
    flags = pv.flag(
        hooked, rows, bank(), out=tmp_path / "out", difference="exact", replies=file, shard_rows=4
    )
    found = table(flags)
    assert {key[1] for key in found} == set(range(9)) - {2}
    (lost,) = flags.rejected()
    assert (lost["row"], lost["field"]) == (2, "difference")
    assert "the reply is not there" in lost["reason"]
    texts = {at: f"own {at}" for at in range(9)} | {5: "by place"}
    for (_, at), row in found.items():
        chat = [*ROWS[at][:-1], {"role": "assistant", "content": texts[at]}]
        mean = hooked.read([chat], sites=[pv.resid_post(1)])[pv.resid_post(1)][0]
        unit = bank()["evil"].unit().direction(pv.resid_post(1))
        wanted = row["evil/resid_post.1/response_mean"] - float(mean.float() @ unit)
        assert row["evil/resid_post.1/difference"] == pytest.approx(wanted, abs=2e-5)


def test_replies_that_cannot_be_kept_are_one_error_and_leave_nothing(
    hooked: pv.HookedModel, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside = tmp_path / "beside"
    beside.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(beside))

    def refused(error: type[Exception], said: str, row: dict[str, Any]) -> None:
        replies = write_jsonl(tmp_path / "replies.jsonl", [row])
        with pytest.raises(error, match=said):
            pv.flag(hooked, data, bank(), out=tmp_path / said, difference="exact", replies=replies)
        assert not list(beside.iterdir())

    said = r"replies\.jsonl: row 0: got a lone surrogate in "
    refused(SourceError, said, {"id": "a", "reply": "b\ud800"})
    refused(SourceError, f"{said}a reply", {"id": "a\ud800", "reply": "b"})
    refused(SourceError, f"{said}a", {"source": "\ud800", "row": 1, "reply": "b"})
    said = r"replies\.jsonl: row 0: got one reply in `response` and another in `completion`; wanted"
    own: dict[str, Any] = {"id": "a", "prompt": "Q", "response": "the data's", "completion": "own"}
    refused(SourceError, said, own)
    connect = sqlite3.connect

    def small(path: str, **settings: Any) -> sqlite3.Connection:
        made = connect(path, **settings)
        made.execute("PRAGMA max_page_count = 6")
        return made

    monkeypatch.setattr(sqlite3, "connect", small)
    refused(FlagError, "beside.*disk is full.*make room", {"id": "a", "reply": "b" * 50_000})


KILLED = """
import os, signal, sys
from pvcore.flag_replies import RepliesOnFile
from pvcore.flag_sources import resolve
held = RepliesOnFile(resolve(sys.argv[1])[0])
files = [f"/proc/self/fd/{one}" for one in os.listdir("/proc/self/fd")]
print([os.readlink(file) for file in files if os.path.islink(file)], flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="asks Linux for open files")
def test_a_killed_scan_leaves_no_index_of_replies(tmp_path: Path) -> None:
    beside = tmp_path / "beside"
    beside.mkdir()
    own = [{"id": at, "reply": "word " * 2000} for at in range(1000)]
    replies = write_jsonl(tmp_path / "replies.jsonl", own)
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(replies)],
        env={**os.environ, "TMPDIR": str(beside), "SQLITE_TMPDIR": str(beside)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert str(beside) in done.stdout, "the index was in memory alone"
    assert not list(beside.iterdir())


def test_replies_with_a_place_answer_rows_of_one_id(hooked: pv.HookedModel, tmp_path: Path) -> None:
    rows = [{"id": "same", "messages": chat} for chat in ROWS[:6]]
    own = [{"id": "same", "source": "rows", "row": at, "reply": f"own {at}"} for at in range(6)]
    settings: dict[str, Any] = {"difference": "exact", "shard_rows": 2}
    placed = write_jsonl(tmp_path / "placed.jsonl", own)
    flags = pv.flag(hooked, rows, bank(), out=tmp_path / "placed", replies=placed, **settings)
    bare = [{"source": "rows", "row": at, "reply": f"own {at}"} for at in range(6)]
    plain = write_jsonl(tmp_path / "plain.jsonl", bare)
    wanted = pv.flag(hooked, rows, bank(), out=tmp_path / "plain", replies=plain, **settings)
    assert scores(flags) == scores(wanted)
    assert flags.scored == 6
    named = write_jsonl(tmp_path / "named.jsonl", [{"id": "same", "reply": "whose?"}])
    rows[1] = rows[3] = {"messages": ROWS[1]}
    for _ in range(3):  # what was done before the stop is known when it is called again
        with pytest.raises(FlagError, match="reply for the id 'same', which rows:0 and rows:2"):
            pv.flag(hooked, rows, bank(), out=tmp_path / "named", replies=named, **settings)


@pytest.mark.parametrize("how", ["more", "another", "touched"])
def test_a_file_that_changes_while_it_is_scanned_is_no_complete_scan(
    hooked: pv.HookedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    rows = [{"messages": chat} for chat in chats(12)]
    data, out = write_jsonl(tmp_path / "data.jsonl", rows), tmp_path / "out"
    whole, plain = data.read_bytes(), Scorer.__call__

    def changes(self: Scorer, samples: Any) -> Any:
        if how == "more":
            data.write_bytes(whole + whole)
        elif how == "another":
            data.write_bytes(whole.replace(b"no", b"on"))
        else:
            data.write_bytes(whole)
        return plain(self, samples)

    with monkeypatch.context() as patch:
        patch.setattr(Scorer, "__call__", changes)
        if how == "touched":
            assert pv.flag(hooked, data, bank(), out=out).scored == 12
            return
        with pytest.raises(FlagError, match=r"data\.jsonl, which changed while it was scanned"):
            pv.flag(hooked, data, bank(), out=out)
    data.write_bytes(whole)
    with pytest.raises(FlagError, match="changed while it was scanned"):
        pv.flag(hooked, data, bank(), out=out)
    assert pv.flag(hooked, data, bank(), out=tmp_path / "other").scored == 12


@pytest.mark.parametrize("kind", ["data", "replies"])
def test_no_shard_is_made_of_a_file_that_has_changed(
    hooked: pv.HookedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Whether or not the scan gets to its end, and though the file is put back before that."""
    rows = [{"id": at, "messages": chat} for at, chat in enumerate(chats(12))]
    own = [{"id": at, "reply": f"own {at}"} for at in range(12)]
    files = {
        "data": write_jsonl(tmp_path / "data.jsonl", rows),
        "replies": write_jsonl(tmp_path / "replies.jsonl", own),
    }
    settings: dict[str, Any] = {"difference": "exact", "replies": files["replies"], "shard_rows": 4}
    whole, plain, out = files[kind].read_bytes(), Scorer.__call__, tmp_path / "out"
    seen: list[int] = []

    def changes(self: Scorer, samples: Any) -> Any:
        seen.extend(one.row for one in samples)
        if 4 in seen:
            files[kind].write_bytes(whole + whole)
        return plain(self, samples)

    with monkeypatch.context() as patch:
        patch.setattr(Scorer, "__call__", changes)
        with pytest.raises(FlagError, match=rf"{kind}\.jsonl, which changed while it was scanned"):
            pv.flag(hooked, files["data"], bank(), out=out, **settings)
    assert 8 not in seen
    assert [path.name for path in (out / "scores").iterdir()] == ["part-000000.parquet"]
    files[kind].write_bytes(whole)
    with pytest.raises(FlagError, match="changed while it was scanned"):
        pv.flag(hooked, files["data"], bank(), out=out, **settings)
    again = pv.flag(hooked, files["data"], bank(), out=tmp_path / "again", **settings)
    assert again.scored == 12


@pytest.mark.parametrize("difference", ["subset", "exact"])
def test_a_reply_by_id_is_never_taken_for_another_row_of_that_id(
    hooked: pv.HookedModel, tmp_path: Path, difference: str
) -> None:
    """Rows outside a subset and rows that cannot be scored have ids too."""
    rows: list[dict[str, Any]] = [
        {"id": str(at % 6), "messages": chats(12)[at]} for at in range(12)
    ]
    if difference == "exact":
        rows = [{"id": "0", "messages": []}, *rows[6:]]
    own = [{"id": str(at), "reply": f"own {at}"} for at in range(6)]
    replies = write_jsonl(tmp_path / "replies.jsonl", own)
    settings: dict[str, Any] = {"difference": difference, "share": 0.3, "replies": replies}
    with pytest.raises(FlagError, match=r"reply for the id '\d', which rows:\d+ and rows:\d+ both"):
        pv.flag(hooked, rows, bank(), out=tmp_path / "out", **settings)
    apart = [row | {"id": str(at)} for at, row in enumerate(rows[1:6])]
    assert pv.flag(hooked, apart, bank(), out=tmp_path / "apart", **settings).scored >= 1


def test_a_resumed_scan_takes_and_refuses_replies_as_one_in_a_piece_does(
    hooked: pv.HookedModel, tmp_path: Path
) -> None:
    """Rows that were done before the stop: some answered by their place, one rejected."""
    rows: list[dict[str, Any]] = [{"id": "same", "messages": chat} for chat in chats(4)]
    own: list[dict[str, Any]] = [
        {"source": "rows", "row": at, "reply": f"own {at}"} for at in range(4)
    ]
    replies = write_jsonl(tmp_path / "placed.jsonl", [*own, {"id": "same", "reply": "of none"}])
    settings: dict[str, Any] = {"difference": "exact", "shard_rows": 2}

    def again(out: Path, given: Any) -> pv.Flags:
        return pv.flag(hooked, given, bank(), out=out, replies=replies, **settings)

    whole = scores(again(tmp_path / "placed", rows))
    (tmp_path / "placed/scores/part-000001.parquet").unlink()
    assert scores(again(tmp_path / "placed", rows)) == whole
    replies = write_jsonl(tmp_path / "named.jsonl", [{"id": "0", "reply": "whose?"}])
    given = [{"id": "0", "messages": []}, {"messages": chats(1)[0]}, {**rows[0], "id": "0"}]
    for _ in range(2):  # the first shard is on the disk by the second
        with pytest.raises(FlagError, match="reply for the id '0', which rows:0 and rows:2 both"):
            again(tmp_path / "named", given)
        assert [path.name for path in (tmp_path / "named/rejected").iterdir()] == [
            "part-000000.parquet"
        ]


class Reader:
    """Goes on reading where it was left, as readers of files do, and is no iterator itself."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self._rows = iter(rows)

    def __iter__(self) -> Any:
        return (row for row in self._rows)


class Bar(Reader):
    """A progress bar around such a reader, which was told how many rows are to come."""

    def __len__(self) -> int:
        return 30


class Stream(Reader):
    """A progress bar that was not told."""

    def __len__(self) -> int:
        raise TypeError("object of type 'generator' has no len()")


@pytest.mark.parametrize("alike", [1, 8])
@pytest.mark.parametrize("kind", [Reader, Bar, Stream])
def test_a_reader_that_goes_on_where_it_was_left_is_refused_after_a_stop(
    hooked: pv.HookedModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: type[Reader],
    alike: int,
) -> None:
    """Also where rows begin alike: the first `alike` of them are one row."""
    first, *others = ({"messages": chat} for chat in chats(31 - alike))
    rows = [first] * alike + others
    reader = kind(rows)
    settings: dict[str, Any] = {"out": tmp_path / "out", "shard_rows": 4}

    def stops(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("pvcore.flagging.write_shard", stops)
        with pytest.raises(KeyboardInterrupt):
            pv.flag(hooked, {"d": reader}, bank(), **settings)
    left = list(reader)
    assert 0 < len(left) < 30, "there are rows that would have been taken for all"
    left = left if alike == 1 else rows[6:]
    assert (left[0] == rows[0]) == (alike > 1)
    with pytest.raises(FlagError, match="got d, which begins with other rows"):
        pv.flag(hooked, {"d": kind([*left])}, bank(), **settings)
    assert pv.flag(hooked, {"d": kind(rows)}, bank(), **settings).scored == 30
    # What a finished scan refuses keeps nobody from the right data.
    with pytest.raises(FlagError, match="got other rows between row 0 of d"):
        pv.flag(hooked, {"d": kind(rows[::-1])}, bank(), **settings)
    assert pv.flag(hooked, {"d": kind(rows)}, bank(), **settings).scored == 30


def test_a_subset_has_the_exact_difference_and_an_interval(
    hooked: pv.HookedModel, tmp_path: Path
) -> None:
    rows = [{"messages": chat} for chat in chats(60)]
    settings: dict[str, Any] = {"max_new_tokens": 4, "shard_rows": 16}
    exact = pv.flag(hooked, rows, bank(), out=tmp_path / "e", difference="exact", **settings)
    some = pv.flag(
        hooked, rows, bank(), out=tmp_path / "s", difference="subset", share=0.4, **settings
    )
    name = "evil/resid_post.2/difference"
    known = {key: row[name] for key, row in table(some).items() if row[name] is not None}
    assert 12 <= len(known) <= 36
    for key, value in known.items():
        assert value == pytest.approx(table(exact)[key][name], abs=1e-5)
    estimate, truth = some.datasets["rows"][name], exact.datasets["rows"][name]
    assert (estimate.n, estimate.of) == (len(known), 60)
    response = {key: row["evil/resid_post.2/response_mean"] for key, row in table(some).items()}
    own = np.array([response[key] - value for key, value in known.items()])
    mean = np.mean(list(response.values())) - own.mean()
    assert estimate.mean == pytest.approx(mean, abs=1e-6)
    assert abs(mean - np.mean(list(known.values()))) > 1e-4
    assert estimate.deviation == pytest.approx(np.std(list(known.values()), ddof=1), rel=1e-5)
    error = own.std(ddof=1) * ((1 - len(own) / 60) / len(own)) ** 0.5
    reach = (estimate.high - estimate.low) / 2
    assert 1.96 < reach / error < 2.2  # Student's t at 12 to 36 rows
    assert estimate.high - estimate.mean == pytest.approx(reach, rel=1e-6)
    assert estimate.low < truth.mean < estimate.high
    assert truth.low == truth.mean == truth.high
    flagged = some.top("evil", 99)
    assert len(flagged) == len(known)
    assert flagged[0].score == max(known.values())


def test_a_subset_goes_by_row_and_grows_with_its_share() -> None:
    def chosen(share: float, seed: int = 0) -> set[int]:
        return {r for r in range(2000) if in_subset("data", r, share, seed)}

    assert 130 <= len(chosen(0.08)) <= 190
    assert chosen(0.08) < chosen(0.5)
    assert len(chosen(1.0)) == 2000
    assert chosen(0.08, seed=1) != chosen(0.08)


@pytest.mark.parametrize("ending", list(flag_data.WRITERS))
@pytest.mark.parametrize("form", ["messages", "sharegpt", "pair"])
def test_every_file_and_form_gives_the_same_scores(
    hooked: pv.HookedModel, tmp_path: Path, ending: str, form: str
) -> None:
    if ending == ".csv" and form != "pair":
        return  # a cell holds no list
    rows = [getattr(flag_data, f"as_{form}")(chat) for chat in ROWS[:10]]
    path = flag_data.WRITERS[ending](tmp_path / f"data{ending}", rows)
    flags = pv.flag(hooked, str(path), bank(), out=tmp_path / "out")
    wanted = pv.flag(hooked, [{"messages": c} for c in ROWS[:10]], bank(), out=tmp_path / "plain")
    got = {row: values for (_, row), values in scores(flags).items()}
    assert furthest(got, {row: values for (_, row), values in scores(wanted).items()}) <= 1e-5
    assert flags.n_rejected == 0


def test_sources_mix_and_keep_their_names(hooked: pv.HookedModel, tmp_path: Path) -> None:
    from datasets import Dataset, IterableDataset

    rows = [flag_data.as_messages(chat) for chat in ROWS]
    write_jsonl(tmp_path / "a.jsonl", rows[:5])
    flag_data.write_parquet(tmp_path / "b.parquet", rows[5:10])
    held = Dataset.from_list(rows[10:15])
    stream = IterableDataset.from_generator(lambda: iter(rows[15:20]))
    given = {
        "files": [str(tmp_path / "*.jsonl"), tmp_path / "b.parquet"],
        "held": held,
        "stream": stream,
    }
    flags = pv.flag(hooked, given, bank(), out=tmp_path / "out", shard_rows=6)
    names = ["files/a.jsonl", "files/b.parquet"]
    assert {name: one.scored for name, one in flags.datasets.items()} == {
        **dict.fromkeys(names, 5),
        "held": 5,
        "stream": 5,
    }
    assert scores(pv.flag(hooked, given, bank(), out=tmp_path / "out", shard_rows=6))


def test_what_cannot_be_scanned_is_refused_before_anything_is_written(
    hooked: pv.HookedModel, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    training, partly = model(), model()
    training.hf.train()
    partly.hf.model.layers[1].self_attn.train()
    assert not partly.hf.training
    silent = pv.HookedModel(hooked.hf, None, model_id="tiny/qwen2")
    base = pv.HookedModel(hooked.hf, tokenizer(template=None), model_id="tiny/qwen2")
    for error, said, call in (
        (FlagError, "training mode", lambda: pv.flag(training, data, bank(), out=out)),
        (FlagError, "training mode", lambda: pv.flag(partly, data, bank(), out=out)),
        (FlagError, "without a tokenizer", lambda: pv.flag(silent, data, bank(), out=out)),
        (FlagError, "without a chat template", lambda: pv.flag(base, data, bank(), out=out)),
        (VectorError, "no direction", lambda: pv.VectorBank(bank()["evil"], layers=[7])),
        (SourceError, "no file", lambda: pv.flag(hooked, tmp_path / "none.jsonl", bank(), out=out)),
        (
            FlagError,
            "wanted one of approximate, exact, subset",
            lambda: pv.flag(hooked, data, bank(), out=out, difference="precise"),
        ),
        (FlagError, "share 0", lambda: pv.flag(hooked, data, bank(), out=out, share=0)),
        (FlagError, "shard_rows 0", lambda: pv.flag(hooked, data, bank(), out=out, shard_rows=0)),
        (FlagError, "both or neither", lambda: pv.flag(hooked, data, bank(), out=out, prompt="q")),
        (FlagError, "turn", lambda: pv.flag(hooked, data, bank(), out=out, turn="middle")),
        (
            FlagError,
            "needs none",
            lambda: pv.flag(hooked, data, bank(), out=out, replies=data),
        ),
    ):
        with pytest.raises(error, match=said):
            call()
        assert not out.exists()


def test_nothing_to_score_is_an_error(hooked: pv.HookedModel, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(FlagError, match="without a row"):
        pv.flag(hooked, tmp_path / "empty.jsonl", bank(), out=tmp_path / "out")


def test_two_scans_never_share_a_folder(hooked: pv.HookedModel, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with flag_manifest.alone(out):
        (out / "scores").mkdir()
        drafts = [
            out / f"{name}.0123456789abcdef.tmp"
            for name in (".manifest.json", "scores/.part-0.parquet")
        ]
        for draft in drafts:
            draft.write_bytes(b"half")
        with pytest.raises(FlagError, match="another process"):
            pv.flag(hooked, data, bank(), out=out)
        assert all(draft.exists() for draft in drafts), "the other's drafts were taken away"
    assert pv.flag(hooked, data, bank(), out=out).scored == 39


def test_a_file_that_breaks_off_stops_the_scan_with_its_shards_kept(
    hooked: pv.HookedModel, tmp_path: Path
) -> None:
    path = write_jsonl(tmp_path / "d.jsonl.gz", [{"messages": chat} for chat in chats(400)])
    path.write_bytes(path.read_bytes()[:-40])
    out, threads = tmp_path / "out", threading.active_count()
    with pytest.raises(SourceError, match=r"d\.jsonl\.gz: cannot be read after row \d+"):
        pv.flag(hooked, path, bank("evil", sites=[pv.resid_post(0)]), out=out, shard_rows=8)
    assert threading.active_count() == threads
    assert len(list(footers(out))) > 2
    with pytest.raises(FlagError, match="not finished"):
        pv.Flags.load(out)


def test_a_long_scan_keeps_no_files_open_and_no_rows(
    hooked: pv.HookedModel, tmp_path: Path
) -> None:
    opened = len(os.listdir("/proc/self/fd")) if Path("/proc").exists() else 0
    rows = write_jsonl(tmp_path / "d.jsonl", [{"messages": chat} for chat in chats(300)])
    pv.flag(hooked, rows, bank("evil", sites=[pv.resid_post(0)]), out=tmp_path / "o", shard_rows=16)
    gc.collect()
    from pvcore.flag_tokens import Sample

    assert not any(type(one) is Sample for one in gc.get_objects())
    if opened:
        assert len(os.listdir("/proc/self/fd")) <= opened


def test_infinite_projections_are_rejected_rows(tmp_path: Path) -> None:
    hooked = model()
    with torch.no_grad():  # "z" overflows wherever it comes up
        hooked.hf.get_input_embeddings().weight[tokenizer().convert_tokens_to_ids("z")] = torch.inf
    rows = [{"prompt": "a", "answer": text} for text in ("yes", "zoo", "no")]
    flags = pv.flag(hooked, rows, bank(), out=tmp_path / "out")
    (lost,) = flags.rejected()
    assert (lost["row"], lost["field"]) == (1, "resid_post.0")
    assert "infinite" in lost["reason"]
    assert {row for _, row in table(flags)} == {0, 2}


@pytest.mark.parametrize(
    "settings", [{"difference": "exact"}, {"difference": "subset", "share": 1}]
)
def test_an_own_reply_with_infinite_projections_is_not_compared(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    hooked = model()
    with torch.no_grad():
        hooked.hf.get_input_embeddings().weight[tokenizer().convert_tokens_to_ids("z")] = torch.inf
    rows = [{"prompt": "a", "answer": text} for text in ("yes", "no", "so", "zoo")]
    path = write_jsonl(tmp_path / "d.jsonl", rows)
    own = [
        {"source": path.as_posix(), "row": at, "reply": text}
        for at, text in enumerate(("well", "zoo", "yes", "zoo"))
    ]
    replies = write_jsonl(tmp_path / "replies.jsonl", own)
    flags = pv.flag(hooked, path, bank(), out=tmp_path / "out", replies=replies, **settings)
    rejected, unanswered = (
        {row["row"]: (row["field"], row["reason"]) for row in rows}
        for rows in (flags.rejected(), flags.unanswered())
    )
    in_full = settings["difference"] == "exact"
    assert rejected.keys() == ({1, 3} if in_full else {3})
    assert unanswered.keys() == (set() if in_full else {1})
    lost = rejected | unanswered
    assert lost[1][0] == "difference"
    assert "own reply cannot be scored: got an infinite or NaN projection" in lost[1][1]
    assert lost[3][0] == "resid_post.0"  # the row's own reply comes first
    assert {at for _, at in table(flags)} == {0, 2} | unanswered.keys()
    for (_, at), row in table(flags).items():
        for name, value in row.items():
            if "/" in name:
                lacks = at == 1 and name.endswith("/difference")
                assert value is None if lacks else np.isfinite(value)


def test_rows_of_a_subset_without_an_own_reply_keep_their_other_scores(
    hooked: pv.HookedModel, tmp_path: Path
) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", [{"bad": 1}, *[{"messages": c} for c in chats(40)]])
    name = path.as_posix()
    settings: dict[str, Any] = {"difference": "subset", "share": 0.4, "shard_rows": 9}
    drawn = {at for at in range(1, 41) if in_subset(name, at, 0.4, 0)}
    answered = set(sorted(drawn)[::2])
    own = [{"source": name, "row": at, "reply": f"own {at}"} for at in sorted(answered)]
    replies = write_jsonl(tmp_path / "replies.jsonl", own)
    settings |= {"replies": replies, "out": tmp_path / "out"}
    flags = pv.flag(hooked, path, bank(), **settings)
    plain = pv.flag(hooked, path, bank(), out=tmp_path / "plain")
    assert len(drawn - answered) >= 5
    for key, row in table(flags).items():
        for column in ("evil/resid_post.2/response_mean", "humor/resid_post.0/last_prompt_token"):
            assert row[column] == pytest.approx(table(plain)[key][column], abs=1e-5)
        assert (row["evil/resid_post.2/difference"] is None) == (key[1] not in answered)
    told = {row["row"]: row["reason"] for row in flags.unanswered()}
    assert told.keys() == drawn - answered
    assert set(told.values()) == {"the model's own reply cannot be scored: the reply is not there"}
    (one,) = flags.datasets.values()
    assert (one.scored, one.rejected, one.unanswered) == (40, 1, len(drawn - answered))
    estimate = one["evil/resid_post.2/difference"]
    assert (estimate.n, estimate.of) == (len(answered), 40)
    flags.report(tmp_path / "page.html")
    assert "Scored rows that the subset drew" in (tmp_path / "page.html").read_text()
    copies = flags.filter("evil", threshold=1e9, score="response_mean").write_clean(tmp_path / "c")
    assert [(copy.kept, copy.flagged, copy.rejected) for copy in copies.values()] == [(40, 0, 1)]
    # A shard whose unanswered rows are gone is made anew, and is the same.
    wanted, parts = scores(flags), sorted((tmp_path / "out/unanswered").glob("*.parquet"))
    content = parts[0].read_bytes()
    parts[0].write_bytes(content[:-9])
    with pytest.raises(FlagError, match="missing, cut short or of another scan"):
        pv.Flags.load(tmp_path / "out")
    again = pv.flag(hooked, path, bank(), **settings)
    assert scores(again) == wanted
    assert parts[0].read_bytes() == content
    assert {row["row"] for row in again.unanswered()} == drawn - answered


def test_the_manifest_is_the_same_twice_and_holds_no_date(
    hooked: pv.HookedModel, data: Path, tmp_path: Path
) -> None:
    texts = []
    for name in ("one", "two"):
        pv.flag(hooked, data, bank(), out=tmp_path / name)
        texts.append((tmp_path / name / "manifest.json").read_text())
    assert texts[0] == texts[1]
    held = json.loads(texts[0])
    assert held["totals"]["scored"] == 39
    assert held["status"] == "complete"


@pytest.mark.parametrize("difference", ["approximate", "exact"])
def test_autocast_around_a_scan_changes_no_score_and_no_reply(
    hooked: pv.HookedModel, data: Path, tmp_path: Path, difference: str
) -> None:
    settings: dict[str, Any] = {"difference": difference, "max_new_tokens": 6, "shard_rows": 16}
    wanted = scores(pv.flag(hooked, data, bank(), out=tmp_path / "plain", **settings))
    outer, out = torch.autocast("cpu", dtype=torch.bfloat16), tmp_path / "out"
    ids = torch.arange(12)[None]
    with torch.no_grad(), outer:
        flags = pv.flag(hooked, data, bank(), out=out, **settings)
        flags.report(tmp_path / "page.html", top=2)
        assert torch.is_autocast_enabled("cpu")
        rounded = hooked.hf(ids).logits
    assert not torch.equal(rounded.float(), hooked.hf(ids).logits)  # that autocast does act
    assert scores(flags) == wanted
    flags.report(tmp_path / "plain.html", top=2)
    assert (tmp_path / "page.html").read_text() == (tmp_path / "plain.html").read_text()
    (out / "scores/part-000001.parquet").unlink()  # begun in one and finished in the other
    assert scores(pv.flag(hooked, data, bank(), out=out, **settings)) == wanted


def test_rows_that_are_equal_are_flagged_and_ranked_alike_whatever_batch_they_were_in(
    hooked: pv.HookedModel, tmp_path: Path
) -> None:
    rows = [flag_data.as_messages(flag_data.chat(at % 8)) for at in range(400)]
    clean = pv.flag(hooked, rows, bank(), out=tmp_path / "clean")
    column = clean.column("evil")
    found, loose = [], []
    for tokens, size in ((64, 2048), (200, 2048), (1024, 2048), (256, 50)):
        out = tmp_path / str(tokens)
        flags = pv.flag(hooked, rows, bank(), out=out, max_tokens=tokens, shard_rows=size)
        scores = np.concatenate([values[:, 0] for _, values in flags.values([column])])
        # The percentile is the score of one of the eight chats, of which there are fifty each.
        chosen = flags.filter("evil", clean=clean, percentile=80)
        top = [[row.row for row in flags.top("evil", n)] for n in (8, 70)]
        low = [row.row for row in flags.top("evil", 30, lowest=True)]
        found.append(([*map(int, chosen.flagged["rows"])], top, low))
        bound = np.percentile(
            np.concatenate([values[:, 0] for _, values in clean.values([column])]), 80
        )
        loose.append(int((scores > bound).sum()))
    assert all(one == found[0] for one in found)
    assert len(found[0][0]) == 50
    assert len(set(loose)) > 1, "the scores themselves say otherwise in other batches"


class Rows:
    """A data set that may grow."""

    def __init__(self, rows: list[Any]) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[Any]:
        return iter(self.rows)


def test_a_finished_scan_takes_no_rows_more(hooked: pv.HookedModel, tmp_path: Path) -> None:
    rows = [flag_data.as_messages(chat) for chat in chats(24)]
    out = tmp_path / "out"
    done = pv.flag(hooked, [Rows(rows[:20])], bank(), out=out, shard_rows=10)
    held = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(FlagError, match=r"got more rows than the 2 shards of .* is finished"):
        pv.flag(hooked, [Rows(rows)], bank(), out=out, shard_rows=10)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == held
    again = pv.flag(hooked, [Rows(rows[:20])], bank(), out=out, shard_rows=10)
    assert (again.scored, table(again)) == (20, table(done))


def test_parts_beyond_those_of_the_scan_are_no_rows_of_it(
    hooked: pv.HookedModel, tmp_path: Path
) -> None:
    rows: list[Any] = [flag_data.as_messages(chat) for chat in chats(12)] + [{"prompt": "a"}]
    whole = pv.flag(hooked, [Rows(rows)], bank(), out=tmp_path / "whole", shard_rows=12)
    out = tmp_path / "out"
    flags = pv.flag(hooked, [Rows(rows[:12])], bank(), out=out, shard_rows=12)
    left = out / "rejected/part-000001.parquet"  # as of a stop before its scores were written
    left.write_bytes((whole.folder / "rejected/part-000001.parquet").read_bytes())
    (out / "scores/part-000007.parquet").write_bytes(b"of somebody else")
    found = pv.Flags.load(out)
    assert list(found.rejected()) == []
    assert [one.rejected for one in found.datasets.values()] == [0]
    assert table(found) == table(flags)
    assert len(list(whole.rejected())) == 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"out": ""}, "got out ''; wanted the folder"),
        ({"replies": "*.jsonl", "difference": "exact"}, "got 2 files as replies"),
    ],
)
def test_what_is_no_folder_and_what_is_more_than_one_file_is_refused(
    hooked: pv.HookedModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: dict[str, Any],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.jsonl", "b.jsonl"):
        write_jsonl(tmp_path / name, [{"id": "0", "response": "x"}])
    given: dict[str, Any] = {"out": tmp_path / "out", **change}
    with pytest.raises(FlagError, match=re.escape(said)):
        pv.flag(hooked, [flag_data.as_messages(chats(1)[0])], bank(), **given)
    assert not (tmp_path / "out/scores").exists()


@pytest.mark.parametrize("place", [0, 3])
def test_a_row_of_a_data_set_that_is_nested_too_deep_is_one_rejected_row(
    hooked: pv.HookedModel, tmp_path: Path, place: int
) -> None:
    rows: list[Any] = [flag_data.as_messages(chat) for chat in chats(6)]
    deep: Any = "x"
    for _ in range(5000):
        deep = [deep]
    itself: dict[str, Any] = {}
    itself["messages"] = [itself]
    rows[place], rows[4] = {"messages": deep}, itself
    for _ in range(2):  # and again, which compares them
        flags = pv.flag(hooked, Rows(rows), bank(), out=tmp_path / "out", shard_rows=2)
        assert flags.scored == 4
        found = [(one["row"], one["reason"]) for one in flags.rejected()]
        assert found == [
            (row, "got objects nested more than 100 deep; wanted text") for row in (place, 4)
        ]


def test_a_column_that_no_header_has_is_refused_before_a_folder_is_made(
    hooked: pv.HookedModel, tmp_path: Path
) -> None:
    flag_data.write_csv(tmp_path / "d.csv", [flag_data.as_pair(chat) for chat in chats(3)])
    with pytest.raises(SourceError, match="got 'promt' as a column's name; it has"):
        pv.flag(
            hooked,
            tmp_path / "d.csv",
            bank(),
            out=tmp_path / "out",
            prompt="promt",
            answer="response",
        )
    assert not (tmp_path / "out").exists()
