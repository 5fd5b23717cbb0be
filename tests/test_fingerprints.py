"""Fingerprints change with what they stand for, and with nothing else."""

from __future__ import annotations

import json

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


def test_a_special_token_trained_alone_shows_in_every_number() -> None:
    hf, plain = build("qwen2"), tokenizer()
    before, mark = fingerprints.of_marks(hf, plain), plain.convert_tokens_to_ids("<|im_start|>")
    whole, at = fingerprints.of_weights(hf), mark * 64 + 1
    assert at % (128 * 64 // 256), "the sample of the weights holds this number"
    with torch.no_grad():
        hf.get_input_embeddings().weight[mark, 1] += 1e-3
    assert fingerprints.of_weights(hf) == whole
    changed = fingerprints.of_marks(hf, plain)
    assert changed != before
    with torch.no_grad():
        hf.get_output_embeddings().weight[mark, 1] += 1e-3
    assert fingerprints.of_marks(hf, plain) not in (changed, before)
    assert fingerprints.of_marks(build("qwen2"), tokenizer()) == before


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
