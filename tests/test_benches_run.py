"""The command line: JSON alone on standard output, and a model where it makes sense."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from benches import record, run, scaling
from benches.record import ROOT, Record
from tests.test_benches import sample


def test_json_is_all_there_is_on_standard_output(tmp_path: Path) -> None:
    words = ["-m", "benches.run", "kernels", "--quick", "--rounds", "1", "--json"]
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    done = subprocess.run(
        [sys.executable, *words, "--out", str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    assert record.parsed(json.loads(done.stdout), "stdout") == record.read(
        tmp_path / "kernels.json"
    )
    assert "wrote kernels.json" in done.stderr


def test_what_a_measurement_prints_goes_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(*_: object, **__: object) -> Record:
        print("a library says hello")
        return sample()

    monkeypatch.setattr(run.overhead, "measure", measure)
    shown = CliRunner().invoke(run.app, ["overhead", "--quick", "--json"])
    assert json.loads(shown.stdout)["name"] == "overhead"
    assert "hello" in shown.stderr
    assert "hello" in CliRunner().invoke(run.app, ["overhead", "--quick"]).stdout


@pytest.mark.parametrize("name", ["overhead", "compiled", "grid", "scaling", "peers"])
def test_a_model_is_measured_in_place_of_the_shape(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[Any] = []

    def measure(settings: Any, *, command: str) -> Record:
        asked.append((settings.model, command))
        return sample(name=name)

    monkeypatch.setattr(getattr(run, name), "measure", measure)
    given = tmp_path / "config.json"
    given.write_text("{}")
    shown = CliRunner().invoke(run.app, [name, "--quick", "--model", str(given)])
    assert shown.exit_code == 0, shown.output
    model, command = asked[0]
    assert model == str(given)
    # A command that names a place of one machine could not be repeated on another.
    assert "--model config.json" in command
    assert str(tmp_path) not in command


def test_kernels_take_a_model_s_width(monkeypatch: pytest.MonkeyPatch) -> None:
    widths: list[int] = []

    def measure(settings: Any, *, command: str) -> Record:
        widths.append(settings.width)
        assert "--model benches/shapes/qwen2.5-0.5b.json" in command
        return sample(name="kernels")

    monkeypatch.setattr(run.kernels, "measure", measure)
    shape = ROOT / "benches" / "shapes" / "qwen2.5-0.5b.json"
    shown = CliRunner().invoke(run.app, ["kernels", "--quick", "--model", str(shape)])
    assert (shown.exit_code, widths) == (0, [896]), shown.output


def test_an_unknown_peer_is_refused_before_anything_runs() -> None:
    shown = CliRunner().invoke(run.app, ["peers", "--quick", "--only", "nobody"])
    assert shown.exit_code == 2
    assert "got nobody" in shown.output


def test_every_command_with_figures_compares_them() -> None:
    from typer.main import get_command

    commands = get_command(run.app).commands  # type: ignore[attr-defined]
    options = {name: {one.name for one in command.params} for name, command in commands.items()}
    assert all("as_json" in found for found in options.values())
    claims = {"extraction", "flags", "million", "kills"}
    assert {name for name, found in options.items() if "base" not in found} == claims
    assert {name for name, found in options.items() if "model" in found} == {
        *("overhead", "breakdown", "compiled", "grid", "scaling", "peers", "kernels"),
    }
    assert scaling.Settings().model is None
