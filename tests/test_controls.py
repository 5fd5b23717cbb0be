"""Controls: as long as the vector at every site, and in a direction of their own."""

import pytest
import torch

import pvcore as pv
from pvcore.controls import random_of_same_norm


def test_a_control_has_the_norms_and_the_sites_and_another_direction() -> None:
    directions = torch.randn(3, 128) * torch.tensor([[1.0], [2.0], [5.0]])
    sites = tuple(map(pv.resid_post, range(3)))
    evil = pv.PersonaVector(trait="evil", sites=sites, directions=directions, model_id="a/b")
    first, again, other = (
        random_of_same_norm(evil, torch.Generator().manual_seed(seed)) for seed in (7, 7, 8)
    )
    assert first.norms.tolist() == pytest.approx(evil.norms.tolist())
    assert (first.sites, first.model_id, first.trait) == (evil.sites, "a/b", "random")
    assert float(first.cosine(evil).abs().max()) < 0.4
    assert torch.equal(first.directions, again.directions)
    assert not torch.equal(first.directions, other.directions)
