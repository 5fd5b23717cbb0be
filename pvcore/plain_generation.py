"""Plain generation: what bends replies, set to have no effect.

A model's own generation config may hold any of it, and transformers takes from there what is not
given.
"""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

_PLAIN: Mapping[str, Any] = {
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "min_length": 0,
    "min_new_tokens": None,
    "max_time": None,
    "stop_strings": None,
    "bad_words_ids": None,
    "sequence_bias": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "exponential_decay_length_penalty": None,
    "watermarking_config": None,
    "guidance_scale": None,
    "penalty_alpha": None,
    "dola_layers": None,
    "prompt_lookup_num_tokens": None,
    "num_beams": 1,
    "num_beam_groups": None,
    "num_return_sequences": 1,
    "constraints": None,
    "force_words_ids": None,
}
_PLAIN_SAMPLING: Mapping[str, Any] = {
    "top_k": 0,
    "top_p": 1.0,
    "min_p": None,
    "top_h": None,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
}


def plain_settings(hf: Any, temperature: float | int, max_new_tokens: int) -> dict[str, Any]:
    """What `generate` takes for plain samples of a model; temperature 0 means greedy."""
    how = {"do_sample": True, "temperature": temperature, **_PLAIN_SAMPLING}
    settings: dict[str, Any] = how if temperature else {"do_sample": False}
    # Older transformers do not know all of them, and would refuse what they do not know.
    config: Any = getattr(hf, "generation_config", None)
    plain = {**settings, **_PLAIN, "max_new_tokens": max_new_tokens}
    plain = {name: value for name, value in plain.items() if hasattr(config, name)}
    if (getattr(config, "num_return_sequences", None) or 1) > 1:
        # transformers checks the model's own config before it takes what is given, and refuses one
        # that asks for several replies and samples none.
        plain["generation_config"] = single = deepcopy(config)
        single.num_return_sequences = 1
    return plain
