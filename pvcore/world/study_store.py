"""Where a study keeps what it has measured, so that it can be stopped and taken up again."""

import hashlib
import json
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pvcore_kernels
from pvcore.errors import PvcoreError
from pvcore.files import write_whole
from pvcore.world.study_cells import Cell, Design

_PACKAGES = (Path(__file__).parents[1], Path(pvcore_kernels.__file__).parent)
MODEL = Path(__file__).parent / "model"
_ABOUT = "design.json"


class StudyError(PvcoreError):
    """A study that cannot be begun, taken up again or told."""


class Store:
    """A folder with one file per measured cell: of one design, one model, one state of the code."""

    def __init__(self, folder: Path, design: Design) -> None:
        self.folder = folder
        wanted = {"design": _plain(asdict(design)), "weights": _weights(), **_made_by()}
        about = folder / _ABOUT
        if about.exists():
            _require_same(_read(about), wanted, folder)
        else:
            folder.mkdir(parents=True, exist_ok=True)
            write_whole(about, _text(wanted))

    def get(self, cell: Cell) -> dict[str, Any] | None:
        """The figures of a cell, or None where it is still to be measured."""
        path = self._path(cell)
        return _read(path) if path.exists() else None

    def put(self, cell: Cell, figures: dict[str, Any]) -> None:
        """Keep the figures of a cell; the file is there whole or not at all."""
        write_whole(self._path(cell), _text(figures))

    def _path(self, cell: Cell) -> Path:
        return self.folder / f"{cell.name}.json"


def _weights() -> str:
    """The hash of the shipped model's weights, which every cell starts from."""
    found: str = _read(MODEL / "manifest.json")["sha256"]["model.safetensors"]
    return found


def _made_by() -> dict[str, str]:
    """What computes the cells: cells of two states of the code are not one study."""
    code = hashlib.sha256()
    for package in _PACKAGES:
        for path in sorted(package.rglob("*")):
            if path.is_file() and path.suffix != ".pyc":
                code.update(path.relative_to(package).as_posix().encode() + b"\0")
                code.update(path.read_bytes() + b"\0")
    return {
        "code": code.hexdigest()[:12],
        **{name: version(name) for name in ("torch", "transformers")},
    }


def _require_same(found: dict[str, Any], wanted: dict[str, Any], folder: Path) -> None:
    before, now = (
        {**one.get("design", {}), **{key: one[key] for key in one if key != "design"}}
        for one in (found, wanted)
    )
    changed = sorted(key for key in {*before, *now} if before.get(key) != now.get(key))
    if changed:
        told = ", ".join(f"{key} {before.get(key)} (now {now.get(key)})" for key in changed)
        raise StudyError(
            f"got a study in {folder} of another design: {told}; wanted the same. Give another "
            "folder, or remove this one"
        )


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise StudyError(f"got {path}, which cannot be read ({error}); remove it") from error
    if not isinstance(found, dict):
        raise StudyError(f"got {path} without figures; remove it, and it is measured again")
    return found


def _text(content: dict[str, Any]) -> bytes:
    return f"{json.dumps(content, indent=1)}\n".encode()


def _plain(content: dict[str, Any]) -> dict[str, Any]:
    """As it comes back from a file: tuples are lists there."""
    plain: dict[str, Any] = json.loads(json.dumps(content))
    return plain
