"""Loss of the model on a batch, with a constant random direction added to its residual stream."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy

from pvcore.world.batches import Batch
from pvcore.world.splits import digest

if TYPE_CHECKING:
    from transformers import Qwen2ForCausalLM


@dataclass(frozen=True, slots=True, kw_only=True)
class Noise:
    """One direction per row, added at all positions to the output of one block.

    `share` is the norm of each row's direction as a share of the mean residual norm there.
    """

    layer: int
    directions: Float[Tensor, "row d_model"]
    share: Float[Tensor, " row"]


def draw_noise(n_rows: int, d_model: int, n_layers: int, *key: object) -> Noise:
    """Random unit directions at a random layer, with shares even between 0 and 1; fixed by key."""
    generator = torch.Generator().manual_seed(digest("noise", *key) >> 1)
    directions = torch.randn(n_rows, d_model, generator=generator)
    return Noise(
        layer=int(torch.randint(n_layers, (), generator=generator)),
        directions=directions / directions.norm(dim=-1, keepdim=True),
        share=torch.rand(n_rows, generator=generator),
    )


def batch_loss(
    model: "Qwen2ForCausalLM", batch: Batch, noise: Noise | None = None
) -> Float[Tensor, ""]:
    """Mean next-token cross-entropy over the learned tokens.

    Trained under noise the model keeps its grammar while a direction is added to its residuals:
    to be heard, a persona must be written well above the noise, so its vector steers at a smaller
    loss of coherence.
    """
    hidden = final_hidden(model, batch.ids, noise)
    targets = batch.learned[:, 1:]
    logits = model.lm_head(hidden[:, :-1][targets])
    return cross_entropy(logits, batch.ids[:, 1:][targets])


def final_hidden(
    model: "Qwen2ForCausalLM", ids: Int[Tensor, "row pos"], noise: Noise | None
) -> Float[Tensor, "row pos d_model"]:
    """The normed output of the last block, computed block by block; rows are padded right."""
    inner = model.model
    hidden = inner.embed_tokens(ids)
    positions = torch.arange(ids.shape[1])[None]
    rotary = inner.rotary_emb(hidden, positions)
    for layer, block in enumerate(inner.layers):
        hidden = block(
            hidden, attention_mask=None, position_embeddings=rotary, position_ids=positions
        )
        if noise is not None and noise.layer == layer:
            size = noise.share * hidden.detach().norm(dim=-1).mean()
            hidden = hidden + (size[:, None] * noise.directions)[:, None]
    normed: Tensor = inner.norm(hidden)
    return normed
