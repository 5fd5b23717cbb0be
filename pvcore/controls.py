"""Controls: what a vector is compared with, to tell its direction from its length."""

import torch

from pvcore.vectors import PersonaVector


def random_of_same_norm(vector: PersonaVector, generator: torch.Generator) -> PersonaVector:
    """Random directions with the norms of a vector, site by site."""
    noise = torch.randn(vector.directions.shape, generator=generator)
    lengths = vector.norms / noise.norm(dim=1)
    return PersonaVector(
        trait="random",
        sites=vector.sites,
        directions=noise * lengths[:, None],
        model_id=vector.model_id,
    )
