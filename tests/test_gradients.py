"""Gradients through a steered model are those of the same edits written with raw hooks."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pvcore as pv
from tests.oracle import Edit, Oracle
from tests.subjects import NAMES, fresh, point, prompts, raw, trio, worst

ROWS = prompts([7, 7, 5])
BOUND, VISIBLE = 1e-5, 1e-2
Part = tuple[Tensor, float]


def steps(site: pv.Site, coeff: float) -> list[Any]:
    """An addition, an ablation and a cap in turn, all at one site."""
    one, two, three = trio(site)
    return [
        pv.Add(one, coeff=coeff, span="all"),
        pv.Ablate(two, span="all"),
        pv.Cap(three, max=0.1, span="all"),
    ]


def edits(site: pv.Site, coeff: float, width: int) -> list[Edit]:
    where = torch.ones(1, width, dtype=torch.bool)
    amounts: list[dict[str, Any]] = [
        {"kind": "add", "coeff": torch.tensor([coeff])},
        {"kind": "ablate"},
        {"kind": "cap", "upper": torch.tensor([0.1])},
    ]
    return [
        Edit(point=point(site), vectors=raw([one], site), where=where, **amount)
        for one, amount in zip(trio(site), amounts, strict=True)
    ]


def loss_of(hf: Any, ids: Tensor) -> Tensor:
    logits = hf(ids[None], use_cache=False).logits[0, :-1]
    loss: Tensor = nn.functional.cross_entropy(logits, ids[1:])
    return loss


def gradients(hf: nn.Module, work: Callable[[], object]) -> Tensor:
    """All parameter gradients in one row."""
    hf.zero_grad()
    work()
    return torch.cat([p.grad.flatten() for p in hf.parameters() if p.grad is not None])


def wanted(oracle: Oracle, sites: list[pv.Site], *parts: Part) -> Tensor:
    def work() -> None:
        for ids, coeff in parts:
            steps_here = [edit for site in sites for edit in edits(site, coeff, len(ids))]
            with oracle.hooked(steps_here):
                loss_of(oracle.hf, ids).backward()

    return gradients(oracle.hf, work)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_through_every_site_equal_the_oracle(name: str) -> None:
    found = fresh(name)

    def work() -> None:
        with found.model.steer(*(step for site in found.sites for step in steps(site, 0.5))):
            loss_of(found.model.hf, ROWS[0]).backward()

    got = gradients(found.model.hf, work)
    assert worst(got, wanted(found.oracle, found.sites, (ROWS[0], 0.5))) < BOUND
    assert worst(got, wanted(found.oracle, [], (ROWS[0], 0.5))) > VISIBLE
