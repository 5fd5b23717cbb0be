"""Every tile of the launch tables, as a call of the launcher that picks it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pvcore_kernels import launch
from pvcore_kernels.tiled import intervene, layers, norm, project, segment, steer

HALF, FULL = torch.bfloat16, torch.float32
# The widths of Qwen2.5 at 0.5B and 7B: seven times a power of two, which no tile covers at once.
NARROW, WIDE = 896, 3584
MANY = 4096
PROJECTS = ("project", "steer_project", "steer_project_tokens", "project_layers", "intervene")


@dataclass(frozen=True, slots=True)
class Case:
    """One compilation: an op on `t` rows of `d` columns and `k` vectors, rows and bank by dtype."""

    op: str
    t: int
    k: int
    d: int
    rows: torch.dtype
    bank: torch.dtype

    def __str__(self) -> str:
        kinds = f"{str(self.rows)[6:]}, {str(self.bank)[6:]}"
        return f"{self.op}, {self.t} rows, {self.k} vectors, {self.d} wide, {kinds}"

    @property
    def multiplies(self) -> bool:
        """Whether tensor cores are meant to do the product: both operands have sixteen bits."""
        return self.op in PROJECTS and self.rows == self.bank != FULL

    @property
    def writes_rows(self) -> bool:
        return self.op not in ("project", "project_layers", "project_stack", "segment_mean")


def cases() -> Iterator[Case]:
    """One call for each entry of the table, with each pair of dtypes that reaches it."""
    for op, entries in launch.table("default")["ops"].items():
        for entry in entries:
            t, k = entry["rows"] or MANY, entry["n_vec"] or (128 if op in PROJECTS else 4)
            low = entry["width"] == "low"
            for rows, bank in ((HALF, HALF),) if low else ((HALF, FULL), (FULL, FULL)):
                yield Case(op, t, k, WIDE, rows, bank)
            if low:
                yield Case(op, t, min(k, 7), NARROW, torch.float16, torch.float16)
    for dtype in (HALF, FULL):
        for d in (NARROW, WIDE, 8192):
            yield Case("add_rmsnorm_steer_project", 16, 7, d, dtype, FULL)


def stacked() -> Iterator[Case]:
    """Layers that lie in one tensor, on the tiles of those that a table lists."""
    for dtype in (HALF, FULL):
        for t in (16, MANY):
            yield Case("project_stack", t, 128, WIDE, dtype, FULL)


def smoke() -> Iterator[Case]:
    """One call of every op, for architectures that are not tuned for.

    In float32, because a product in parts is named differently by another vendor's torch.
    """
    first: dict[str, Case] = {}
    for case in cases():
        if case.rows == case.bank == FULL:
            first.setdefault(case.op, case)
    yield from first.values()


def call(case: Case) -> Callable[[], None]:
    """The launch itself, on tensors whose contents nobody reads."""
    t, k, d = case.t, case.k, case.d
    h, v = torch.empty(t, d, dtype=case.rows), torch.empty(k, d, dtype=case.bank)
    row, delta = torch.zeros(t, dtype=torch.int32), torch.empty(4, d)
    scores, bounds = torch.empty(t, k), torch.empty(4, k)
    calls: dict[str, Callable[[], None]] = {
        "project": lambda: project.project(h, v, None, scores),
        "steer": lambda: steer.steer(h, delta.to(case.bank), row, h),
        "steer_project": lambda: steer.steer_project(h, v, delta, row, h, scores),
        "steer_project_tokens": lambda: steer.steer_project_tokens(h, v, scores, h, scores),
        "project_layers": lambda: layers.project_layers(
            [h, h], torch.stack([v, v]), torch.empty(2, t, k)
        ),
        "project_stack": lambda: layers.project_stack(
            torch.stack([h, h]),
            torch.stack([v, v]),
            torch.empty(4, 2, t, k),
            torch.zeros((), dtype=torch.int64),
        ),
        "intervene": lambda: intervene.intervene(
            h, v, bounds, bounds, row, torch.empty(k, k), h, scores
        ),
        "segment_mean": lambda: segment.segment_mean(
            h, torch.zeros(3, dtype=torch.int32), torch.empty(2, d)
        ),
        "add_rmsnorm_steer_project": lambda: norm.add_rmsnorm_steer_project(
            h, h, _weight(h), 1e-6, delta, row, v, False, h, h, scores
        ),
    }
    return calls[case.op]


def _weight(h: Tensor) -> Tensor:
    return h.new_empty(h.shape[1])
