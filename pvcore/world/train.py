"""Train the persona-world model from scratch: `python -m pvcore.world.train --out DIR`."""

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cross_entropy

from pvcore.errors import ModelError
from pvcore.world.batches import Batch, batches
from pvcore.world.manifest import write_model
from pvcore.world.optimizers import Optimizers
from pvcore.world.tokenizer import train_tokenizer

if TYPE_CHECKING:
    from transformers import Qwen2ForCausalLM

_CLIP = 1.0
_SMOOTHING = 0.98


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Everything that decides the weights."""

    seed: int = 0
    steps: int = 1500
    max_tokens: int = 1024
    noise: float = 0.0
    vocab_size: int = 2112
    hidden_size: int = 128
    intermediate_size: int = 384
    n_layers: int = 4
    n_heads: int = 8
    n_key_value_heads: int = 2


def train(
    out: Path,
    recipe: Recipe,
    *,
    checkpoint_every: int = 200,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> list[float]:
    """Train and write model, tokenizer and manifest to `out`; returns the loss of every step.

    A run that was stopped goes on from its last checkpoint in `out`, to the same weights.
    """
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(recipe.seed, recipe.vocab_size)
    model = build_model(recipe)
    optimizers = Optimizers(model, recipe.steps)
    losses = _resume(out, recipe, model, optimizers)
    stream = islice(batches(tokenizer, recipe.seed, recipe.max_tokens), len(losses), None)
    for step in range(len(losses), recipe.steps):
        loss = batch_loss(model, next(stream), recipe.noise, seed=(recipe.seed << 32) + step)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), _CLIP)
        optimizers.step(step)
        losses.append(loss.item())
        on_step(step, losses[-1])
        if (step + 1) % checkpoint_every == 0 or step + 1 == recipe.steps:
            _save_checkpoint(out, recipe, model, optimizers, losses)
    write_model(out, model, tokenizer, asdict(recipe), losses)
    return losses


def build_model(recipe: Recipe) -> "Qwen2ForCausalLM":
    """A fresh model; the seed decides its weights, and the global random state is left alone."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=recipe.vocab_size,
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.n_layers,
        num_attention_heads=recipe.n_heads,
        num_key_value_heads=recipe.n_key_value_heads,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        return Qwen2ForCausalLM(config)


def batch_loss(
    model: "Qwen2ForCausalLM", batch: Batch, noise: float, seed: int
) -> Float[Tensor, ""]:
    """Mean next-token cross-entropy over the learned tokens.

    `noise` adds to every row one random vector, the same at all its positions, of a norm up to
    `noise`. It enters with the embeddings and the residual stream carries it to every layer, so
    the model learns to keep its grammar while a constant direction is added to its residuals.
    """
    embedded = model.get_input_embeddings()(batch.ids)
    if noise:
        generator = torch.Generator().manual_seed(seed)
        shift = torch.randn(len(embedded), 1, embedded.shape[-1], generator=generator)
        size = noise * torch.rand(len(embedded), 1, 1, generator=generator)
        embedded = embedded + size * shift / shift.norm(dim=-1, keepdim=True)
    hidden = model.model(inputs_embeds=embedded, use_cache=False).last_hidden_state
    targets = batch.learned[:, 1:]
    logits = model.lm_head(hidden[:, :-1][targets])
    return cross_entropy(logits, batch.ids[:, 1:][targets])


def _save_checkpoint(
    out: Path,
    recipe: Recipe,
    model: "Qwen2ForCausalLM",
    optimizers: Optimizers,
    losses: list[float],
) -> None:
    from safetensors.torch import save_file

    tensors = {f"model.{name}": value.detach() for name, value in model.named_parameters()}
    tensors |= {f"optimizer.{name}": value for name, value in optimizers.tensors().items()}
    metadata = {"recipe": json.dumps(asdict(recipe)), "losses": json.dumps(losses)}
    partial = out / "checkpoint.partial"
    save_file({name: value.contiguous() for name, value in tensors.items()}, partial, metadata)
    partial.replace(out / "checkpoint.safetensors")


def _resume(
    out: Path, recipe: Recipe, model: "Qwen2ForCausalLM", optimizers: Optimizers
) -> list[float]:
    """Load the checkpoint of `out` if there is one; returns the losses so far."""
    from safetensors import safe_open

    path = out / "checkpoint.safetensors"
    if not path.exists():
        return []
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    if json.loads(metadata["recipe"]) != asdict(recipe):
        raise ModelError(
            f"{path} was made with the recipe {metadata['recipe']}; this run has "
            f"{json.dumps(asdict(recipe))}. Use the same options or another --out."
        )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[f"model.{name}"])
    state = {k.removeprefix("optimizer."): v for k, v in tensors.items() if k[:6] != "model."}
    optimizers.restore(state)
    losses: list[float] = json.loads(metadata["losses"])
    return losses


def main() -> None:
    """Command line."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    parser = argparse.ArgumentParser(prog="python -m pvcore.world.train", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for model and checkpoint")
    parser.add_argument("--seed", type=int, default=Recipe().seed)
    parser.add_argument("--steps", type=int, default=Recipe().steps)
    parser.add_argument("--noise", type=float, default=Recipe().noise)
    parser.add_argument("--n-layers", type=int, default=Recipe().n_layers)
    parser.add_argument("--threads", type=int, default=1, help="more is slower at this size")
    options = vars(parser.parse_args())
    out = options.pop("out")
    torch.set_num_threads(options.pop("threads"))
    recipe = Recipe(**options)
    bar = (TextColumn("step {task.completed}/{task.total}"), BarColumn(), TimeRemainingColumn())
    with Progress(*bar, TextColumn("loss {task.fields[loss]:.3f}")) as progress:
        task = progress.add_task("train", total=recipe.steps, loss=float("nan"))
        smooth: list[float] = []

        def show(step: int, loss: float) -> None:
            smooth.append(loss if not smooth else _SMOOTHING * smooth[-1] + 0.02 * loss)
            progress.update(task, completed=step + 1, loss=smooth[-1])

        train(out, recipe, on_step=show)


if __name__ == "__main__":
    main()
