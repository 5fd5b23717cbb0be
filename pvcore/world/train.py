"""Train the persona-world model from scratch: `python -m pvcore.world.train --out DIR`."""

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from pvcore.errors import ModelError
from pvcore.world.batches import batches
from pvcore.world.manifest import write_model
from pvcore.world.noise import Noise, batch_loss, draw_noise
from pvcore.world.optimizers import Optimizers
from pvcore.world.tokenizer import train_tokenizer

if TYPE_CHECKING:
    from transformers import Qwen2ForCausalLM

_CLIP = 1.0
_SMOOTHING = 0.98


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Everything that decides the weights.

    `steps` without noise are followed by `noise_steps` under noise.
    """

    seed: int = 0
    steps: int = 1500
    noise_steps: int = 500
    max_tokens: int = 1024
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
    optimizers = Optimizers(model, recipe.steps, recipe.noise_steps)
    losses = _resume(out, recipe, model, optimizers)
    stream = islice(batches(tokenizer, recipe.seed, recipe.max_tokens), len(losses), None)
    last = recipe.steps + recipe.noise_steps
    for step in range(len(losses), last):
        batch = next(stream)
        loss = batch_loss(model, batch, _noise(recipe, step, len(batch.ids)))
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), _CLIP)
        optimizers.step(step)
        losses.append(loss.item())
        on_step(step, losses[-1])
        if (step + 1) % checkpoint_every == 0 or step + 1 == last:
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


def _noise(recipe: Recipe, step: int, n_rows: int) -> Noise | None:
    if step < recipe.steps:
        return None
    return draw_noise(n_rows, recipe.hidden_size, recipe.n_layers, recipe.seed, step)


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
    parser.add_argument("--noise-steps", type=int, default=Recipe().noise_steps)
    parser.add_argument("--threads", type=int, default=1, help="more is slower at this size")
    options = vars(parser.parse_args())
    out = options.pop("out")
    torch.set_num_threads(options.pop("threads"))
    recipe = Recipe(**options)
    bar = (TextColumn("step {task.completed}/{task.total}"), BarColumn(), TimeRemainingColumn())
    with Progress(*bar, TextColumn("loss {task.fields[loss]:.3f}")) as progress:
        task = progress.add_task(
            "train", total=recipe.steps + recipe.noise_steps, loss=float("nan")
        )
        smooth: list[float] = []

        def show(step: int, loss: float) -> None:
            smooth.append(loss if not smooth else _SMOOTHING * smooth[-1] + 0.02 * loss)
            progress.update(task, completed=step + 1, loss=smooth[-1])

        train(out, recipe, on_step=show)


if __name__ == "__main__":
    main()
