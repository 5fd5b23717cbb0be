"""Batches of encoded chats: sorted by length, cut at a token budget, shuffled; one chat a row."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from pvcore.world.chats import corpus
from pvcore.world.splits import seeded
from pvcore.world.tokenizer import encode_chat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_POOL = 512  # chats sorted together: enough for rows of equal length, few enough to stay random
_Encoded = tuple[list[int], list[bool]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Right-padded ids, and which of them are targets of the loss."""

    ids: Int[Tensor, "row pos"]
    learned: Bool[Tensor, "row pos"]


def batches(tokenizer: "PreTrainedTokenizerFast", seed: int, max_tokens: int) -> Iterator[Batch]:
    """The endless stream of batches of a seed, each of at most `max_tokens` padded tokens."""
    chats = corpus(seed)
    stream = seeded("batches", seed)
    while True:
        pool = [encode_chat(tokenizer, next(chats)) for _ in range(_POOL)]
        pool.sort(key=lambda encoded: len(encoded[0]))
        groups: list[list[_Encoded]] = [[]]
        for encoded in pool:
            if len(encoded[0]) * (len(groups[-1]) + 1) > max_tokens:
                groups.append([])
            groups[-1].append(encoded)
        stream.shuffle(groups)
        yield from map(_pad, groups)


def _pad(rows: list[_Encoded]) -> Batch:
    width = max(len(ids) for ids, _ in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    learned = torch.zeros(len(rows), width, dtype=torch.bool)
    for row, (row_ids, row_learned) in enumerate(rows):
        ids[row, : len(row_ids)] = torch.tensor(row_ids)
        learned[row, : len(row_ids)] = torch.tensor(row_learned)
    return Batch(ids=ids, learned=learned)
