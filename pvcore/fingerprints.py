"""Fingerprints: short texts that change when a model or another thing of consequence does."""

import json
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor

_ADAPTER_STATES = ("active_adapters", "disable_adapters", "merged_adapters", "scaling")
# How one and the same model may be called, kept or run, which its answers do not depend on.
_PASSING = ("_name_or_path", "transformers_version", "use_cache")
# A prime: whatever the shape of a weight, its rows and its columns fall on many of these.
_COLUMNS = 1021
_WORD = 8


def of_text(content: object) -> str:
    """A fingerprint of anything that JSON can hold."""
    return sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def of_weights(hf: Any) -> str:
    """A fingerprint of a model: its configuration, its adapters, and every number of every weight.

    Weights are read once, where they are and about as fast as their memory allows.
    """
    config = hf.config.to_dict()
    for passing in _PASSING:
        config.pop(passing, None)
    digest = sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, weight in hf.state_dict().items():
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        if not weight.is_meta:
            for part in _sums(weight):
                digest.update(part.cpu().numpy().tobytes())
    digest.update(_adapters(hf).encode())
    return digest.hexdigest()[:16]


def _sums(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of a weight's bits over columns, as integers: exact in any order. And what is left over.

    A hash of all the bits would take a second for each gigabyte.
    """
    held = weight.detach().contiguous().reshape(-1).view(torch.uint8)
    if held.storage_offset() % _WORD or held.data_ptr() % _WORD:
        held = held.clone()
    rows = held.numel() // (_WORD * _COLUMNS)
    end = rows * _WORD * _COLUMNS
    return held[:end].view(torch.int64).view(rows, _COLUMNS).sum(0), held[end:]


def _adapters(hf: Any) -> str:
    """Which of PEFT's adapters act, and how strongly: the same weights answer otherwise."""
    told = [
        [name, *(str(getattr(module, state, None)) for state in _ADAPTER_STATES)]
        for name, module in hf.named_modules()
        if hasattr(module, "active_adapters") and hasattr(module, "merged_adapters")
    ]
    return json.dumps(told) if told else ""


def of_generation(hf: Any) -> str:
    """A fingerprint of how a model generates unless it is told otherwise."""
    held = getattr(hf, "generation_config", None)
    config = {} if held is None else held.to_dict()
    config.pop("transformers_version", None)
    return of_text(json.loads(json.dumps(config, default=str)))


def of_tokenizer(tokenizer: Any) -> str:
    """A fingerprint of how chats become tokens: the template and the vocabulary."""
    if tokenizer is None:
        return "none"
    template = getattr(tokenizer, "chat_template", None)
    return of_text([str(template), sorted(tokenizer.get_vocab().items())])


def of_tokenizing(tokenizer: Any) -> str:
    """A fingerprint of all that makes tokens of text: merges and normalizers too, where told."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = {} if backend is None else json.loads(backend.to_str())
    told = {name: rule for name, rule in rules.items() if name not in ("padding", "truncation")}
    marks = [str(getattr(tokenizer, f"add_{end}_token", None)) for end in ("bos", "eos")]
    return of_text([of_tokenizer(tokenizer), told, *marks])
