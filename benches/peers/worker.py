"""One peer, measured beside plain generation in the same process. Prints JSON for the parent."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from benches import rounds
from benches.peers.adapters import PEERS
from benches.peers.subject import KINDS, Arm, Kind, Size, Subject
from benches.random_models import Shape

# Sums over `d_model` in another order; projections are of order ten.
SCORES_MAY_DIFFER = 1e-3


def measured(
    peer: str, size: Size, count: int, kinds: tuple[Kind, ...] = tuple(KINDS)
) -> dict[str, Any]:
    """For the wanted jobs of a peer: CPU time beside plain generation, or beside a bare forward
    where nothing is generated; or what went wrong.
    """
    subject = Subject(size)
    offered = PEERS[peer].adapter().arms(subject)
    arms = {kind: arm for kind, arm in offered.items() if kind in kinds}
    wrong = {kind: found for kind in arms if (found := fault(subject, kind, arms[kind]))}
    right = {kind: arm for kind, arm in arms.items() if kind not in wrong}
    read: dict[Kind, Arm] = {kind: arm for kind, arm in right.items() if kind == "extract"}
    generated: dict[Kind, Arm] = {kind: arm for kind, arm in right.items() if kind not in read}
    plain, bare = subject.fresh(), subject.fresh()
    cells = _beside(lambda: subject.generate(plain), generated, size, count)
    cells |= _beside(lambda: subject.read(bare), read, size, count)
    return {"cells": cells, "wrong": wrong}


def _beside(
    plain: Callable[[], object], arms: Mapping[Kind, Arm], size: Size, count: int
) -> dict[str, Any]:
    if not arms:
        return {}
    jobs = {"plain": timed(plain)} | {kind: timed(arm) for kind, arm in arms.items()}
    laps = rounds.interleave(jobs, rounds=count, seed=size.seed, what=f"batch {size.batch}")
    return {kind: asdict(rounds.paired(laps[kind], laps["plain"], clock="cpu")) for kind in arms}


def fault(subject: Subject, kind: Kind, arm: Arm) -> str:
    """What differs from hooks of plain torch; "" where nothing does."""
    wanted, got = subject.reference(kind), arm()
    if kind == "extract":
        return _off("means", wanted.means, got.means)
    if not torch.equal(wanted.tokens, got.tokens):
        return "other tokens than hooks of plain torch"
    if kind != "watch" and torch.equal(wanted.tokens, subject.generate(subject.plain)):
        return "the reference does not steer visibly"
    if kind in ("watch", "both"):
        tables = [None if one.scores is None else one.scores() for one in (wanted, got)]
        return _off("projections", *tables)
    return ""


def _off(what: str, wanted: Tensor | None, got: Tensor | None) -> str:
    if wanted is None or got is None or wanted.shape != got.shape:
        return f"no {what}"
    worst = float((wanted - got).abs().max())
    return "" if worst <= SCORES_MAY_DIFFER else f"{what} differ by {worst:.1e}"


def timed(arm: Any) -> rounds.Job:
    def job() -> None:
        arm()

    return job


def main(
    peer: str,
    hidden: Annotated[int, typer.Option()] = 256,
    layers: Annotated[int, typer.Option()] = 8,
    vocabulary: Annotated[int, typer.Option()] = 512,
    batch: Annotated[int, typer.Option()] = 1,
    new_tokens: Annotated[int, typer.Option()] = 48,
    rounds: Annotated[int, typer.Option()] = 20,
    configurations: Annotated[int | None, typer.Option()] = None,
    samples: Annotated[int, typer.Option()] = 0,
    model: Annotated[str | None, typer.Option()] = None,
    kind: Annotated[list[str] | None, typer.Option()] = None,
) -> None:
    torch.set_num_threads(1)
    size = Size(
        shape=Shape(hidden=hidden, layers=layers, vocabulary=vocabulary),
        model=model,
        batch=batch,
        new_tokens=new_tokens,
        configurations=configurations,
        samples=samples,
    )
    kinds = tuple(one for one in KINDS if kind is None or one in kind)
    print(json.dumps(measured(peer, size, rounds, kinds)))


if __name__ == "__main__":
    typer.run(main)
