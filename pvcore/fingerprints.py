"""Fingerprints: short texts that change when a model or another thing of consequence does."""

import json
from hashlib import sha256
from typing import Any

import torch

_ADAPTER_STATES = ("active_adapters", "disable_adapters", "merged_adapters", "scaling")
_SAMPLED = 256  # numbers of each weight: training moves them all, and 7e9 take a while to hash


def of_text(content: object) -> str:
    """A fingerprint of anything that JSON can hold."""
    return sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def of_weights(hf: Any, *, every_number: bool = False) -> str:
    """A fingerprint of a model: its configuration, its adapters, and numbers of every weight.

    The numbers are evenly spaced ones, and two models that differ in others look alike, unless
    `every_number` is asked for: some seconds for every few gigabytes.
    """
    config = hf.config.to_dict()
    for passing in ("_name_or_path", "transformers_version"):
        config.pop(passing, None)
    digest = sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, weight in hf.state_dict().items():
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        if not weight.is_meta and weight.numel():
            flat = weight.detach().reshape(-1)
            if every_number:
                digest.update(flat.contiguous().cpu().view(torch.uint8).numpy())
            else:
                chosen = flat[:: max(1, flat.numel() // _SAMPLED)]
                digest.update(chosen.to("cpu", torch.float32).numpy().tobytes())
    digest.update(_adapters(hf).encode())
    return digest.hexdigest()[:16]


def of_marks(hf: Any, tokenizer: Any) -> str:
    """A fingerprint of every number that a model keeps for the special tokens of a tokenizer.

    They stand in every chat, and are few enough to be trained alone: `of_weights` may see none.
    """
    digest = sha256()
    ids = sorted(getattr(tokenizer, "added_tokens_decoder", {}))
    for held in (hf.get_input_embeddings(), hf.get_output_embeddings()):
        weight = getattr(held, "weight", None)
        if weight is not None and not weight.is_meta:
            known = [one for one in ids if one < len(weight)]
            digest.update(weight.detach()[known].to("cpu", torch.float32).numpy().tobytes())
    return digest.hexdigest()[:16]


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
