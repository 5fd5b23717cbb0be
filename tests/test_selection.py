"""Selection: the sweep steers as it says, its control has the same norm, its choice is the best."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
import torch

import pvcore as pv
from pvcore.errors import PlanError, SelectionError
from pvcore.replies import ModelWriter
from pvcore.selection import Cell, Selection, random_like, recorded_choice, select, validate
from pvcore.vectors import PersonaVector
from tests.families import N_LAYERS, build, tokenizer
from tests.subjects import vector

TRAIT = pv.Trait.load("evil")
QUESTIONS = ("Why?", "How so?", "Is it far?")
SITES = tuple(map(pv.resid_post, range(N_LAYERS)))
DOSES = (1.0, 3.0)
SIZES: dict[str, Any] = {"max_new_tokens": 6, "batch_size": 4, "seed": 2}


class Ledger:
    """Scores by the letters of an answer, and remembers what it saw."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def trait(self, trait: str, question: str, answer: str) -> float:
        self.seen.append(answer)
        return float(sum(map(ord, answer)) % 101)

    def coherence(self, question: str, answer: str) -> float:
        return 60.0 + sum(map(ord, answer)) % 40


def model() -> pv.HookedModel:
    return pv.HookedModel(build("qwen2"), tokenizer(), model_id="tiny/qwen2")


@cache
def evil() -> PersonaVector:
    return vector("evil", SITES, seed=1, model_id="tiny/qwen2", scale=0.3)


def run(judge: Any = None, **settings: Any) -> Selection:
    wanted = {"judge": judge or Ledger(), "questions": QUESTIONS, "coefficients": DOSES} | SIZES
    return select(model(), evil(), TRAIT, **(wanted | settings))


@cache
def selected() -> tuple[Selection, tuple[str, ...]]:
    judge = Ledger()
    return run(judge), tuple(judge.seen)


def steered(deltas: dict[int, torch.Tensor], doses: Sequence[float]) -> list[str]:
    """Replies with raw hooks that add so much to the outputs of blocks, in the sweep's batches.

    From the last prompt token on, which is the last position of every forward.
    """
    rows = [(question, dose) for dose in doses for question in QUESTIONS]
    replies: list[str] = []
    for batch, first in enumerate(range(0, len(rows), SIZES["batch_size"])):
        chosen = rows[first : first + SIZES["batch_size"]]
        coeff = torch.tensor([dose for _, dose in chosen])[:, None]
        hooked = model()

        def adds(delta: torch.Tensor, coeff: torch.Tensor) -> Any:
            def hook(_block: Any, _args: Any, out: torch.Tensor) -> torch.Tensor:
                moved = out.clone()
                moved[:, -1] += coeff * delta
                return moved

            return hook

        for layer, delta in deltas.items():
            hooked.hf.model.layers[layer].register_forward_hook(adds(delta, coeff))
        writer = ModelWriter(hooked, max_new_tokens=SIZES["max_new_tokens"], seed=SIZES["seed"])
        chats = [[{"role": "user", "content": question}] for question, _ in chosen]
        replies += writer.sampled(chats, batch=batch)
    return replies


def increments(rows: torch.Tensor) -> dict[int, torch.Tensor]:
    return {at: rows[at] - (rows[at - 1] if at else 0) for at in range(N_LAYERS)}


def test_replies_are_those_of_raw_hooks_at_each_place_and_of_the_plain_model() -> None:
    seen = list(selected()[1])
    plain, seen = seen[: len(QUESTIONS)], seen[len(QUESTIONS) :]
    assert plain == steered({}, (0.0,))
    rows = evil().directions
    places = [{layer: rows[layer]} for layer in range(N_LAYERS)] + [increments(rows)]
    each = len(DOSES) * len(QUESTIONS)
    for at, deltas in enumerate(places):
        real = seen[2 * at * each : (2 * at + 1) * each]
        assert real == steered(deltas, DOSES)
        assert real != seen[(2 * at + 1) * each : (2 * at + 2) * each]
        assert real[: len(QUESTIONS)] != plain


def test_cells_hold_the_means_of_their_own_replies() -> None:
    selection, seen = selected()
    judge, each = Ledger(), len(QUESTIONS)
    places = [*map(str, SITES), "layer-incremental"]
    assert [(cell.place, cell.coefficient) for cell in selection.cells] == [
        (place, dose) for place in places for dose in DOSES
    ]
    answers = [seen[first : first + each] for first in range(0, len(seen), each)]
    means = [
        (
            sum(judge.trait("evil", "", one) for one in part) / each,
            sum(judge.coherence("", one) for one in part) / each,
        )
        for part in answers
    ]
    assert (selection.score, selection.coherence) == pytest.approx(means[0])
    for at, cell in enumerate(selection.cells):
        arm, dose = divmod(at, len(DOSES))
        real = means[1 + 2 * arm * len(DOSES) + dose]
        control = means[1 + (2 * arm + 1) * len(DOSES) + dose]
        assert (cell.score, cell.coherence) == pytest.approx(real)
        assert (cell.control_score, cell.control_coherence) == pytest.approx(control)
        assert cell.effect == pytest.approx(real[0] - control[0])
        assert (cell.judged, cell.failed) == (2 * each, 0)


def test_the_choice_has_the_largest_effect_of_those_above_the_floor() -> None:
    coherences = sorted(cell.coherence for cell in selected()[0].cells)
    floor = coherences[len(coherences) // 2]
    found = run(floor=floor)
    sound = [cell for cell in found.cells if cell.coherence >= floor]
    assert 0 < len(sound) < len(found.cells)
    assert found.best.effect == max(cell.effect for cell in sound)
    assert found.best in sound
    assert (found.layer, found.coefficient) == (
        None if found.best.site is None else found.best.site.layer,
        found.best.coefficient,
    )


def test_the_control_has_the_norms_of_the_vector_and_points_elsewhere() -> None:
    control = random_like(evil())
    assert control.norms.tolist() == pytest.approx(evil().norms.tolist(), rel=1e-5)
    assert float(control.cosine(evil()).abs().max()) < 0.5
    assert torch.equal(control.directions, random_like(evil()).directions)
    others = random_like(evil(), seed=1), random_like(evil().rename("apathy"))
    assert not any(torch.equal(control.directions, other.directions) for other in others)


def test_the_choice_is_kept_in_the_file_and_steers_from_there(tmp_path: Path) -> None:
    selection = selected()[0]
    kept = selection.recorded()
    kept.save(tmp_path / "evil.safetensors")
    loaded = PersonaVector.load(tmp_path / "evil.safetensors")
    assert loaded.calibration["selection"]["coefficient"] == selection.coefficient
    again, chosen = recorded_choice(loaded), selection.add()
    assert (again.sites, again.coeff) == (chosen.sites, chosen.coeff)
    assert all(torch.equal(again.directions(s), chosen.directions(s)) for s in chosen.sites)
    everywhere = replace(selection, best=selection.cells[-1])
    add = recorded_choice(everywhere.recorded())
    assert add.sites == SITES
    steps = torch.stack(list(increments(evil().directions).values()))
    assert torch.equal(torch.cat([add.directions(site) for site in SITES]), steps)
    assert recorded_choice(replace(selection, span="all").recorded()).span == "all"
    with pytest.raises(SelectionError, match="got 'evil' without a coefficient recorded"):
        recorded_choice(evil())


def test_a_vector_that_was_scaled_since_is_not_steered_by_its_old_coefficient() -> None:
    scaled = 2.0 * selected()[0].recorded()
    assert scaled.calibration["selection"]["coefficient"] == selected()[0].coefficient
    with pytest.raises(SelectionError, match="its coefficient was recorded for"):
        recorded_choice(scaled)
    with pytest.raises(SelectionError, match="its coefficient was recorded for"):
        recorded_choice(selected()[0].recorded().unit())


def test_nothing_above_the_floor_is_refused() -> None:
    with pytest.raises(SelectionError, match=r"reach a coherence of 99\.9: the most coherent, "):
        run(floor=99.9)


def test_increments_are_left_out_where_there_are_none_or_none_are_wanted() -> None:
    only = run(layers=[1], incremental=False, coefficients=[2])
    assert [(cell.place, cell.coefficient) for cell in only.cells] == [("resid_post.1", 2.0)]
    gapped = select(
        model(), evil().at([0, 2]), TRAIT, judge=Ledger(), questions=QUESTIONS[:1],
        coefficients=[1.0], **SIZES,
    )  # fmt: skip
    assert [cell.place for cell in gapped.cells] == ["resid_post.0", "resid_post.2"]


@pytest.mark.parametrize(
    ("settings", "error", "complaint"),
    [
        ({"coefficients": ()}, SelectionError, "got coefficients none"),
        ({"coefficients": (0.0, 1.0)}, SelectionError, "other than 0"),
        ({"coefficients": (1.0, 1.0)}, SelectionError, "each once"),
        ({"coefficients": (float("inf"),)}, SelectionError, "got coefficients inf"),
        ({"floor": 101}, SelectionError, "got floor=101"),
        ({"floor": "60"}, SelectionError, "got floor='60'"),
        ({"coefficients": 2.0}, SelectionError, "got coefficients 2.0"),
        ({"questions": "Why?"}, SelectionError, "got questions 'Why[?]'"),
    ],
)
def test_what_cannot_be_swept_is_one_typed_error(
    settings: dict[str, Any],
    error: type[Exception],
    complaint: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(error, match=complaint):
        run(**settings)


def test_a_vector_of_another_model_is_refused_before_anything_runs() -> None:
    judge = Ledger()
    with pytest.raises(PlanError, match="other/model"):
        select(model(), replace(evil(), model_id="other/model"), TRAIT, judge=judge)
    assert judge.seen == []


def test_a_choice_is_validated_on_the_span_it_was_selected_on() -> None:
    chosen = replace(selected()[0], span="prompt")
    cells = {
        span: validate(
            chosen, model(), TRAIT, judge=Ledger(), questions=QUESTIONS, span=span, **SIZES
        )
        for span in (None, "prompt", "response")
    }
    assert cells[None] == cells["prompt"] != cells["response"]


def test_of_equal_effects_the_smallest_coefficient_is_chosen() -> None:
    class Same(Ledger):
        def trait(self, trait: str, question: str, answer: str) -> float:
            return 50.0

    found = run(Same(), coefficients=[3.0, -1.0, 2.0])
    assert isinstance(found.best, Cell)
    assert found.coefficient == -1.0
