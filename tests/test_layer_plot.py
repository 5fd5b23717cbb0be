"""The figure of a vector's quality by layer."""

from __future__ import annotations

from typing import Any

import pytest

from pvcore.layer_plot import quality_by_layer
from pvcore.report import ReportError

NAN = float("nan")
LAYERS = [0, 1, 2, 3]
GOOD: dict[str, Any] = {
    "trait": "evil",
    "separation": [1.0, 1.5, 2.5, 2.0],
    "interval": [(0.8, 1.1), (1.3, 1.7), (2.2, 2.6), (1.8, 2.3)],
    "split_half": [0.97, 0.98, 0.99, 0.95],
    "cosine_low": [0.96, 0.97, 0.98, 0.93],
}


def test_the_figure_names_what_it_shows_and_is_the_same_each_time() -> None:
    drawn = quality_by_layer(LAYERS, **GOOD)
    assert drawn == quality_by_layer(LAYERS, **GOOD)
    for text in ("separation", "cosine", "layer", "two halves", "97.5% of resamples"):
        assert f">{text}</text>" in drawn
    assert drawn != quality_by_layer(LAYERS, **GOOD | {"interval": [(0.1, 3.0)] * 4})


def test_what_was_not_resampled_is_left_out() -> None:
    unknown = {"interval": [(NAN, NAN)] * 4, "cosine_low": [NAN] * 4}
    drawn = quality_by_layer(LAYERS, **GOOD | unknown)
    assert ">97.5% of resamples</text>" not in drawn
    assert ">95% interval</text>" not in drawn
    assert ">two halves</text>" in drawn


def test_one_layer_is_drawn_too() -> None:
    single = {name: value if name == "trait" else value[:1] for name, value in GOOD.items()}
    assert "<svg" in quality_by_layer([5], **single)


@pytest.mark.parametrize(
    ("layers", "changes", "complaint"),
    [
        ([], {}, "no layers"),
        ([0, 2, 1, 3], {}, "rising order"),
        (LAYERS, {"separation": [1.0]}, "got 1 separations; wanted 4"),
        (LAYERS, {"split_half": [1.0, 1.0, 1.0, float("inf")]}, "infinite"),
    ],
)
def test_what_cannot_be_drawn_is_one_typed_error(
    layers: list[int], changes: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(ReportError, match=complaint):
        quality_by_layer(layers, **GOOD | changes)
