"""Finetune the persona-world model on chats that hold a trait: what prevention and shift act on."""

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from pvcore.chats import encode_all, pad, pad_id
from pvcore.model import HookedModel

_WARM_UP = 10
_CLIP = 1.0


def finetune(
    model: HookedModel,
    chats: Sequence[Sequence[Mapping[str, str]]],
    *,
    steps: int = 60,
    batch_size: int = 16,
    learning_rate: float = 3e-4,
    seed: int = 0,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> list[float]:
    """Train all weights on the replies of the chats; returns the loss of every step.

    The seed decides the order of the chats. `on_step` hears how many steps are done. The model is
    in evaluation mode afterwards.
    """
    encoded = encode_all(model.tokenizer, chats)
    order = random.Random(seed)
    optimizer = torch.optim.AdamW(
        model.hf.parameters(), lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.0
    )
    queue: list[int] = []
    losses = []
    model.hf.train()
    try:
        for step in range(steps):
            while len(queue) < batch_size:
                queue += order.sample(range(len(encoded)), len(encoded))
            chosen, queue = [encoded[i] for i in queue[:batch_size]], queue[batch_size:]
            loss = _loss(model, chosen)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.hf.parameters(), _CLIP)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * min((step + 1) / _WARM_UP, 1 - step / steps)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            on_step(step + 1, losses[-1])
    finally:
        model.hf.eval()
    return losses


def _loss(model: HookedModel, chosen: Sequence[Any]) -> Any:
    """Mean next-token cross-entropy over the tokens of the replies."""
    batch = pad(chosen, side="right", pad_id=pad_id(model.tokenizer))
    starts = torch.tensor([one.prompt_length for one in chosen])
    learned = batch.mask & (torch.arange(batch.ids.shape[1]) >= starts[:, None])
    ids, targets = batch.ids.to(model.device), learned[:, 1:].to(model.device)
    mask = batch.mask.long().to(model.device)
    logits = model.hf(input_ids=ids, attention_mask=mask, use_cache=False).logits
    return cross_entropy(logits[:, :-1][targets], ids[:, 1:][targets])
