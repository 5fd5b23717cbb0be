"""The shipped model folder: writing it, and checking its files against the recorded hashes."""

import copy
import hashlib
import json
import platform
import statistics
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pvcore.errors import ModelError
from pvcore.world.tokenizer import save_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast, Qwen2ForCausalLM

FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)
_LIBRARIES = ("torch", "transformers", "tokenizers", "safetensors")
_N_CURVE = 30


def write_model(
    folder: Path,
    model: "Qwen2ForCausalLM",
    tokenizer: "PreTrainedTokenizerFast",
    recipe: Mapping[str, Any],
    losses: list[float],
) -> None:
    """Write bf16 weights, configuration, tokenizer and a manifest with their SHA-256."""
    halved = copy.deepcopy(model).bfloat16()
    halved.save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    content = {
        "recipe": dict(recipe),
        "command": "python -m pvcore.world.train --out DIR",
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "final_loss": round(statistics.mean(losses[-100:]), 4),
        "loss_curve": _curve(losses),
        "versions": {name: version(name) for name in _LIBRARIES}
        | {"python": platform.python_version()},
        "sha256": {name: file_hash(folder / name) for name in FILES},
    }
    (folder / "manifest.json").write_text(json.dumps(content, indent=2) + "\n", "utf-8")


def check_files(folder: Path) -> None:
    """Raise ModelError unless every model file has the hash the manifest records."""
    recorded = json.loads((folder / "manifest.json").read_text("utf-8"))["sha256"]
    for name in FILES:
        found = file_hash(folder / name)
        if found != recorded[name]:
            raise ModelError(
                f"{name} of the persona-world model has SHA-256 {found}; the manifest records "
                f"{recorded[name]}. Install pvcore again, or rebuild the model with "
                "`python -m pvcore.world.train`."
            )


def file_hash(path: Path) -> str:
    """SHA-256 of a file, as hex."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _curve(losses: list[float]) -> list[tuple[int, float]]:
    """Mean loss of consecutive stretches, by the step at which each ends."""
    width = max(1, len(losses) // _N_CURVE)
    return [
        (end, round(statistics.mean(losses[end - width : end]), 4))
        for end in range(width, len(losses) + 1, width)
    ]
