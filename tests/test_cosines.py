"""Cosines between the vectors of a bank, at each of its sites."""

from __future__ import annotations

import torch

import pvcore as pv
from pvcore.cosines import cosine_matrices
from tests.subjects import trio


def test_every_vector_is_compared_with_every_other_at_each_site() -> None:
    sites = pv.resid_post(0), pv.resid_post(2)
    vectors = trio(*sites)
    found = cosine_matrices(pv.VectorBank(vectors))
    assert found.shape == (2, 3, 3)
    for place, site in enumerate(sites):
        rows = torch.stack([one.direction(site).double() for one in vectors])
        wanted = torch.nn.functional.cosine_similarity(rows[:, None], rows[None], dim=-1)
        assert float((found[place] - wanted).abs().max()) < 1e-6
        assert 0.05 < float(wanted[0, 1].abs()) < 0.95
    assert float(found.abs().max()) <= 1.0
