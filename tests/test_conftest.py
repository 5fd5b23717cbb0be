"""The account of skipped tests: three reasons pass, any other turns a green run red."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

CONFTEST = Path(__file__).with_name("conftest.py")


def run_pytest(folder: Path, body: str, *options: str) -> subprocess.CompletedProcess[str]:
    (folder / "conftest.py").write_text(CONFTEST.read_text())
    (folder / "test_probe.py").write_text(body)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options, "."]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


SKIP_ONE = """
import pytest

def test_runs():
    pass

def test_skips():
    pytest.skip({reason!r})
"""
SKIP_MODULE = "import pytest\npytest.skip({reason!r}, allow_module_level=True)\n"


@pytest.mark.parametrize(("body", "options"), [(SKIP_ONE, ("-n", "1")), (SKIP_MODULE, ())])
def test_a_skip_for_another_reason_fails_the_run(
    tmp_path: Path, body: str, options: tuple[str, ...]
) -> None:
    result = run_pytest(tmp_path, body.format(reason="flaky on Mondays"), *options)
    assert result.returncode == 1, result.stdout
    assert "SKIPPED FOR NO ALLOWED REASON: flaky on Mondays" in result.stdout


def test_a_skip_for_want_of_a_gpu_is_counted_and_passes(tmp_path: Path) -> None:
    result = run_pytest(tmp_path, SKIP_ONE.format(reason="no GPU"))
    assert result.returncode == 0, result.stdout
    assert "skipped, no GPU: 1" in result.stdout
