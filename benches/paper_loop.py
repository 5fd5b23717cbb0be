"""How the method's authors project a finished conversation: the loop that `read` replaces.

Written from the description of the official code of arXiv 2507.21509 (`cal_projection`): one
conversation at a time, hidden states of every layer, logits of every position, one number taken
to the host for every vector.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

Conversation = Sequence[Mapping[str, str]]


def projections(
    hf: Any,
    tokenizer: Any,
    conversations: Sequence[Conversation],
    vectors: Sequence[Float[Tensor, " d_model"]],
    *,
    index: int,
) -> Float[Tensor, "chat n_vec"]:
    """Mean of `hidden_states[index]` over the reply's tokens, along each unit vector."""
    table = []
    for conversation in conversations:
        prompt = tokenizer.apply_chat_template(
            conversation[:-1], tokenize=False, add_generation_prompt=True
        )
        answer = conversation[-1]["content"]
        inputs = tokenizer(prompt + answer, return_tensors="pt", add_special_tokens=False)
        start = len(tokenizer.encode(prompt, add_special_tokens=False))
        with torch.no_grad():
            outputs = hf(**inputs, output_hidden_states=True)
        mean = outputs.hidden_states[index][0, start:].mean(dim=0)
        table.append([(mean @ vector / vector.norm()).item() for vector in vectors])
    return torch.tensor(table)


def vectors(
    hf: Any,
    tokenizer: Any,
    positive: Sequence[Conversation],
    negative: Sequence[Conversation],
) -> dict[str, Float[Tensor, "n_states d_model"]]:
    """The authors' three vectors (`generate_vec`) of both sides, a row for each hidden state."""
    sides = [_means(hf, tokenizer, side) for side in (positive, negative)]
    return {
        name: torch.stack(sides[0][name]).mean(0) - torch.stack(sides[1][name]).mean(0)
        for name in sides[0]
    }


def _means(
    hf: Any, tokenizer: Any, conversations: Sequence[Conversation]
) -> dict[str, list[Float[Tensor, "n_states d_model"]]]:
    """Of each conversation the means over its prompt and its reply, and the last prompt token."""
    found: dict[str, list[Tensor]] = {"response_mean": [], "prompt_mean": [], "prompt_last": []}
    for conversation in conversations:
        prompt = tokenizer.apply_chat_template(
            conversation[:-1], tokenize=False, add_generation_prompt=True
        )
        answer = conversation[-1]["content"]
        inputs = tokenizer(prompt + answer, return_tensors="pt", add_special_tokens=False)
        start = len(tokenizer.encode(prompt, add_special_tokens=False))
        with torch.no_grad():
            states = hf(**inputs, output_hidden_states=True).hidden_states
        found["response_mean"].append(torch.stack([h[0, start:].mean(0) for h in states]))
        found["prompt_mean"].append(torch.stack([h[0, :start].mean(0) for h in states]))
        found["prompt_last"].append(torch.stack([h[0, start - 1] for h in states]))
    return found
