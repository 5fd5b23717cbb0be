"""What somebody would write by hand instead of an op: several ways, of which the fastest counts.

Each does the op's whole job: a request for every row, found out at every call, and rows without one
left bit for bit. The bank may be turned once beforehand, since vectors seldom change.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pvcore_kernels.bank import bank

Requests = Literal["one", "mixed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Operands:
    """Rows and what is done to them. `columns` is the bank as torch multiplies it.

    In `mixed` requests rows of three alternate, and every fourth has none.
    """

    h: Tensor
    v: Tensor
    columns: Tensor
    delta: Tensor
    row: Tensor
    coeff: Tensor
    scores: Tensor

    @classmethod
    def of(
        cls, t: int, k: int, d: int, dtype: torch.dtype, *, requests: Requests = "one"
    ) -> "Operands":
        generator = torch.Generator().manual_seed(0)
        v = bank(torch.randn(k, d, generator=generator)).units
        mixed = torch.tensor([0, 1, -1, 2], dtype=torch.int32).repeat(-(-t // 4))[:t]
        return cls(
            h=torch.randn(t, d, generator=generator).to(dtype),
            v=v,
            columns=v.mT,
            delta=torch.randn(3 if requests == "mixed" else 1, d, generator=generator),
            row=mixed if requests == "mixed" else torch.zeros(t, dtype=torch.int32),
            coeff=torch.randn(t, k, generator=generator),
            scores=torch.empty(t, k),
        )

    def moving_nothing(self) -> "Operands":
        """What is added becomes zero, so that rows written again and again stay what they are."""
        self.delta.zero_()
        self.coeff.zero_()
        return self


Job = Callable[[Operands], object]


def project(x: Operands) -> None:
    torch.mm(x.h if x.h.dtype == torch.float32 else x.h.float(), x.columns, out=x.scores)


def steer_alike(x: Operands) -> None:
    """One add where all rows are of one request, which the smallest and the largest tell."""
    if len(x.row) == 1:
        low = high = int(x.row.item())
    else:
        low, high = (int(one) for one in x.row.aminmax())
    if low == high >= 0:
        x.h.add_(x.delta[low])
    elif high >= 0:
        steer_listed(x)


def steer_row_by_row(x: Operands) -> None:
    for at, request in enumerate(x.row.tolist()):
        if request >= 0:
            x.h[at].add_(x.delta[request])


def steer_listed(x: Operands) -> None:
    """The rows that have a request, by their places."""
    active = (x.row >= 0).nonzero()[:, 0]
    moves = x.delta.index_select(0, x.row.index_select(0, active))
    if x.h.dtype == torch.float32:
        x.h.index_add_(0, active, moves)
    else:
        x.h.index_copy_(0, active, (x.h.index_select(0, active) + moves).to(x.h.dtype))


def steer_chosen(x: Operands) -> None:
    """Every row moved, and the old one chosen where it has no request."""
    moved = (x.h + x.delta.index_select(0, x.row.clamp(min=0))).to(x.h.dtype)
    torch.where((x.row >= 0)[:, None], moved, x.h, out=x.h)


STEER: tuple[Job, ...] = (steer_alike, steer_row_by_row, steer_listed, steer_chosen)


def then(first: Job, second: Job) -> Job:
    """One after the other."""

    def both(x: Operands) -> None:
        first(x)
        second(x)

    return both


def project_and_steer_alike(x: Operands) -> None:
    """Rows of sixteen bits are widened once for both, where all are of one request."""
    first = int(x.row[0])
    if x.h.dtype == torch.float32 or first < 0 or not bool((x.row == first).all()):
        project(x)
        steer_alike(x)
        return
    wide = x.h.float()
    torch.mm(wide, x.columns, out=x.scores)
    x.h.copy_(wide.add_(x.delta[first]))


def tokens(x: Operands) -> None:
    """Rows of sixteen bits are widened once for both products."""
    if x.h.dtype == torch.float32:
        torch.mm(x.h, x.columns, out=x.scores)
        x.h.addmm_(x.coeff, x.v)
    else:
        wide = x.h.float()
        torch.mm(wide, x.columns, out=x.scores)
        x.h.copy_(wide.addmm_(x.coeff, x.v))
