# ruff: noqa: RUF001 (readers get true minus signs and multiplication signs)
"""Two records side by side: old, new, change, and no comparison of unlike things."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from benches import compare, record, run
from benches.compare import MARK, at_revision, changes, summary
from benches.record import Cell, Record, RecordError

KNOWN: dict[str, Any] = {
    "command": "python -m benches.run kernels",
    "date": "2026-11-24",
    "device": {"kind": "cpu", "cores": 2, "threads": 1},
    "checks": {},
}


def cell(p20: float, p50: float, p80: float) -> Cell:
    return Cell(status="measured", p20=p20, p50=p50, p80=p80, n=9)


OLD = Record(
    name="kernels",
    commit="a" * 40,
    versions={"torch": "2.12.0"},
    workload={"width": 64, "rounds": 9, "slope/one more/decoding": "+1 %"},
    cells={
        "a/far/time": cell(1.0, 1.1, 1.2),
        "a/near/time": cell(1.0, 1.1, 1.2),
        "a/gone/time": cell(1.0, 1.1, 1.2),
        "a/never/time": Cell(status="unsupported"),
    },
    **KNOWN,
)
NEW = Record(
    name="kernels",
    commit="b" * 40,
    versions={"torch": "2.13.0"},
    workload={"width": 64, "rounds": 30, "slope/one more/decoding": "+2 %"},
    cells={
        "a/far/time": cell(1.25, 1.375, 1.5),
        "a/near/time": cell(1.05, 1.21, 1.4),
        "a/never/time": Cell(status="unsupported"),
        "a/come/time": cell(2.0, 2.5, 3.0),
    },
    **KNOWN,
)


def test_a_change_is_told_for_every_figure_of_either_record() -> None:
    found = {one.label: (one.share, one.beyond) for one in changes(OLD, NEW)}
    assert found.pop("a/far/time") == (pytest.approx(0.25), True)
    # 1.1 lies inside 1.05 to 1.4: the new record could have shown the old figure by chance.
    assert found.pop("a/near/time") == (pytest.approx(0.1), False)
    assert found == dict.fromkeys(("a/never/time", "a/come/time", "a/gone/time"), (None, False))


def test_a_change_is_marked_only_if_it_lies_outside_both_spreads() -> None:
    for old, new, beyond in (
        (cell(1.0, 1.1, 1.2), cell(1.19, 1.21, 1.3), True),
        (cell(1.0, 1.1, 1.3), cell(1.19, 1.21, 1.3), False),
        (cell(1.0, 1.1, 1.2), cell(1.1, 1.21, 1.3), False),
        (cell(1.0, 1.1, 1.2), cell(0.7, 0.8, 0.9), True),
    ):
        one, other = (replace(OLD, cells={"a/b/c": it}) for it in (old, new))
        assert [change.beyond for change in changes(one, other)] == [beyond]
        assert [change.beyond for change in changes(other, one)] == [beyond]


def test_the_table_shows_old_new_and_change() -> None:
    lines = summary(OLD, NEW, "v1").splitlines()
    assert (
        f"| a/far/time | 1.100× (1.000 to 1.200) | 1.375× (1.250 to 1.500) | +25.0% | {MARK} |"
        in (lines)
    )
    assert (
        "| a/near/time | 1.100× (1.000 to 1.200) | 1.210× (1.050 to 1.400) | +10.0% |  |" in lines
    )
    assert "| a/gone/time | 1.100× (1.000 to 1.200) | – | – |  |" in lines
    assert "| a/never/time | unsupported | unsupported | – |  |" in lines
    assert "1 of 5 figures changed by more than both spreads." in lines[0]
    assert lines[-1] == "Other versions: torch 2.12.0 then, 2.13.0 now."
    still = replace(NEW, cells={"a/far/time": cell(1.0, 1.0999, 1.2)})
    assert "| +0.0% |  |" in summary(OLD, still, "v1")
    back = summary(NEW, OLD, "v1")
    assert f"| −20.0% | {MARK} |" in back


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"device": KNOWN["device"] | {"cores": 4}}, "another device: cores 4 then, 2 now"),
        ({"workload": {"width": 128}}, "another workload: width 128 then, 64 now"),
        ({"workload": {"width": 64, "bank": "float32"}}, "bank float32 then, – now"),
        ({"name": "overhead"}, "another name"),
        ({"cells": {}}, "without figures"),
    ],
)
def test_unlike_records_are_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(RecordError, match=message):
        changes(replace(OLD, **changed), NEW)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A repository with the old record committed and tagged."""
    results = tmp_path / "benches" / "results"
    record.write(OLD, results)

    def git(*words: str) -> None:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b.example"]
        subprocess.run(["git", *identity, *words], cwd=tmp_path, check=True)

    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "first")
    git("tag", "v1")
    return tmp_path


def test_a_record_is_read_where_it_was_committed(checkout: Path) -> None:
    record.write(NEW, checkout / "benches" / "results")
    assert at_revision("v1", "kernels", checkout) == OLD
    assert at_revision("HEAD", "kernels", checkout) == OLD
    for ref, name in (("v2", "kernels"), ("v1", "overhead"), ("--output=x", "kernels")):
        with pytest.raises(RecordError, match=r"got (no overhead|no kernels|revision)"):
            at_revision(ref, name, checkout)
    assert not (checkout / "x").exists()


Command = Callable[..., Any]


@pytest.fixture
def command(checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """`benches.run kernels` in the checkout, with the new record beside it."""
    out = tmp_path / "now"
    record.write(NEW, out)
    found = at_revision
    monkeypatch.setattr(compare, "at_revision", lambda ref, name: found(ref, name, checkout))

    def invoke(*words: str) -> Any:
        return CliRunner().invoke(run.app, ["kernels", "--out", str(out), *words])

    return invoke


def test_the_command_compares_and_measures_nothing(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run.kernels, "measure", lambda *_, **__: pytest.fail("measured"))
    shown = command("--base", "v1")
    assert shown.exit_code == 0, shown.output
    assert "+25.0%" in shown.stdout
    as_json = command("--base", "v1", "--json")
    figures = json.loads(as_json.stdout)["figures"]
    assert figures["a/far/time"]["change"] == pytest.approx(0.25)
    assert [name for name, one in figures.items() if one["beyond both spreads"]] == ["a/far/time"]


def test_the_command_refuses_what_it_cannot_compare(command: Command) -> None:
    refused = command("--base", "v2", "--json")
    assert (refused.exit_code, refused.stdout) == (1, "")
    assert "got no kernels.json at 'v2'" in refused.stderr
    for words in (["--quick"], ["--rounds", "3"], ["--model", "x"]):
        assert command("--base", "v1", *words).exit_code == 2
