"""The contracts of import-linter hold here, and break on a copy that violates each of them."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LINT = """
import sys
sys.path[:0] = [".", "kernels"]
from importlinter.cli import lint_imports
sys.exit(lint_imports(no_cache=True))
"""
# One line each, appended to a module of the copy, and what the linter must say about it.
VIOLATIONS = {
    "upward": ("pvcore/errors.py", "import pvcore.sites", "pvcore.errors -> pvcore.sites"),
    "sideways": ("pvcore/spans.py", "import pvcore.sites", "pvcore.spans -> pvcore.sites"),
    "without a floor": ("pvcore/cellar.py", "", "cellar"),
    "nnsight": ("pvcore/sites.py", "import nnsight", "pvcore.sites -> nnsight"),
    "TransformerLens": (
        "pvcore/spans.py",
        "import transformer_lens",
        "pvcore.spans -> transformer_lens",
    ),
    "Triton": ("pvcore/spans.py", "import triton", "pvcore.spans -> triton"),
    "a model in a kernel": (
        "kernels/pvcore_kernels/reference.py",
        "import transformers",
        "pvcore_kernels.reference -> transformers",
    ),
    "pvcore in a kernel": (
        "kernels/pvcore_kernels/reference.py",
        "import pvcore.errors",
        "pvcore_kernels.reference -> pvcore.errors",
    ),
}


def lint(root: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", LINT]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)


def test_every_module_keeps_to_its_floor_and_its_door() -> None:
    result = lint(ROOT)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = tmp_path_factory.mktemp("broken")
    shutil.copy(ROOT / "pyproject.toml", root)
    for package in ("pvcore", "kernels"):
        shutil.copytree(ROOT / package, root / package, ignore=shutil.ignore_patterns("*.pyc"))
    for module, line, _ in VIOLATIONS.values():
        with (root / module).open("a", encoding="utf-8") as file:
            file.write(f"\n{line}\n")
    result = lint(root)
    assert result.returncode == 1, result.stdout + result.stderr
    return result.stdout


@pytest.mark.parametrize("kind", VIOLATIONS)
def test_the_linter_can_fail(broken: str, kind: str) -> None:
    assert VIOLATIONS[kind][2] in broken
