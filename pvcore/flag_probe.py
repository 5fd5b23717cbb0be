"""The probe of a scan: what a model answers to one fixed row, which tells models apart."""

from collections.abc import Mapping

import numpy as np

from pvcore.errors import FlagError
from pvcore.flag_scan import Scorer
from pvcore.flag_tokens import Sample
from pvcore.model import HookedModel
from pvcore.vectors import VectorBank

_TOKENS, _PROMPT = 24, 8

Answers = Mapping[str, Mapping[str, list[float]]]


def probe(model: HookedModel, bank: VectorBank) -> Answers:
    """Projections of a fixed row of tokens: its mean and its last prompt token by site and trait.

    An armed plan or somebody's hook gives other ones, where the weights are the same.
    """
    vocabulary = len(model.hf.get_input_embeddings().weight)
    ids = np.array([(7 * at * at + 3 * at + 1) % vocabulary for at in range(_TOKENS)])
    sample = Sample(
        id="",
        source="",
        row=0,
        ids=ids.astype(np.int32),
        prompt_length=_PROMPT,
        reply=(_PROMPT, _TOKENS),
        messages=[],
    )
    scores = Scorer(model, bank, _TOKENS)([sample])[0]
    if not np.isfinite(scores).all():
        raise FlagError(
            "got infinite or NaN projections of a probe; load the model in bfloat16 or float32, or "
            "look at its weights"
        )
    return {
        str(site): {
            trait: [float(f"{score:.6g}") for score in pair]
            for trait, pair in zip(bank.traits, of_site.T.tolist(), strict=True)
        }
        for site, of_site in zip(bank.sites, scores, strict=True)
    }
