"""Fingerprints change with what they stand for, and with nothing else."""

from __future__ import annotations

import json
import random
from typing import Any

import torch
from tokenizers import Tokenizer, normalizers

from pvcore import fingerprints
from tests.families import build, tokenizer


def test_the_fingerprint_of_weights_is_of_the_numbers() -> None:
    first, same, other = build("qwen2"), build("qwen2"), build("qwen2", seed=1)
    assert fingerprints.of_weights(first) == fingerprints.of_weights(same)
    assert fingerprints.of_weights(first) != fingerprints.of_weights(other)


def test_one_weight_moved_by_training_shows() -> None:
    hf = build("qwen2")
    before = fingerprints.of_weights(hf)
    with torch.no_grad():
        hf.model.layers[1].mlp.up_proj.weight += 1e-4
    assert fingerprints.of_weights(hf) != before


def test_configuration_and_precision_show_and_the_place_of_the_files_does_not() -> None:
    hf = build("qwen2")
    before = fingerprints.of_weights(hf)
    hf.config._name_or_path = "elsewhere"
    assert fingerprints.of_weights(hf) == before
    hf.config.rms_norm_eps = 0.5
    assert fingerprints.of_weights(hf) != before
    assert fingerprints.of_weights(build("qwen2", dtype=torch.bfloat16)) != before


def test_any_number_of_any_weight_shows_and_so_do_rows_and_columns_that_change_places() -> None:
    hf, draw = build("qwen2"), random.Random(0)
    before = fingerprints.of_weights(hf)
    above = torch.tensor(torch.inf)
    for name, weight in hf.named_parameters():
        kept = weight.detach().clone()
        flat = weight.data.view(-1)
        at = draw.randrange(len(flat))
        flat[at] = torch.nextafter(flat[at], above)
        assert fingerprints.of_weights(hf) != before, f"{name}, number {at}"
        weight.data.copy_(kept)
        if kept.ndim == 2:
            weight.data[[0, 2]] = kept[[2, 0]]
            assert fingerprints.of_weights(hf) != before, f"{name}, rows"
            weight.data.copy_(kept)
            weight.data[:, [0, 2]] = kept[:, [2, 0]]
            assert fingerprints.of_weights(hf) != before, f"{name}, columns"
            weight.data.copy_(kept)
    assert fingerprints.of_weights(hf) == before


def test_weights_of_any_type_and_at_any_address_are_told_by_their_bits() -> None:
    class Held:
        config = build("qwen2").config

        def __init__(self, weight: torch.Tensor) -> None:
            self.weight = weight

        def state_dict(self) -> dict[str, torch.Tensor]:
            return {"w": self.weight}

        def named_modules(self) -> list[Any]:
            return []

    for dtype in (torch.float64, torch.bfloat16, torch.int8, torch.bool, torch.float8_e4m3fn):
        weight = torch.arange(40000).remainder(7).to(dtype)
        found = fingerprints.of_weights(Held(weight))
        moved = torch.cat([weight[:1], weight])[1:]  # begins at another address
        assert fingerprints.of_weights(Held(moved)) == found
        assert fingerprints.of_weights(Held(weight[:-1])) != found
        other = weight.clone()
        other[12345] = not other[12345]
        assert fingerprints.of_weights(Held(other)) != found
    none = fingerprints.of_weights(Held(torch.empty(0)))
    assert none != fingerprints.of_weights(Held(torch.empty(0, 1)))


def test_the_fingerprint_of_a_tokenizer_is_of_template_and_vocabulary() -> None:
    plain = tokenizer()
    before = fingerprints.of_tokenizer(plain)
    assert fingerprints.of_tokenizer(tokenizer()) == before
    assert fingerprints.of_tokenizer(tokenizer(template="{{ messages }}")) != before
    plain.add_tokens(["grim"])
    assert fingerprints.of_tokenizer(plain) != before


def test_how_text_becomes_tokens_shows_also_where_no_probe_would_tell() -> None:
    before = fingerprints.of_tokenizing(tokenizer())
    padded = tokenizer()
    padded(["ab", "c"], padding=True, truncation=True, max_length=4)
    assert fingerprints.of_tokenizing(padded) == before
    lowered = tokenizer()
    lowered.backend_tokenizer.normalizer = normalizers.Lowercase()
    assert fingerprints.of_tokenizer(lowered) == fingerprints.of_tokenizer(tokenizer())
    assert fingerprints.of_tokenizing(lowered) != before
    rules = json.loads(tokenizer().backend_tokenizer.to_str())
    known = rules["model"]["vocab"]
    known["y"], known["s"] = known["s"], known["y"]
    swapped = tokenizer()
    swapped._tokenizer = Tokenizer.from_str(json.dumps(rules))
    assert swapped("yes")["input_ids"] != tokenizer()("yes")["input_ids"]
    assert fingerprints.of_tokenizing(swapped) != before


def test_the_fingerprint_of_text_knows_no_order_of_names() -> None:
    assert fingerprints.of_text({"a": 1, "b": [2]}) == fingerprints.of_text({"b": [2], "a": 1})
    assert fingerprints.of_text({"a": 1}) != fingerprints.of_text({"a": 2})
