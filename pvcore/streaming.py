"""Streaming a generation: one step for each token of every chat, made when it is asked for."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from pvcore.frames import Call
from pvcore.generation import Generated, Request
from pvcore.guards import Guard
from pvcore.stream import Pieces, Relay, Step


def steps(
    request: Request, tokenizer: Any, arm: Callable[[], AbstractContextManager[Guard]] | None
) -> Iterator[Step]:
    """The steps of a request, under the guard that `arm` puts up."""
    relay = Relay()
    pieces = [Pieces(tokenizer) for _ in request.batch.ids]

    def produce() -> Generated:
        if arm is None:
            return request.run(lambda *step: relay.offer((*step, None, ())))
        with arm() as seen:
            told = 0

            def offer(call: Call, ids: Tensor, lengths: Tensor, done: Tensor) -> None:
                nonlocal told
                alarms = seen.alarms[told:]
                told += len(alarms)
                relay.offer((call, ids, lengths, done, seen, alarms))

            return request.run(offer)

    for count, (call, ids, lengths, done, seen, alarms) in enumerate(relay.items(produce), 1):
        active = (lengths == count).tolist()
        newest = ids[:, -1].cpu()
        yield Step(
            text=[
                piece.push(token, last=end) if on else ""
                for piece, token, on, end in zip(
                    pieces, newest.tolist(), active, done.tolist(), strict=True
                )
            ],
            token_ids=newest,
            projections={} if seen is None else _projections(seen, call, active),
            alarms=alarms,
        )


def _projections(seen: Guard, call: Call, active: list[bool]) -> dict[str, Tensor]:
    over = ~torch.tensor(active)
    scores = seen.newest(call)
    return {
        trait: scores[..., k].masked_fill(over, torch.nan) for k, trait in enumerate(seen.traits)
    }
