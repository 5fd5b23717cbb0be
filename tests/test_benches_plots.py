"""Plots: drawn from records alone, the same to the byte, and absent where there is nothing."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from typer.testing import CliRunner

from benches import plots, record, report
from benches.gpu_workload import Ceilings, binds, floor_us, points
from benches.plots import Absent
from benches.record import Cell, Record

SVG = "{http://www.w3.org/2000/svg}"
COST = Record(
    name="overhead",
    command="x",
    commit="0",
    date="2026-11-28",
    versions={},
    device={"kind": "cpu"},
    workload={},
    checks={},
    cells={
        f"batch {batch}/{row}/decoding": Cell(
            status="measured", p20=low, p50=low + 0.01, p80=low + 0.03, n=9
        )
        for batch, shift in ((1, 0.0), (8, 0.02))
        for row, low in (("taps on, `hf.generate`", 0.99 + shift), ("steer", 1.02 + shift))
    }
    | {
        "batch 1/steer/wall clock": Cell(status="measured", p20=5.0, p50=6.0, p80=7.0, n=9),
        "batch 1/traced/decoding": Cell(status="unsupported"),
    },
)


def device_record() -> Record:
    """What a device of 4 TB/s and 800 TFLOP/s would give with kernels at 70 % of its roof."""
    ceilings = Ceilings(copy_bytes_per_us=4e6, flops_per_us=8e8)
    cells = {
        "this GPU/a copy of 1 GiB/rate": measured(4000.0, "GB/s"),
        "this GPU/a product of 8192/rate": measured(800.0, "TFLOP/s"),
    }
    for point in points():
        for op, moved in (("project", point.read), ("steer and project", point.steered)):
            us = 2.0 + floor_us(moved, point.flops, ceilings) / 0.7
            label = f"{point.d} wide: {op}/{point}, {binds(point, ceilings)} bind/time"
            cells[label] = measured(us, "us")
        label = f"{point.d} wide: mm/{point}, {binds(point, ceilings)} bind/time"
        cells[label] = measured(1.0, "us")
    return replace(COST, name="gpu_kernels", cells=cells)


def measured(value: float, unit: record.Unit) -> Cell:
    return Cell(status="measured", p20=value, p50=value, p80=value, n=15, unit=unit)


def texts(svg: str) -> list[str]:
    return [node.text or "" for node in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def test_each_way_and_batch_is_drawn_where_its_figures_are() -> None:
    svg = plots.overhead(COST)
    shown = texts(svg)
    assert {"taps on, hf.generate", "steer", "batch 1", "batch 8"} <= set(shown)
    assert "traced" not in shown
    assert not any("6.0" in text for text in shown)
    slower = {
        label: replace(cell, p50=1.05, p80=1.06) if label == "batch 1/steer/decoding" else cell
        for label, cell in COST.cells.items()
    }
    assert plots.overhead(replace(COST, cells=slower)) != svg
    assert plots.overhead(COST) == svg
    beside = {"beside bare hooks, batch 1/steer/decoding": COST.cells["batch 1/steer/decoding"]}
    assert plots.overhead(replace(COST, cells=COST.cells | beside)) == svg


def test_a_plot_brings_its_own_ground_in_either_theme() -> None:
    svg = plots.overhead(COST)
    assert "prefers-color-scheme:dark" in svg
    assert svg.count('<rect width="100%" height="100%" style="fill: var(--surface)"/>') == 1
    for used in set(re.findall(r"var\(--([\w-]+)", svg)) - {"font"}:
        assert svg.count(f"--{used}:") == 2, used


def test_the_roofline_holds_every_measured_kernel_and_the_roof() -> None:
    found = device_record()
    svg = plots.roofline(found)
    shown = texts(svg)
    assert {"project", "steer and project", "1 row", "65,536 rows", "TFLOP/s"} <= set(shown)
    assert shown.count("800 TFLOP/s, 4.00 TB/s") == 2
    assert svg.count("<use ") >= 2 * len(list(points()))
    assert plots.roofline(found) == svg
    op, point, us = plots._points(found)[0]
    intensity, rate = plots._place(op, point, us)
    assert intensity == point.flops / point.read
    assert rate == pytest.approx(point.flops / us / 1e6)
    # No kernel does better than the roof.
    for op, point, us in plots._points(found):
        intensity, rate = plots._place(op, point, us)
        assert rate <= min(800.0, 4.0 * intensity)


def test_a_record_that_cannot_be_drawn_says_why() -> None:
    nothing = {"a/b/c": Cell(status="not measured", reason="no GPU")}
    for draw in (plots.overhead, plots.roofline):
        with pytest.raises(Absent, match="not measured, no GPU"):
            draw(replace(COST, cells=nothing))
    with pytest.raises(Absent, match="not measured"):
        plots.roofline(COST)


DOCUMENT = """Costs: <!-- plot: overhead --><!-- end -->
<!-- plot: roofline -->
<!-- end -->
"""


@pytest.fixture
def document(tmp_path: Path) -> Path:
    path = tmp_path / "README.md"
    path.write_text(DOCUMENT)
    record.write(COST, tmp_path / "results")
    return path


def told(document: Path, *words: str) -> tuple[int, str]:
    results = str(document.parent / "results")
    done = CliRunner().invoke(report.app, [str(document), "--results", results, *words])
    return done.exit_code, done.output


def test_plots_are_written_beside_the_records_and_checked_byte_for_byte(document: Path) -> None:
    image = document.parent / "results" / "overhead.svg"
    assert told(document, "--check")[0] == 1
    assert not image.exists()
    code, output = told(document)
    assert code == 0
    assert "README.md: overhead.svg rendered" in output
    assert image.read_text() == plots.overhead(COST)
    text = document.read_text()
    assert "![Decode time of each way" in text
    assert "](benches/results/overhead.svg)" in text
    assert "*roofline: not measured*" in text
    assert told(document, "--check") == (0, "")
    whole = image.read_bytes()
    digits = [at for at, byte in enumerate(whole) if chr(byte).isdigit()]
    for at in digits[:: len(digits) // 7]:
        edited = bytearray(whole)
        edited[at] = ord("0") + (edited[at] - ord("0") + 1) % 10
        image.write_bytes(bytes(edited))
        assert "overhead.svg differs from its record" in told(document, "--check")[1]
    assert told(document)[0] == 0
    assert image.read_bytes() == whole


def test_a_changed_record_makes_the_check_fail_until_it_is_drawn_again(document: Path) -> None:
    told(document)
    path = document.parent / "results" / "overhead.json"
    path.write_text(path.read_text().replace("1.05", "1.051"))
    assert told(document, "--check")[0] == 1
    assert told(document)[0] == 0
    assert told(document, "--check") == (0, "")


def test_a_plot_without_its_figures_goes_away(document: Path) -> None:
    told(document)
    nothing = {"a/b/c": Cell(status="not measured", reason="too slow here")}
    record.write(replace(COST, cells=nothing), document.parent / "results")
    code, output = told(document, "--check")
    assert code == 1
    assert "overhead.svg differs" in output
    told(document)
    assert not (document.parent / "results" / "overhead.svg").exists()
    assert "*overhead: not measured, too slow here*" in document.read_text()


def test_an_unknown_plot_is_an_error(document: Path) -> None:
    document.write_text("<!-- plot: nothing --><!-- end -->")
    for words in ([], ["--check"]):
        code, output = told(document, *words)
        assert code == 1
        assert "got a plot 'nothing'" in output
