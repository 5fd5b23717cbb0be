"""Every op that writes into its arguments, on operands that its kernel takes, on any device."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.kernels.cases import bounds, requests, residual, unit_rows

T, K, D, B, LAYERS, SLOTS = 5, 3, 64, 2, 2, 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Writing:
    """The arguments of an op in their order, and the names of those it writes."""

    given: dict[str, Any]
    written: tuple[str, ...]


def on(device: str, value: Any) -> Any:
    if isinstance(value, list):
        return [on(device, one) for one in value]
    return value.to(device) if isinstance(value, Tensor) else value


def operands(seed: int) -> dict[str, Any]:
    v = unit_rows(K, D, torch.float32)
    low, high = bounds(B, K, size=0.02)
    layers = [residual(T, D, torch.float32, seed=seed + layer) for layer in range(LAYERS)]
    row = requests(T, B)
    row[0] = B - 1
    return {
        "h": 3 * residual(T, D, torch.float32, seed=seed),
        "v": v,
        "delta": residual(B, D, torch.float32, seed=3),
        "row": row,
        "c": residual(T, K, torch.float32, seed=4),
        "low": low,
        "high": high,
        "gram_inverse": torch.linalg.inv(v @ v.mT),
        "x": residual(T, D, torch.float32, seed=seed + 5),
        "residual": residual(T, D, torch.float32, seed=seed + 6),
        "weight": 1 + residual(1, D, torch.float32, seed=7)[0] / 10,
        "eps": 1e-5,
        "offset": False,
        "y": torch.full((T, D), torch.nan),
        "scores": torch.full((T, K), torch.nan),
        "hs": layers,
        "stack": torch.stack(layers),
        "banks": torch.stack([v, v.flip(0)]),
        "layer_scores": torch.full((LAYERS, T, K), torch.nan),
        "ring": torch.full((SLOTS, LAYERS, T, K), torch.nan),
        "step": torch.tensor(SLOTS + 2),
    }


# What each op takes, in its order, and what of it is written.
ARGUMENTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "project_out": (("h", "v", "scores"), ("scores",)),
    "steer_": (("h", "delta", "row"), ("h",)),
    "steer_project_": (("h", "v", "delta", "row", "scores"), ("h", "scores")),
    "steer_project_tokens_": (("h", "v", "c", "scores"), ("h", "scores")),
    "project_layers_out": (("hs", "banks", "layer_scores"), ("layer_scores",)),
    "project_stack_out": (("stack", "banks", "ring", "step"), ("ring",)),
    "intervene_": (
        ("h", "v", "low", "high", "row", "gram_inverse", "scores"),
        ("h", "scores"),
    ),
    "add_rmsnorm_steer_project_": (
        ("x", "residual", "weight", "eps", "delta", "row", "v", "offset", "y", "scores"),
        ("residual", "y", "scores"),
    ),
}


def writing(name: str, device: str = "cpu", *, seed: int = 0) -> Writing:
    """Fresh operands of an op; what it only writes is full of NaN."""
    taken, written = ARGUMENTS[name]
    made = operands(seed)
    return Writing(given={key: on(device, made[key]) for key in taken}, written=written)


def run(name: str, found: Writing) -> None:
    getattr(torch.ops.pvcore, name).default(*found.given.values())
