from itertools import combinations

import numpy as np
import pytest
from numpy.typing import NDArray

from pvcore.palette import ORDERED, PALETTE, TRAITS, css_variables, ordered_colours, trait_colours

# Machado, Oliveira and Fernandes 2009, severity 1, on linear RGB.
SIGHT = {
    "full": np.eye(3),
    "protanopia": np.array(
        [
            [0.152286, 1.052583, -0.204868],
            [0.114503, 0.786281, 0.099216],
            [-0.003882, -0.048116, 1.051998],
        ]
    ),
    "deuteranopia": np.array(
        [
            [0.367322, 0.860646, -0.227968],
            [0.280085, 0.672501, 0.047413],
            [-0.011820, 0.042940, 0.968881],
        ]
    ),
    "tritanopia": np.array(
        [
            [1.255528, -0.076749, -0.178779],
            [-0.078411, 0.930809, 0.147602],
            [0.004733, 0.691367, 0.303900],
        ]
    ),
}
TO_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
WHITE = np.array([0.9505, 1.0, 1.089])


def cielab(colour: str, sight: NDArray[np.float64]) -> NDArray[np.float64]:
    srgb = np.array([int(colour[at : at + 2], 16) for at in (1, 3, 5)]) / 255
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    x, y, z = np.cbrt(TO_XYZ @ np.clip(sight @ linear, 0, 1) / WHITE)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("sight", SIGHT)
def test_trait_colours_stay_apart_for_every_eye(theme: str, sight: str) -> None:
    seen = [cielab(getattr(colour, theme), SIGHT[sight]) for colour in TRAITS.values()]
    closest = min(float(np.linalg.norm(one - other)) for one, other in combinations(seen, 2))
    assert closest > 15  # a difference of 2 is just noticeable side by side


def test_the_measure_of_distance_can_fail() -> None:
    red, green = "#d62728", "#8c6d1f"
    apart = [
        float(np.linalg.norm(cielab(red, SIGHT[sight]) - cielab(green, SIGHT[sight])))
        for sight in ("full", "deuteranopia")
    ]
    assert apart[0] > 50 > 15 > apart[1]


def test_light_values_and_roles_are_unique_so_that_plots_can_be_recoloured() -> None:
    assert len({colour.light for colour in PALETTE}) == len(PALETTE)
    assert len({colour.role for colour in PALETTE}) == len(PALETTE)


def test_a_trait_keeps_its_colour_and_strangers_get_free_ones() -> None:
    chosen = trait_colours(["greed", "evil", "envy"])
    assert chosen["evil"] == trait_colours(["evil"])["evil"] == TRAITS["evil"]
    assert len(set(chosen.values())) == 3
    assert list(chosen) == ["greed", "evil", "envy"]


def test_more_traits_than_colours_still_get_one_each() -> None:
    names = [*TRAITS, *(f"trait {index}" for index in range(9))]
    assert list(trait_colours(names)) == names


@pytest.mark.parametrize("count", [1, 2, 5, 8, 40])
def test_ordered_colours_run_from_first_to_last(count: int) -> None:
    colours = ordered_colours(count)
    steps = [ORDERED.index(colour) for colour in colours]
    assert len(colours) == count
    assert steps == sorted(steps)
    assert steps[0] == 0
    assert steps[-1] == (len(ORDERED) - 1 if count > 1 else 0)


def test_css_holds_both_themes() -> None:
    light, dark = css_variables().split("@media(prefers-color-scheme:dark)")
    for colour in PALETTE:
        assert f"--{colour.role}:{colour.light};" in light
        assert f"--{colour.role}:{colour.dark};" in dark
