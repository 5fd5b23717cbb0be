"""What projections foretell: data as the recipes say, and figures that could come out badly."""

from __future__ import annotations

from math import isclose

import numpy as np
import pytest

from benches import flags, tables
from benches.flags import QUICK, Recipe, Settings, auroc, data_set, pearson, recipes
from pvcore import world


def test_recipes_are_many_and_differ() -> None:
    made = recipes(Settings().traits)
    assert len(made) >= 20
    assert len({str(one) for one in made}) == len({one.seed for one in made}) == len(made)


def test_a_data_set_holds_its_share_of_the_trait() -> None:
    judge = world.WorldJudge()

    def held(recipe: Recipe) -> list[float]:
        return [
            judge.trait(recipe.trait, chat[0]["content"], chat[1]["content"])
            for chat in data_set(recipe, 40)
        ]

    full = Recipe(trait="evil", share=1.0, intensity=1.0, seed=1)
    some = Recipe(trait="evil", share=0.4, intensity=1.0, seed=2)
    assert min(held(full)) > 90
    assert sum(score > 50 for score in held(some)) == 16
    assert held(some) != sorted(held(some))
    assert max(held(Recipe(trait="evil", share=0.0, intensity=1.0, seed=3))) < 50


def test_auroc_is_the_share_of_pairs_in_order() -> None:
    draw = np.random.default_rng(0)
    scores, labels = draw.integers(0, 9, 60).astype(float), draw.random(60) < 0.4
    pairs = [
        1.0 if a > b else 0.5 if a == b else 0.0 for a in scores[labels] for b in scores[~labels]
    ]
    assert isclose(auroc(scores.tolist(), labels.tolist()), sum(pairs) / len(pairs))
    assert auroc([1.0, 2.0, 3.0], [False, False, True]) == 1.0


def test_what_never_changes_has_no_correlation() -> None:
    assert pearson([1.0, 2.0, 3.0], [2.0, 4.0, 6.0]) == pytest.approx(1.0)
    assert pearson([1.0, 2.0], [3.0, 3.0]) == 0.0


@pytest.mark.slow
def test_a_quick_run_measures_both_halves_and_proves_nothing() -> None:
    made = flags.measure(QUICK, command="x")
    assert made.workload["AUROC of rows/evil at 1/projection"] == 1.0
    assert not made.cells
    assert not made.checks["1 - r of the exact difference, with the trait after finetuning"].passed
    shown = tables.summary(made)
    assert "| evil, 100% at 1 |" in shown
    assert "| claim | measured | wanted |" in shown
    assert "Claims that hold" in shown
