"""`kernels/` never shadows Hugging Face's package of that name, and the wheel holds the library."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from transformers.utils import import_utils

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {"pvcore": "pvcore", "kernels/pvcore_kernels": "pvcore_kernels"}
UNSHIPPED = shutil.ignore_patterns("__pycache__", "*.pyc")

BUILD_A_MODEL = """
import sys
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.utils.import_utils import is_kernels_available
Qwen2ForCausalLM(Qwen2Config(
    vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
    num_attention_heads=2, num_key_value_heads=1, bos_token_id=0, eos_token_id=0,
))
print(is_kernels_available(), getattr(sys.modules.get("kernels"), "__file__", None))
"""
# As much of Hugging Face's `kernels` as transformers uses while a model is built.
STAND_IN = """
def _leave_unchanged(*names):
    return lambda decorated: decorated

use_kernel_forward_from_hub = use_kernelized_func = _leave_unchanged

def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return type(name, (), {})
"""


@pytest.fixture(scope="module")
def hugging_face_kernels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for sys.path that holds a stand-in of the distribution `kernels`."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "kernels").mkdir()
    (folder / "kernels/__init__.py").write_text(STAND_IN)
    metadata = folder / f"kernels-{import_utils.KERNELS_MIN_VERSION}.dist-info/METADATA"
    metadata.parent.mkdir()
    metadata.write_text(
        f"Metadata-Version: 2.1\nName: kernels\nVersion: {import_utils.KERNELS_MIN_VERSION}\n"
    )
    return folder


def build_a_model(root: Path, *site: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, site))}
    return subprocess.run(
        [sys.executable, "-c", BUILD_A_MODEL],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("folder", ["kernels", "tests/kernels"])
def test_no_folder_named_kernels_is_a_package(folder: str) -> None:
    assert not (ROOT / folder / "__init__.py").exists()


def test_transformers_builds_a_model_from_the_root_without_hf_kernels() -> None:
    result = build_a_model(ROOT)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["False", "None"]


def test_transformers_builds_a_model_from_the_root_with_hf_kernels(
    hugging_face_kernels: Path,
) -> None:
    result = build_a_model(ROOT, hugging_face_kernels)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["True", str(hugging_face_kernels / "kernels/__init__.py")]


def test_a_package_named_kernels_would_break_transformers(
    tmp_path: Path, hugging_face_kernels: Path
) -> None:
    shutil.copytree(ROOT / "kernels", tmp_path / "kernels", ignore=UNSHIPPED)
    (tmp_path / "kernels/__init__.py").touch()
    result = build_a_model(tmp_path, hugging_face_kernels)
    assert result.returncode != 0
    assert "cannot import name 'CUDAProperties' from 'kernels'" in result.stderr


# Besides typer, which older ones do without.
WITH_TRANSFORMERS = {
    "transformers",
    "numpy",
    "packaging",
    "pyyaml",
    "regex",
    "safetensors",
    "tokenizers",
    "tqdm",
}


def needs(name: str) -> set[str]:
    """What a distribution cannot do without here, itself included."""
    found, left = set[str](), [name]
    while left:
        one = canonicalize_name(left.pop())
        if one not in found:
            found.add(one)
            listed = map(Requirement, metadata.requires(one) or ())
            left += [r.name for r in listed if r.marker is None or r.marker.evaluate({"extra": ""})]
    return found


def test_the_wheels_for_a_gpu_machine_are_all_that_it_lacks() -> None:
    written = (ROOT / "Makefile").read_text().replace("\\\n", " ")
    (line,) = re.findall(r"^GPU_WHEELS := (.*)$", written, re.MULTILINE)
    taken = {canonicalize_name(name) for name in line.split()}
    there = needs("torch") | needs("triton") | needs("huggingface-hub") | WITH_TRANSFORMERS
    wanted = set[str]().union(*map(needs, taken))
    assert {"pydantic-core", "greenlet", "mdurl"} <= wanted - there
    assert wanted - there <= taken


def build_wheel(root: Path, out: Path) -> set[str]:
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(out)]
    subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    (wheel,) = out.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def library_files(root: Path) -> set[str]:
    return {
        f"{shipped}/{path.relative_to(root / source).as_posix()}"
        for source, shipped in PACKAGES.items()
        for path in (root / source).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def copy_of_the_project(folder: Path) -> Path:
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, folder)
    for name in ("pvcore", "kernels", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=UNSHIPPED)
    return folder


def test_the_wheel_holds_both_packages_whole_and_nothing_else(tmp_path: Path) -> None:
    shipped = build_wheel(ROOT, tmp_path)
    assert shipped == library_files(ROOT)
    assert {"pvcore/py.typed", "pvcore_kernels/py.typed"} <= shipped


def test_the_wheel_guard_can_fail(tmp_path: Path) -> None:
    root = copy_of_the_project(tmp_path)
    settings = (root / "pyproject.toml").read_text()
    (root / "pyproject.toml").write_text(settings.replace('"kernels/pvcore_kernels"', '"tests"', 1))
    shipped = build_wheel(root, tmp_path / "out")
    assert "pvcore_kernels/__init__.py" in library_files(root) - shipped
    assert "tests/conftest.py" in shipped - library_files(root)
