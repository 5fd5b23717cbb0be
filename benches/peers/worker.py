"""One peer, measured beside plain generation in the same process. Prints JSON for the parent."""

import json
from dataclasses import asdict
from typing import Annotated, Any

import torch
import typer

from benches import rounds
from benches.peers.adapters import PEERS
from benches.peers.subject import Arm, Kind, Size, Subject
from benches.random_models import Shape

# Sums over `d_model` in another order; projections are of order ten.
SCORES_MAY_DIFFER = 1e-3


def measured(peer: str, size: Size, count: int) -> dict[str, Any]:
    """For every job of a peer: CPU time beside plain generation, or what went wrong."""
    subject = Subject(size)
    arms = dict(PEERS[peer].adapter().arms(subject))
    wrong = {kind: found for kind in arms if (found := fault(subject, kind, arms[kind]))}
    right = {kind: arm for kind, arm in arms.items() if kind not in wrong}
    jobs = {"plain": timed(lambda: subject.generate(subject.plain))}
    jobs |= {kind: timed(arm) for kind, arm in right.items()}
    laps = rounds.interleave(jobs, rounds=count, seed=size.seed, what=f"{peer}, {size.batch}")
    cells = {kind: asdict(rounds.paired(laps[kind], laps["plain"], clock="cpu")) for kind in right}
    return {"cells": cells, "wrong": wrong}


def fault(subject: Subject, kind: Kind, arm: Arm) -> str:
    """What differs from hooks of plain torch; "" where nothing does."""
    wanted, got = subject.reference(kind), arm()
    if not torch.equal(wanted.tokens, got.tokens):
        return "other tokens than hooks of plain torch"
    if kind != "watch" and torch.equal(wanted.tokens, subject.generate(subject.plain)):
        return "the reference does not steer visibly"
    if kind in ("watch", "both"):
        if wanted.scores is None or got.scores is None:
            return "no projections"
        worst = float((wanted.scores() - got.scores()).abs().max())
        if not worst <= SCORES_MAY_DIFFER:
            return f"projections differ by {worst:.1e}"
    return ""


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
) -> None:
    torch.set_num_threads(1)
    shape = Shape(hidden=hidden, layers=layers, vocabulary=vocabulary)
    size = Size(shape=shape, batch=batch, new_tokens=new_tokens)
    print(json.dumps(measured(peer, size, rounds)))


if __name__ == "__main__":
    typer.run(main)
