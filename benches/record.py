"""Records: one measurement as JSON, with all that is needed to repeat and to judge it."""

import json
import os
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from importlib import metadata
from math import isfinite
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from pvcore.errors import PvcoreError
from pvcore.files import write_whole

Status = Literal["measured", "unsupported", "failed", "not measured"]
Unit = Literal["ratio", "us", "ms", "GB/s", "TFLOP/s", "MiB"]
Plain = str | int | float

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benches" / "results"
PACKAGES = ("torch", "transformers", "nnsight", "transformer-lens", "triton")


# Keys that a cell is written without where there is nothing to say.
_MAY_LACK = ("low", "high")


class RecordError(PvcoreError):
    """A record that cannot be trusted, read or written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One figure: the median of `n` paired ratios with p20 and p80, or why there is none.

    Absolute times come from a GPU alone, where the clock is the device's own; bytes are counted
    anywhere. `target` is the figure wanted at most; it decides nothing. `low` to `high` holds the
    median with a confidence of 95%, where there are rounds enough to say so.
    """

    status: Status
    p20: float | None = None
    p50: float | None = None
    p80: float | None = None
    n: int = 0
    unit: Unit = "ratio"
    target: float | None = None
    reason: str = ""
    low: float | None = None
    high: float | None = None

    def __post_init__(self) -> None:
        if self.status not in get_args(Status) or self.unit not in get_args(Unit):
            raise RecordError(f"got a cell of status {self.status!r} and unit {self.unit!r}")
        figures = (self.p20, self.p50, self.p80)
        sure = (self.low, self.high)
        if self.status != "measured":
            if self.n or any(figure is not None for figure in (*figures, *sure)):
                raise RecordError(f"got figures in a cell that is {self.status}; wanted none")
            return
        known = [float(f) for f in figures if isinstance(f, int | float) and isfinite(f)]
        if len(known) < len(figures) or known != sorted(known) or known[0] <= 0 or self.n < 1:
            raise RecordError(
                f"got a measured cell of p20, p50, p80 = {figures} from {self.n} rounds; wanted "
                "three rising ratios above 0 from at least one round"
            )
        if sure != (None, None) and not _around(*sure, known[1]):
            raise RecordError(f"got an interval of {sure} for a median of {self.p50}")


def _around(low: object, high: object, median: float) -> bool:
    return isinstance(low, int | float) and isinstance(high, int | float) and low <= median <= high


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """A comparison made before anything was timed: the worst error found beside its bound."""

    worst: float
    bound: float

    @property
    def passed(self) -> bool:
        return self.worst <= self.bound


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One run of one measurement. Cells are labelled `group/row/column`."""

    name: str
    command: str
    commit: str
    date: str
    versions: Mapping[str, str]
    device: Mapping[str, Plain]
    workload: Mapping[str, Plain]
    checks: Mapping[str, Check] = field(default_factory=dict)
    cells: Mapping[str, Cell] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for label in self.cells:
            if len(label.split("/")) != 3 or not all(label.split("/")):
                raise RecordError(f"got cell label {label!r}; wanted 'group/row/column'")
        if any(cell.status == "measured" for cell in self.cells.values()) and not self.correct:
            raise RecordError(f"got speeds in record {self.name!r} although a check failed")

    @property
    def correct(self) -> bool:
        """Whether every check passed."""
        return all(check.passed for check in self.checks.values())


def text_of(record: Record) -> str:
    """The record as JSON, as it stands in its file."""
    document = asdict(record)
    for cell in document["cells"].values():
        for key in _MAY_LACK:
            if cell[key] is None:
                del cell[key]
    return json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def hand_over(made: Record, out: Path | None) -> bool:
    """Write what a GPU script measured, by default to `$OUT`, say so, and whether it is correct."""
    path = write(made, out or Path(os.environ.get("OUT", RESULTS)))
    states = {one.status for one in made.cells.values()}
    print(f"wrote {path.name}: {', '.join(sorted(states))}")
    return made.correct


def write(record: Record, folder: Path = RESULTS) -> Path:
    """Write the record whole and return its path."""
    path = folder / f"{record.name}.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(path, text_of(record).encode())
    except OSError as error:
        raise RecordError(f"got {path}, which cannot be written: {error}") from error
    return path


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; `RecordError` if there is none."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise RecordError(f"got {path.name}, which cannot be read: {error}") from error
    return object_in(text, path.name)


def object_in(text: str, where: str) -> dict[str, Any]:
    """The JSON object that a text found at `where` holds."""
    try:
        document = json.loads(text)
    except ValueError as error:
        raise RecordError(f"got {where}, which cannot be read: {error}") from error
    if not isinstance(document, dict):
        raise RecordError(f"got {where}, which holds no JSON object; measure it again")
    return document


def read(path: Path) -> Record:
    """The record in a file; `RecordError` if any of it is missing, unknown or impossible."""
    return parsed(read_json(path), path.name)


def parsed(document: dict[str, Any], where: str) -> Record:
    """The record in a JSON object that was found at `where`."""
    texts = ("name", "command", "commit", "date")
    tables = ("versions", "device", "workload", "checks", "cells")
    _require_keys(document, Record, where)
    if not all(isinstance(document[key], str) for key in texts) or not all(
        isinstance(document[key], dict) for key in tables
    ):
        raise RecordError(
            f"got {where} with {', '.join(texts)} or {', '.join(tables)} of a wrong type; wanted "
            "texts and tables"
        )
    for key, kind in (("checks", Check), ("cells", Cell)):
        for label, entry in document[key].items():
            _require_keys(entry, kind, f"{where}, {label}")
            document[key][label] = kind(**entry)
    return Record(**document)


def _require_keys(entry: Any, kind: type[Record | Check | Cell], where: str) -> None:
    wanted = {one.name for one in fields(kind)}
    got = set(entry) if isinstance(entry, dict) else set()
    if not wanted - set(_MAY_LACK) <= got <= wanted:
        raise RecordError(
            f"got {where} with keys {sorted(got)}; wanted {sorted(wanted)}: measure it again"
        )


def today() -> str:
    """The date in UTC."""
    return datetime.now(UTC).date().isoformat()


def versions() -> dict[str, str]:
    """Python and the packages that decide about speed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "absent"
    return found


def device(where: torch.device) -> dict[str, Plain]:
    """What the measurement ran on, without the name of the machine."""
    if where.type == "cuda":
        return {"kind": torch.cuda.get_device_name(where)}
    return {"kind": "cpu", "cores": os.cpu_count() or 0, "threads": torch.get_num_threads()}


def commit(root: Path = ROOT) -> str:
    """The commit of the code, "+dirty" when a tracked file differs from it."""
    try:
        head = git(root, "rev-parse", "HEAD").strip()
        # A record written by an earlier measurement changes nothing that is measured now.
        changed = git(
            root, "status", "--porcelain", "--untracked-files=no", "--", ".",
            ":!benches/results", ":!README.md",
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{head}+dirty" if changed.strip() else head


def git(root: Path, *arguments: str) -> str:
    """What a git command in a checkout prints."""
    return subprocess.run(
        ["git", *arguments], cwd=root, capture_output=True, text=True, check=True
    ).stdout
