"""What the tuner runs: one launch of each op at a place of the table, and what it must give."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

from pvcore_kernels import joint, rows
from pvcore_kernels.launch import Launch
from pvcore_kernels.tiled import intervene, layers, project, segment, steer

# Qwen2.5-7B's width. The largest class of rows is met at this many.
WIDTH, MOST_ROWS, MOST_VECTORS = 3584, 8192, 128
LAYERS = 28
SCORES = 1e-6
ROUNDING = {torch.float32: 5e-7, torch.float16: 1e-3, torch.bfloat16: 4e-3}
Inputs = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """One entry of the launch table: an op on `t` rows of `d` columns and `k` vectors."""

    op: str
    t: int
    k: int
    rows: torch.dtype
    bank: torch.dtype
    d: int = WIDTH

    @classmethod
    def of(cls, op: str, entry: Mapping[str, Any], *, d: int = WIDTH) -> "Place":
        low = entry["width"] == "low"
        return cls(
            op=op,
            t=entry["rows"] or MOST_ROWS,
            k=entry["n_vec"] or MOST_VECTORS,
            rows=torch.bfloat16 if low else torch.float32,
            bank=torch.bfloat16 if low else torch.float32,
            d=d,
        )

    def __str__(self) -> str:
        kinds = f"{str(self.rows)[6:]} rows, {str(self.bank)[6:]} bank"
        return f"{self.op}, {self.t} rows, {self.k} vectors, {kinds}"

    @property
    def bytes(self) -> int:
        """About what one call moves: rows in and out, and the bank."""
        return 2 * self.t * self.d * self.rows.itemsize + self.k * self.d * self.bank.itemsize


def inputs(place: Place, *, device: torch.device, seed: int = 0) -> dict[str, Tensor]:
    """Rows, unit rows, requests and fresh outputs full of NaN."""
    generator = torch.Generator(device).manual_seed(seed)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, device=device, generator=generator)

    v = torch.nn.functional.normalize(draw(place.k, place.d), dim=1)
    bounds = draw(2, 8, place.k).sort(0).values
    exact = v.to(place.bank).double()
    n_layers = LAYERS if place.op == "project_layers" else 1
    h = draw(place.t, place.d).to(place.rows)
    return {
        "h": h,
        # Made beforehand: a graph that is captured cannot copy it from the host.
        "table": layers.address_table([h] * n_layers),
        "v": v.to(place.bank),
        "banks": v.to(place.bank).expand(n_layers, -1, -1).contiguous(),
        "delta": draw(8, place.d),
        "row": (torch.arange(place.t, device=device) % 9 - 1).int(),
        "c": draw(place.t, place.k),
        "low": bounds[0].contiguous(),
        "high": bounds[1].contiguous(),
        "gram_inverse": torch.linalg.pinv(exact @ exact.mT).float().contiguous(),
        "ends": torch.linspace(0, place.t, min(place.t, 16) + 1, device=device).int(),
        "out": torch.full((place.t, place.d), torch.nan, device=device, dtype=place.rows),
        "scores": torch.full((n_layers, place.t, place.k), torch.nan, device=device),
        "means": torch.full((min(place.t, 16), place.d), torch.nan, device=device),
    }


LAUNCH: dict[str, Callable[[Inputs], None]] = {
    "project": lambda x: project.project(x["h"], x["v"], None, x["scores"][0]),
    "steer": lambda x: steer.steer(x["h"], x["delta"], x["row"], x["out"]),
    "steer_project": lambda x: steer.steer_project(
        x["h"], x["v"], x["delta"], x["row"], x["out"], x["scores"][0]
    ),
    "steer_project_tokens": lambda x: steer.steer_project_tokens(
        x["h"], x["v"], x["c"], x["out"], x["scores"][0]
    ),
    "project_layers": lambda x: layers.project_layers(
        [x["h"]] * len(x["banks"]), x["banks"], x["scores"], x["table"]
    ),
    "intervene": lambda x: intervene.intervene(
        x["h"], x["v"], x["low"], x["high"], x["row"], x["gram_inverse"], x["out"], x["scores"][0]
    ),
    "segment_mean": lambda x: segment.segment_mean(x["h"], x["ends"], x["means"]),
}


def error(place: Place, x: Inputs) -> float:
    """The worst error of a launch in bounds of its dtype, against plain torch in float64."""
    for name in ("out", "scores", "means"):
        x[name].fill_(torch.nan)
    LAUNCH[place.op](x)
    h, v = x["h"].double(), x["v"].double()
    if place.op == "segment_mean":
        return _apart(x["means"], rows.segment_mean(h, x["ends"]), ROUNDING[torch.float32])
    found = []
    if place.op != "steer":
        scale = h.norm(dim=1)[:, None] * v.norm(dim=1)
        off = (x["scores"].double() - h @ v.mT).abs() / scale
        found.append(float(off.nan_to_num(nan=torch.inf).max()) / SCORES)
    wanted = _moved(place, x, h, v)
    if wanted is not None:
        found.append(_apart(x["out"], wanted, ROUNDING[place.rows]))
    return max(found)


def _moved(place: Place, x: Inputs, h: Tensor, v: Tensor) -> Tensor | None:
    """The rows that an op must write, in float64; None for one that writes none."""
    match place.op:
        case "steer" | "steer_project":
            return rows.steer(h, x["delta"].double(), x["row"])
        case "steer_project_tokens":
            return h + x["c"].double() @ v
        case "intervene":
            out = torch.empty_like(h)
            bounds = x["low"].double(), x["high"].double()
            joint.intervene_into(out, h, v, *bounds, x["row"], x["gram_inverse"].double())
            return out
    return None


def _apart(got: Tensor, wanted: Tensor, bound: float) -> float:
    off = float((got.double() - wanted).norm() / wanted.norm())
    return float("inf") if off != off else off / bound


def candidates(place: Place) -> Iterator[Launch]:
    """Tiles worth trying for a place: the shapes that its rows and vectors can fill."""
    few = place.t <= 16
    vectors = [0] if place.op in ("steer", "segment_mean") else _vectors(place)
    heights = {"steer": (1, 2, 4, 8), "segment_mean": (16, 32, 64)}
    tall = heights.get(place.op, (16,) if few else (16, 32, 64, 128))
    columns = (256, 512, 1024) if place.op == "steer" else (32, 64, 128)
    stages = (1,) if place.op == "steer" else (2, 3, 4, 6)
    for block_t, block_k, block_d, warps, n in product(tall, vectors, columns, (2, 4, 8), stages):
        yield Launch(
            block_t=block_t, block_k=block_k, block_d=block_d, num_warps=warps, num_stages=n
        )


def _vectors(place: Place) -> list[int]:
    """Kernels that write rows hold every vector of a row; the others may split them."""
    every = max(16, 1 << (place.k - 1).bit_length())
    if place.op in ("project", "project_layers"):
        return [n for n in (16, 32, 64, 128) if n <= every]
    return [every]
