"""Shards: a file is whole or made again, and a manifest that was torn is written anew."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pyarrow.parquet as pq
import pytest

import pvcore as pv
from pvcore import files, flag_manifest
from pvcore.errors import FlagError
from pvcore.flag_shards import (
    Footer,
    Shard,
    footer_of,
    footers,
    prepare,
    rejected_path,
    rejected_tables,
    score_columns,
    scores_path,
    tables,
    write_shard,
)
from pvcore.flag_tokens import Rejected, Sample
from tests.flag_data import bank, chats, model, scores

COLUMNS = score_columns(["evil"], ["resid_post.1"])


def shard(number: int = 0, *, scored: int = 3, rejected: int = 2) -> Shard:
    samples = [
        Sample(
            id=f"id {at}",
            source="d",
            row=at,
            ids=np.arange(9, dtype=np.int32),
            prompt_length=4,
            reply=(4, 8),
            messages=[],
        )
        for at in range(scored)
    ]
    lost = [
        Rejected(id="x", source="d", row=10 + at, field="f", reason="why \ud800")
        for at in range(rejected)
    ]
    values = np.arange(scored * 3, dtype=np.float32).reshape(scored, 3)
    values[:1, 2] = np.nan
    footer = Footer(
        fingerprint="f",
        shard=number,
        scored=scored,
        rejected=rejected,
        tokens=9 * scored,
        digest="d",
        share=0.5,
    )
    return Shard(footer=footer, samples=samples, rejected=lost, columns=COLUMNS, scores=values)


def test_a_shard_comes_back_as_it_was_written(tmp_path: Path) -> None:
    prepare(tmp_path)
    write_shard(tmp_path, shard())
    assert footer_of(tmp_path, 0) == shard().footer
    (table,) = tables(tmp_path, 1)
    rows = table.to_pylist()
    assert [row["row"] for row in rows] == [0, 1, 2]
    assert (rows[0]["n_prompt_tokens"], rows[0]["n_response_tokens"]) == (4, 4)
    assert [row[COLUMNS[0]] for row in rows] == [0.0, 3.0, 6.0]
    assert [row[COLUMNS[2]] for row in rows] == [None, 5.0, 8.0]
    (lost,) = rejected_tables(tmp_path, 1)
    assert lost.to_pylist()[0]["reason"] == "why ?"
    (narrow,) = tables(tmp_path, 1, ["row"])
    assert narrow.column_names == ["row"]


@pytest.mark.parametrize("which", [scores_path, rejected_path])
def test_no_cut_leaves_a_shard_that_passes_for_whole(tmp_path: Path, which: Any) -> None:
    prepare(tmp_path)
    write_shard(tmp_path, shard())
    path = which(tmp_path, 0)
    whole = path.read_bytes()
    for length in range(0, len(whole), 23):
        path.write_bytes(whole[:length])
        assert footer_of(tmp_path, 0) is None
    for spoiled in (b"PAR1" + whole[40:], whole[:4] + whole[60:]):
        path.write_bytes(spoiled)
        assert footer_of(tmp_path, 0) is None
    path.write_bytes(whole)
    assert footer_of(tmp_path, 0) == shard().footer


@pytest.mark.parametrize("which", [scores_path, rejected_path])
def test_no_spoiled_byte_passes_for_what_was_written(tmp_path: Path, which: Any) -> None:
    """Every byte in turn is another."""
    prepare(tmp_path)
    write_shard(tmp_path, shard())
    path = which(tmp_path, 0)
    whole = path.read_bytes()
    reader = tables if which is scores_path else rejected_tables
    (wanted,) = (table.to_pylist() for table in reader(tmp_path, 1))
    assert len(wanted) == (3 if which is scores_path else 2)
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << at % 8)]) + whole[at + 1 :])
        assert footer_of(tmp_path, 0) is None
        if at % 50 == 0:
            with pytest.raises(FlagError, match=path.name):
                list(reader(tmp_path, 1))
    path.write_bytes(whole)
    assert footer_of(tmp_path, 0) == shard().footer


def test_others_read_a_sealed_file_as_parquet(tmp_path: Path) -> None:
    prepare(tmp_path)
    write_shard(tmp_path, shard())
    found = pandas.read_parquet(scores_path(tmp_path, 0))
    assert found["row"].tolist() == [0, 1, 2]
    assert pq.read_table(tmp_path / "scores").num_rows == 3


def test_shards_that_are_empty_or_have_nothing_rejected(tmp_path: Path) -> None:
    prepare(tmp_path)
    write_shard(tmp_path, shard(0))
    write_shard(tmp_path, shard(0, rejected=0))  # what was rejected before is gone
    write_shard(tmp_path, shard(1, scored=0))
    assert [one.shard for one in footers(tmp_path)] == [0, 1]
    assert not rejected_path(tmp_path, 0).exists()
    assert [table.num_rows for table in tables(tmp_path, 2)] == [3, 0]


def test_a_shard_under_another_name_counts_for_nothing(tmp_path: Path) -> None:
    prepare(tmp_path)
    write_shard(tmp_path, shard(0))
    scores_path(tmp_path, 0).rename(scores_path(tmp_path, 7))
    assert list(footers(tmp_path)) == []


def test_drafts_of_killed_writes_are_cleared_away(tmp_path: Path) -> None:
    prepare(tmp_path)
    ending = "0123456789abcdef.tmp"
    for name in (f".manifest.json.{ending}", f"scores/.part-000000.parquet.{ending}"):
        (tmp_path / name).write_bytes(b"half")
    others = [tmp_path / name for name in (".notes.tmp", ".d.jsonl.tmp", ".a.0.tmp", f".{ending}")]
    for other in others:
        other.write_bytes(b"mine")
    prepare(tmp_path)
    with flag_manifest.alone(tmp_path):
        assert sorted(tmp_path.rglob("*.tmp")) == sorted(others)


def test_a_folder_without_room_for_a_lock_is_refused(tmp_path: Path) -> None:
    (tmp_path / ".lock").mkdir()
    with (
        pytest.raises(FlagError, match=r"nothing can be written.*Flags\.load"),
        flag_manifest.alone(tmp_path),
    ):
        pass


def test_a_full_disk_is_one_error_and_leaves_no_draft(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(tmp_path)

    def full(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(FlagError, match=r"part-000000\.parquet.*No space left"):
        write_shard(tmp_path, shard(rejected=0))
    assert not list(tmp_path.rglob("*part*"))


def test_a_durable_write_syncs_the_file_and_then_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    for name in ("write", "fsync", "replace"):
        real = getattr(os, name)

        def noted(*given: Any, name: str = name, real: Any = real) -> Any:
            done.append(name)
            return real(*given)

        monkeypatch.setattr(os, name, noted)
    files.write_durably(tmp_path / "a", b"x" * (files.PIECE + 1))
    assert done == ["write", "write", "fsync", "replace", "fsync"]
    assert (tmp_path / "a").read_bytes() == b"x" * (files.PIECE + 1)
    done.clear()
    with files.written_durably(tmp_path / "b") as draft:
        draft.write_bytes(b"copy")
    assert done == ["fsync", "replace", "fsync"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_a_torn_manifest_is_written_anew_for_the_same_scan_only(tmp_path: Path) -> None:
    hooked, rows = model(), [{"messages": chat} for chat in chats(9)]
    out = tmp_path / "out"
    wanted = scores(pv.flag(hooked, rows, bank(), out=out, shard_rows=4))
    whole = (out / "manifest.json").read_bytes()
    for share in (0.0, 0.5, 0.99):
        (out / "manifest.json").write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(FlagError, match="no readable manifest"):
            pv.flag(hooked, rows, bank(), out=out, shard_rows=5)
        assert scores(pv.flag(hooked, rows, bank(), out=out, shard_rows=4)) == wanted
        assert (out / "manifest.json").read_bytes() == whole


@pytest.mark.parametrize("content", ["[]", "{}", '{"format": 2}'])
def test_a_manifest_of_something_else_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(FlagError, match="no manifest of format 1"):
        pv.Flags.load(tmp_path)
    with pytest.raises(FlagError, match="no manifest of format 1"):
        pv.flag(model(), [{"messages": chats(1)[0]}], bank(), out=tmp_path)


def test_a_folder_without_a_scan_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FlagError, match=r"no manifest\.json"):
        pv.Flags.load(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(FlagError, match="nothing can be written"):
        prepare(tmp_path / "file")


def test_fingerprints_see_everything_but_the_probe() -> None:
    asked = {"model": {"id": "a", "probe": [1.0]}, "bank": {"x": 1}}
    same = {"bank": {"x": 1}, "model": {"probe": [1.001], "id": "a"}}
    assert flag_manifest.fingerprint(asked) == flag_manifest.fingerprint(same)
    other = {**asked, "bank": {"x": 2}}
    assert flag_manifest.fingerprint(asked) != flag_manifest.fingerprint(other)
    assert replace(shard().footer, shard=1) != shard().footer
