"""Which tile an op is launched with: read from tuned/*.json, never searched for at run time."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch

TUNED = Path(__file__).parent / "tuned"

# "wide" where a float32 operand goes through the multiplier, "low" where both have 16 bits.
Width = Literal["wide", "low"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """A tile and how it is run; `block_d` is the most that may be loaded of a row at a time."""

    block_t: int
    block_k: int
    block_d: int
    num_warps: int
    num_stages: int

    @property
    def options(self) -> dict[str, int | bool]:
        """Fusion to multiply-adds is said, for Triton is about to change its default."""
        return {
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "enable_fp_fusion": True,
        }


def slug(device_name: str) -> str:
    """The file of a device's table: `NVIDIA H200` is `nvidia_h200`."""
    return "_".join("".join(c if c.isalnum() else " " for c in device_name.lower()).split())


def width_class(*dtypes: torch.dtype) -> Width:
    low = dtypes[0] in (torch.float16, torch.bfloat16) and len(set(dtypes)) == 1
    return "low" if low else "wide"


@cache
def table(name: str) -> dict[str, Any]:
    """`tuned/<name>.json`, over `tuned/default.json`, which is derived and not measured."""
    loaded: dict[str, Any] = json.loads((TUNED / "default.json").read_text())
    if measured(name):
        own = json.loads((TUNED / f"{name}.json").read_text())
        loaded = {**loaded, **own, "ops": {**loaded["ops"], **own["ops"]}}
    return loaded


def measured(name: str) -> bool:
    """Whether a device has a table of its own."""
    return name != "default" and (TUNED / f"{name}.json").exists()


@cache
def device_table(device: torch.device) -> str:
    """The name a device's own table has; rows on the CPU reach Triton in its interpreter only."""
    return slug(torch.cuda.get_device_name(device)) if device.type == "cuda" else "default"


def crossover(device: torch.device) -> int:
    """The most vectors Triton projects on; above it the product is cuBLAS's."""
    return int(table(device_table(device))["crossover"])


def rows_class(rows: int) -> int:
    """Decode, a small batch or a prefill: the largest number of rows of the class."""
    return 16 if rows <= 16 else 256 if rows <= 256 else 1 << 31


def entry_for(
    entries: Sequence[Mapping[str, Any]], *, width: Width, rows: int, n_vec: int
) -> Mapping[str, Any] | None:
    """The first entry that covers these rows and vectors."""
    for entry in entries:
        fits = entry["width"] == width and rows <= (entry["rows"] or 1 << 31)
        if fits and n_vec <= (entry["n_vec"] or 1 << 31):
            return entry
    return None


@cache
def _find(name: str, op: str, width: Width, rows: int, n_vec: int) -> Launch:
    entry = entry_for(table(name)["ops"][op], width=width, rows=rows, n_vec=n_vec)
    if entry is None:
        raise LookupError(f"tuned/{name}.json has no entry for {op}, {width}, {rows}, {n_vec}.")
    return Launch(**{field: entry[field] for field in Launch.__dataclass_fields__})


_TRIED: dict[str, Launch] = {}


@contextmanager
def trying(op: str, tile: Launch) -> Iterator[None]:
    """Launch `op` with this tile inside the block, in every thread: for the one who tunes."""
    before = dict(_TRIED)
    _TRIED[op] = tile
    try:
        yield
    finally:
        _TRIED.clear()
        _TRIED.update(before)


def launch(op: str, device: torch.device, *, width: Width, rows: int, n_vec: int) -> Launch:
    """The first entry of the device's table that covers these rows and vectors."""
    if op in _TRIED:
        return _TRIED[op]
    return _find(device_table(device), op, width, rows_class(rows), n_vec)
