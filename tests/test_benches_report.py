# ruff: noqa: RUF001 (readers get true minus signs and multiplication signs)
"""Documents show what was measured, digit by digit."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from benches import record, report, tables
from benches.demo_table import demo_summary
from benches.record import Cell, Check, Record, RecordError
from benches.study_table import study_summary

DOCUMENT = """# pvcore
Steering costs <!-- figure: overhead/batch 1/steer/CPU time -->?<!-- end --> of plain generation.

<!-- figures: overhead -->
<!-- end -->

<!-- figures: reading --><!-- end -->
"""
RECORD = Record(
    name="overhead",
    command="python -m benches.run overhead --rounds 40",
    commit="0123456789abcdef0123",
    date="2026-11-24",
    versions={"python": "3.11.7", "torch": "2.13.0"},
    device={"kind": "cpu", "cores": 2, "threads": 1},
    workload={"ratio": "time beside plain", "hidden": 256, "layers": 8},
    checks={"tokens": Check(worst=0, bound=0), "scores": Check(worst=1e-7, bound=1e-5)},
    cells={
        "batch 1/steer/CPU time": Cell(
            status="measured", p20=1.0052, p50=1.0149, p80=1.0333, n=40, target=1.02
        ),
        "batch 1/steer/wall clock": Cell(status="measured", p20=2.0, p50=2.5, p80=3.0, n=40),
        "batch 1/trace/CPU time": Cell(status="unsupported", reason="no tracing here"),
        "batch 8/steer/CPU time": Cell(status="not measured"),
    },
)
DEMO: dict[str, Any] = {
    "name": "demo",
    "status": "measured",
    "command": "pvcore demo",
    "commit": "abcdef",
    "versions": {"torch": "2.13.0"},
    "device": "cpu",
    "threads": 1,
    "model": "pvcore/persona-world",
    "judge": "grammar",
    "workload": {"layers": [1, 2]},
    "vectors": [{"trait": "evil", "kept": 90}, {"trait": "humor", "kept": 80}],
    "doses": [
        {
            "trait": trait,
            "layer": layer,
            "coefficients": [0.0, 1.0, 2.0],
            "scores": [1.25, 60.0 + layer, 99.0],
            "coherence": [97.0, 88.0, coherence],
            "control_scores": [1.25, 2.0, None],
            "control_coherence": [97.0, 96.0, 95.0],
        }
        for trait, coherence in (("evil", 20.0), ("humor", 75.0))
        for layer in (1, 2)
    ],
    "monitoring": [
        {"trait": "humor", "layer": 2, "overall": -0.5, "within": None},
        {"trait": "evil", "layer": 2, "overall": 0.914, "within": 0.456},
    ],
    "claims": [{"name": "a", "passed": True}, {"name": "b", "passed": False}],
}


SPREAD = {"mean": 7.25, "error": 1.5, "seeds": [6.0, 8.5]}
STUDY: dict[str, Any] = {
    "command": "python -m pvcore.world.study",
    "commit": "abcdef",
    "date": "2026-11-28",
    "versions": {"torch": "2.13.0"},
    "device": "cpu",
    "design": {"seeds": [0, 1]},
    "claims": [{"claim": "c", "measured": "7.2 ± 1.5", "bound": "above 0", "passed": True}],
    "summary": {
        "margins": [
            {
                "trait": "evil",
                "way": "prevent",
                "than": "inference",
                "coherence": SPREAD,
                "quiz": {"mean": None, "error": None, "seeds": []},
            }
        ]
    },
}


def test_a_study_is_told_by_its_claims_and_margins() -> None:
    told = study_summary(STUDY)
    assert "| c | 7.2 ± 1.5 | above 0 | yes |" in told
    assert "| evil: prevent against inference | 7.2 ± 1.5 | no common score |" in told
    assert "over 2 seeds. Measured: 2026-11-28; cpu; torch 2.13.0;" in told
    for key in ("claims", "summary", "design", "date"):
        with pytest.raises(RecordError, match="without a figure"):
            study_summary({name: one for name, one in STUDY.items() if name != key})


@pytest.fixture
def results(tmp_path: Path) -> Path:
    record.write(RECORD, tmp_path / "results")
    return tmp_path / "results"


@pytest.fixture
def document(tmp_path: Path) -> Path:
    path = tmp_path / "README.md"
    path.write_text(DOCUMENT)
    return path


def run(*words: object) -> tuple[int, str]:
    result = CliRunner().invoke(report.app, [str(word) for word in words])
    return result.exit_code, result.output


def test_the_readme_shows_every_record() -> None:
    texts = [document.read_text() for document in report.DOCUMENTS]
    assert {what for text in texts for what in report.regions(text)} >= set(report.KNOWN)
    assert [report.drifted(text) for text in texts] == [[]] * len(texts)


def test_figures_are_rendered_between_their_markers(document: Path, results: Path) -> None:
    assert run(document, "--results", results) == (
        0,
        "README.md: overhead/batch 1/steer/CPU time rendered\nREADME.md: overhead rendered\n"
        "README.md: reading rendered\n",
    )
    text = document.read_text()
    assert "CPU time -->1.015×<!-- end --> of plain generation." in text
    assert "| steer | 1.015× (1.005 to 1.033) | 2.50× (2.00 to 3.00) | ≤ 1.02× |" in text
    assert "<!-- figures: reading -->\n*reading: not measured*\n<!-- end -->" in text
    assert re.sub(r"-->.*?<!-- end", "--><!-- end", text, flags=re.DOTALL) == re.sub(
        r"-->.*?<!-- end", "--><!-- end", DOCUMENT, flags=re.DOTALL
    )


def test_the_interval_of_a_median_stands_behind_it() -> None:
    label = "batch 1/steer/CPU time"
    sure = Cell(status="measured", p20=1.0, p50=1.2, p80=1.4, n=9, low=1.1, high=1.25)
    told = tables.summary(replace(RECORD, cells=RECORD.cells | {label: sure}))
    assert "| steer | 1.200× [1.100 to 1.250] (1.000 to 1.400) |" in told
    assert "median [95% interval of the median] (p20 to p80)" in told
    assert "interval" not in tables.summary(RECORD)


def test_the_check_passes_on_what_was_rendered_and_changes_nothing(
    document: Path, results: Path
) -> None:
    assert run(document, "--results", results, "--check")[0] == 1
    assert document.read_text() == DOCUMENT
    run(document, "--results", results)
    text = document.read_text()
    assert run(document, "--results", results, "--check") == (0, "")
    assert run(document, "--results", results) == (0, "")
    assert document.read_text() == text


def test_the_check_fails_when_any_digit_of_a_region_is_edited(
    document: Path, results: Path
) -> None:
    run(document, "--results", results)
    text = document.read_text()
    inside = [
        at
        for region in report.REGION.finditer(text)
        for at in range(region.start("held"), region.end("held"))
        if text[at].isdigit()
    ]
    assert len(inside) > 60
    for at in inside:
        edited = text[:at] + str((int(text[at]) + 1) % 10) + text[at + 1 :]
        assert len(report.drifted(edited, results)) == 1
    document.write_text(edited)
    code, output = run(document, "--results", results, "--check")
    assert code == 1
    assert "overhead differs from its record; run python -m benches.report" in output


def test_the_check_fails_when_a_record_changes(document: Path, results: Path) -> None:
    run(document, "--results", results)
    path = results / "overhead.json"
    path.write_text(path.read_text().replace("1.0149", "1.0249"))
    code, output = run(document, "--results", results, "--check")
    assert code == 1
    assert output.count("differs from its record") == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- figures: overhead -->\n", "without its own '<!-- end -->'"),
        ("<!-- figures: overhead -->\n<!-- figures: reading -->\n<!-- end -->", "without its own"),
        ("<!-- figures: overheads --><!-- end -->", "got a region of record 'overheads'"),
        ("<!-- figures: ../overhead --><!-- end -->", "got a region of record '../overhead'"),
        ("<!-- figure: overhead/batch 1/steer --><!-- end -->", "got figure 'batch 1/steer'"),
    ],
)
def test_a_region_that_cannot_be_filled_fails_and_leaves_the_document(
    document: Path, results: Path, text: str, message: str
) -> None:
    document.write_text(text)
    for words in ([], ["--check"]):
        code, output = run(document, "--results", results, *words)
        assert code == 1
        assert message in output
    assert document.read_text() == text


def test_a_damaged_record_or_a_missing_document_fails(document: Path, results: Path) -> None:
    (results / "overhead.json").write_text("{}")
    code, output = run(document, "--results", results)
    assert (code, "overhead.json with keys []" in output) == (1, True)
    assert document.read_text() == DOCUMENT
    assert run(document.with_name("NOTHING.md"), "--results", results)[0] == 1


def test_what_has_no_figure_says_why(results: Path) -> None:
    summary = tables.summary(RECORD)
    assert "| trace | unsupported | not measured |  |" in summary
    assert "| steer | not measured |" in summary
    failed = Cell(status="failed", reason="tokens unlike plain's")
    refused = Record(
        **{
            **{name: getattr(RECORD, name) for name in RECORD.__slots__},
            "checks": {"tokens": Check(worst=4, bound=0)},
            "cells": {"batch 1/steer/CPU time": failed},
        }
    )
    summary = tables.summary(refused)
    assert "| steer | failed |" in summary
    assert "No figures, because a check failed: tokens unlike plain's." in summary
    assert "Checks passed before timing: 0 of 1." in summary


def test_a_table_says_what_was_compared_and_where(results: Path) -> None:
    summary = tables.summary(RECORD)
    assert summary.startswith("Time beside plain: median (p20 to p80). Hidden 256, layers 8.")
    assert summary.endswith(
        "Checks passed before timing: 2 of 2. Measured: 2026-11-24; cpu, 2 cores, 1 thread; "
        "python 3.11.7, torch 2.13.0; commit 0123456789ab; "
        "`python -m benches.run overhead --rounds 40`."
    )


def test_the_demo_shows_the_strongest_coherent_dose_and_the_correlations() -> None:
    lines = demo_summary(DEMO).splitlines()
    assert "| evil | 90 | 1.2 | 62.0 | 2.0 | 1 | 88.0 | 0.91 | 0.46 |" in lines
    assert "| humor | 80 | 1.2 | 99.0 | – | 2 | 75.0 | −0.50 | – |" in lines
    assert lines[0].startswith("pvcore/persona-world, judged by grammar, steered at resid_post.2")
    assert lines[-1].startswith("Claims that hold: 1 of 2. Measured: cpu, 1 thread; torch 2.13.0;")


def test_a_demo_record_without_a_needed_figure_is_an_error(tmp_path: Path) -> None:
    needed = set(DEMO) - {"name", "status"}
    for key in needed:
        with pytest.raises(RecordError, match="run the demo again"):
            demo_summary({k: v for k, v in DEMO.items() if k != key})
    (tmp_path / "demo.json").write_text(json.dumps(DEMO))
    text = "<!-- figures: demo --><!-- end -->"
    assert demo_summary(DEMO) in report.rendered(text, tmp_path)


def test_a_record_without_a_figure_is_one_line(tmp_path: Path) -> None:
    cells = {"all/a/time": Cell(status="not measured", reason="no GPU")}
    nothing = Record(
        name="gpu_kernels", command="x", commit="0", date="2026-11-27", versions={}, device={},
        workload={}, cells=cells,
    )  # fmt: skip
    record.write(nothing, tmp_path)
    text = "<!-- figures: gpu_kernels -->\n<!-- end -->"
    assert "*gpu_kernels: not measured, no GPU*" in report.rendered(text, tmp_path)
