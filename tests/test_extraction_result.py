"""The quality of a vector is read from its own statistics, also from a file."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

import pvcore as pv
from pvcore.extraction_result import quality

SITES = (pv.resid_post(0), pv.resid_post(1))


def vector(**statistics: list[float]) -> pv.PersonaVector:
    return pv.PersonaVector(
        trait="evil",
        sites=SITES,
        directions=torch.tensor([[3.0, 4.0], [6.0, 8.0]]),
        statistics={name: torch.tensor(values) for name, values in statistics.items()},
    )


def test_lengths_are_told_in_units_of_the_spread(tmp_path: Path) -> None:
    made = vector(
        split_half_cosine=[0.9, 0.8],
        reply_spread=[2.0, 5.0],
        length_low=[0.8, 0.9],
        length_high=[1.2, 1.1],
        cosine_low=[0.7, 0.6],
    )
    made.save(tmp_path / "evil.safetensors")
    for one in (made, pv.PersonaVector.load(tmp_path / "evil.safetensors")):
        first, second = quality(one)
        assert (first.site, first.norm, first.separation) == (SITES[0], 5.0, 2.5)
        assert first.separation_interval == pytest.approx((2.0, 3.0))
        assert second.separation_interval == pytest.approx((1.8, 2.2))
        assert (second.split_half_cosine, second.cosine_low) == pytest.approx((0.8, 0.6))


def test_sides_without_any_spread_are_endlessly_apart() -> None:
    made = vector(split_half_cosine=[1.0, 1.0], reply_spread=[0.0, 5.0], length_low=[1.0, 1.0])
    assert math.isinf(quality(made)[0].separation)


def test_what_was_not_resampled_is_unknown() -> None:
    first, _ = quality(vector(split_half_cosine=[0.9, 0.8], reply_spread=[0.0, 5.0]))
    assert math.isinf(first.separation)
    assert all(map(math.isnan, (*quality(vector_without())[1].separation_interval,)))
    assert math.isnan(first.cosine_low)


def vector_without() -> pv.PersonaVector:
    return vector(split_half_cosine=[0.9, 0.8], reply_spread=[1.0, 5.0])
