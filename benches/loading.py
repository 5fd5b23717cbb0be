"""The model under measurement: a shape of random weights, a config.json's, or one that is named."""

from pathlib import Path
from typing import Any

import torch

from benches.random_models import Shape, random_qwen2


def loaded(model: str | None, shape: Shape, *, seed: int = 0, on_gpu: bool = False) -> Any:
    """A transformers model that never ends a reply by itself and that pvcore never met.

    `model` is a name or folder to load, or a `config.json` whose shape is filled with random
    weights; without it, it is a small Qwen2 of `shape`. It is float32 on the CPU and bfloat16 on a
    GPU.
    """
    from transformers import AutoModelForCausalLM, GenerationConfig

    dtype = torch.bfloat16 if on_gpu else torch.float32
    if model is None:
        plain = random_qwen2(shape, seed=seed)
    elif model.endswith(".json"):
        torch.manual_seed(seed)
        with torch.device("cuda" if on_gpu else "cpu"):
            plain = AutoModelForCausalLM.from_config(config_of(model), dtype=dtype)
    else:
        plain = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    plain = plain.to("cuda" if on_gpu else "cpu").eval()
    # The model's own habits of sampling and of ending would make replies of different lengths.
    plain.generation_config = GenerationConfig(pad_token_id=0)
    return plain


def config_of(model: str) -> Any:
    """The config of a name, a folder, or a `config.json`."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(model)


def called(model: str | None, config: Any) -> str:
    """What was measured, without the place of a file."""
    if model is None or model.endswith(".json"):
        return f"{config.model_type}, random weights"
    return Path(model).name if Path(model).exists() else model
