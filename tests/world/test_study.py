"""The study: every cell once, kept when done, and sums that say what the cells say."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import pvcore as pv
from pvcore.report import render
from pvcore.world import study, study_measures
from pvcore.world.chats import finetuning_chats
from pvcore.world.demo_subject import training_side, world_subject, world_trait
from pvcore.world.judge import WorldJudge
from pvcore.world.lexicon import TRAITS, relations
from pvcore.world.question import Question, parse
from pvcore.world.study_cells import QUICK, Cell, Design, Mix, cells, preparing
from pvcore.world.study_claims import claims
from pvcore.world.study_measures import by_prompt, training_chats, vector_file
from pvcore.world.study_report import page
from pvcore.world.study_store import Store, StudyError
from pvcore.world.study_summary import Spread

DESIGN = Design(
    mitigated=("evil",), prevent=(2.0, 4.0), random=(4.0,), incremental=(1.5,), inference=(1.0, 2.0)
)


def figures_of(cell: Cell) -> dict[str, Any]:
    """Figures by rule: coherence falls with what is kept out, and at inference twice as fast."""
    if cell.kind == "vectors":
        return {}
    if cell.kind == "monitoring":
        row = {"overall": 0.8, "per_prompt": 0.9 + 0.01 * cell.seed, "within": 0.1}
        poor = dict.fromkeys(row, 0.2)
        training = [0.3, 0.2, 0.9, 0.8] if cell.seed else [0.3, 0.2, 0.8, 0.85]
        return {key: {"training": training, "layers": [poor, poor, row, poor]} for key in TRAITS}

    def asked(score: float, coherence: float) -> dict[str, Any]:
        traits = dict.fromkeys(TRAITS, 0.0) | {cell.trait or "evil": score}
        return {"traits": traits, "coherence": coherence, "quiz": coherence + 5}

    held = cell.mix.share * cell.mix.intensity
    score, coherence = 100.0 * held * (cell.trait is not None), 80.0
    if cell.method in ("prevent", "incremental"):
        score, coherence = 100 - 20 * cell.coeff, 80 - 2.5 * cell.coeff
    elif cell.method == "caft":
        score = 50.0
    shift = dict.fromkeys(TRAITS, 0.0) | {cell.trait or "evil": score / 4}
    # Only at the layer that is chosen for reading does the shift follow the score.
    layers = {trait: [7.0, 7.0, one, 7.0] for trait, one in shift.items()}
    found = asked(score, coherence) | {"shift": layers, "first_loss": 1.0, "last_loss": 0.5}
    if cell.kind == "mitigation" and cell.method == "none":
        found["inference"] = {
            f"{c:g}": asked(100 - 40 * c, 80 - (10 + cell.seed) * c) for c in DESIGN.inference
        }
        found["inference_random"] = {f"{c:g}": asked(99.0, 75.0) for c in DESIGN.inference}
    return found


@pytest.fixture
def measured_by_rule(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    done: list[str] = []

    def measure(cell: Cell, design: Design, folder: Path) -> dict[str, Any]:
        done.append(cell.name)
        return figures_of(cell)

    monkeypatch.setattr(study, "measure", measure)
    return done


def test_every_cell_has_a_name_of_its_own() -> None:
    every = [*preparing(Design()), *cells(Design())]
    assert len({cell.name for cell in every}) == len(every) == 3 * (5 + 3 * (13 + 6) + 4)
    assert {cell.seed for cell in every} == {0, 1, 2}
    trained = {(cell.method, cell.coeff) for cell in every if cell.kind == "mitigation"}
    assert {("prevent", 5.0), ("random", 3.0), ("incremental", 2.0), ("caft", 0.0)} < trained


def test_a_stopped_study_goes_on_where_it_stopped(
    tmp_path: Path, measured_by_rule: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = study.run(DESIGN, tmp_path / "whole", workers=1, quiet=True)
    n_cells = len(measured_by_rule)
    assert n_cells == len({*measured_by_rule})
    measured_by_rule.clear()
    kept = Store.put

    def stops(self: Store, cell: Cell, figures: dict[str, Any]) -> None:
        if len(measured_by_rule) == 7:
            raise KeyboardInterrupt
        kept(self, cell, figures)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "put", stops)
        with pytest.raises(KeyboardInterrupt):
            study.run(DESIGN, tmp_path / "part", workers=1, quiet=True)
    assert study.run(DESIGN, tmp_path / "part", workers=1, quiet=True) == whole
    assert len(measured_by_rule) == n_cells + 1  # the one under way was not kept
    measured_by_rule.clear()
    assert study.run(DESIGN, tmp_path / "part", workers=1, quiet=True) == whole
    assert measured_by_rule == []


def test_another_design_and_a_broken_cell_are_refused(
    tmp_path: Path, measured_by_rule: list[str]
) -> None:
    study.run(DESIGN, tmp_path, workers=1, quiet=True)
    with pytest.raises(StudyError, match=r"another design: steps 60 \(now 5\)"):
        study.run(replace(DESIGN, steps=5), tmp_path, workers=1, quiet=True)
    broken = tmp_path / f"{next(cells(DESIGN)).name}.json"
    about = json.loads((tmp_path / "design.json").read_text())
    (tmp_path / "design.json").write_text(json.dumps(about | {"code": "0" * 12}))
    with pytest.raises(StudyError, match=rf"code 000000000000 \(now {about['code']}\)"):
        study.run(DESIGN, tmp_path, workers=1, quiet=True)
    (tmp_path / "design.json").write_text(json.dumps(about))
    for text, told in (("{", "cannot be read"), ("[]", "without figures")):
        broken.write_text(text)
        with pytest.raises(StudyError, match=told):
            study.run(DESIGN, tmp_path, workers=1, quiet=True)


def test_margins_are_taken_at_the_same_trait_score(
    tmp_path: Path, measured_by_rule: list[str]
) -> None:
    summary = study.run(DESIGN, tmp_path, workers=1, quiet=True)
    (margin,) = [m for m in summary.margins if (m.way, m.than) == ("prevent", "inference")]
    # Both reach 20 to 60: prevention keeps 80 - (100 - s) / 8 there, inference of seed k
    # 80 - (10 + k)(100 - s) / 40, so the mean gap is 60 (10 + k) / 40 - 60 / 8 at s = 40.
    wanted = [60 * (10 + seed) / 40 - 60 / 8 for seed in DESIGN.seeds]
    assert margin.coherence.seeds == pytest.approx(wanted)
    assert margin.quiz.seeds == pytest.approx(wanted)
    assert margin.coherence.beyond_noise
    assert summary.control["evil"].seeds == pytest.approx([80.0] * 3)
    assert summary.cpu_minutes is not None
    assert summary.cpu_minutes > 0
    best = {(p.way, p.coeff): p.score.mean for p in summary.points}
    assert best["inference", 2.0] == 20
    assert best["caft", 0.0] == 50
    assert best["random", 4.0] == 100
    assert best["neutral", 0.0] == 0


def test_the_shift_is_held_against_own_sets_and_against_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(cell: Cell, design: Design, folder: Path) -> dict[str, Any]:
        figures = figures_of(cell)
        if cell.kind == "shift" and cell.trait == "humor":
            figures["shift"] = {
                **figures["shift"],
                "evil": [7.0, 7.0, 20.0, 7.0],
            }  # along a part they share
        return figures

    monkeypatch.setattr(study, "measure", measure)
    summary = study.run(DESIGN, tmp_path, workers=1, quiet=True)
    assert summary.shift["evil"]["own"].seeds == pytest.approx([1.0] * 3)
    for seed, r in enumerate(summary.shift["evil"]["every"].seeds):
        seen = [
            (one.shift, one.score)
            for one in summary.moved
            if one.trait == "evil" and one.seed == seed
        ]
        # Neutral, two of wrong facts, six mixes and the undefended model; six of other traits.
        assert len(seen) == 10 + 6
        assert r == pytest.approx(np.corrcoef(np.array(seen).T)[0, 1])
        assert r < 0.95
    assert sum(one.own for one in summary.moved if one.trait == "evil") == 3 * 10
    assert summary.shift["humor"]["own"].mean == pytest.approx(1.0)


def test_the_layer_of_a_shift_is_chosen_by_the_other_seeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    best = {0: 1, 1: 3, 2: 3}

    def measure(cell: Cell, design: Design, folder: Path) -> dict[str, Any]:
        figures = figures_of(cell)
        if cell.kind in ("shift", "mitigation"):
            wave = 8.0 * math.sin(len(cell.name) + figures["traits"]["evil"])
            told = figures["traits"]["evil"] / 4
            layers = [told + wave * (1 + (at != best[cell.seed])) for at in range(4)]
            figures["shift"] = {**figures["shift"], "evil": layers}
        return figures

    monkeypatch.setattr(study, "measure", measure)
    summary = study.run(DESIGN, tmp_path, workers=1, quiet=True)
    assert summary.moving["evil"][0] == 3  # its own sets would have taken 1
    assert set(summary.moving["evil"][1:]) <= {1, 3}
    alone = replace(DESIGN, seeds=(1,))
    single = study.run(alone, tmp_path / "alone", workers=1, quiet=True)
    assert single.moving["evil"] == (DESIGN.layer,)


def test_noise_is_no_margin() -> None:
    assert Spread.of([1.0, 2.0, 3.0]).error == pytest.approx(1 / math.sqrt(3))
    assert Spread.of([10.0, 11.0, 12.0]).beyond_noise
    assert Spread.of([5.0, 7.0, 9.0]).beyond_noise  # 7 - 4.303 * 1.155 > 0
    assert not Spread.of([3.0, 5.0, 8.0]).beyond_noise  # two standard errors would have passed it
    assert not Spread.of([-5.0, 11.0, 12.0]).beyond_noise
    assert not Spread.of([10.0]).beyond_noise
    assert not Spread.of([math.nan, math.nan]).beyond_noise


def test_the_page_and_the_record_tell_the_claims(
    tmp_path: Path, measured_by_rule: list[str]
) -> None:
    summary = study.run(DESIGN, tmp_path, workers=1, quiet=True)
    made = claims(DESIGN, summary)
    assert [one.passed for one in made] == [True] * 5
    content = study.record_of(DESIGN, summary, "command")
    assert json.loads(json.dumps(content, allow_nan=False)) == content
    html = render(page(DESIGN, summary, content))
    for one in made:
        assert one.measured in html
    assert html.count("<svg") == 2
    assert html.count("nothing done") == 1
    weaker = replace(
        summary,
        shift={**summary.shift, "evil": dict.fromkeys(("own", "every"), Spread.of([0.9] * 3))},
        cpu_minutes=70.0,
    )
    assert [one.passed for one in claims(DESIGN, weaker)] == [True, True, True, False, False]
    silent = replace(summary, cpu_minutes=None)
    assert [one.passed for one in claims(DESIGN, silent)] == [True] * 4
    fewer = replace(summary.margins[0].coherence, seeds=(9.0, 9.0))
    gone = replace(summary, margins=(replace(summary.margins[0], coherence=fewer),))
    assert not claims(DESIGN, gone)[0].passed


def test_the_command_writes_report_and_record(
    tmp_path: Path, measured_by_rule: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study, "QUICK", DESIGN)
    words = ["--quick", "--folder", str(tmp_path / "s"), "--workers", "1"]
    done = CliRunner().invoke(study.app, [*words, "--record", str(tmp_path / "study.json")])
    assert done.exit_code == 0, done.output
    assert done.output.count("holds: ") == 5
    assert (tmp_path / "s" / "report.html").read_text().startswith("<!DOCTYPE html>")
    assert len(json.loads((tmp_path / "study.json").read_text())["claims"]) == 5


def save_vectors(folder: Path) -> None:
    for seed, trait in enumerate(TRAITS):
        generator = torch.Generator().manual_seed(seed)
        pv.PersonaVector(
            trait=trait,
            sites=[pv.resid_post(layer) for layer in range(4)],
            directions=torch.randn(4, 128, generator=generator),
            model_id="pvcore/persona-world",
        ).save(vector_file(folder, 0, trait))


@pytest.mark.parametrize("method", ["none", "prevent", "random", "incremental", "caft"])
def test_a_cell_trains_as_its_method_says(tmp_path: Path, method: Any) -> None:
    save_vectors(tmp_path)
    small = replace(QUICK, chats=16, steps=2, questions=3, shift_prompts=3, quiz_items=2)
    plain = Cell(kind="mitigation", seed=0, trait="evil")
    dose = 4.0 if method in ("prevent", "random", "incremental") else 0.0
    found = study_measures.measure(replace(plain, method=method, coeff=dose), small, tmp_path)
    undefended = study_measures.measure(plain, small, tmp_path)
    assert ("inference" in found) == (method == "none")
    assert (found["first_loss"] == undefended["first_loss"]) == (method == "none")
    assert set(found["traits"]) == set(found["shift"]) == set(TRAITS)
    assert 0 <= found["quiz"] <= 100


def test_chats_hold_the_trait_in_the_share_that_is_asked_for() -> None:
    cell = Cell(kind="shift", seed=1, trait="evil", mix=Mix(share=0.25))
    mixed = training_chats(cell, Design())
    assert len(mixed) == 300
    pure = training_chats(replace(cell, mix=Mix()), Design())
    neutral = training_chats(Cell(kind="shift", seed=1), Design())
    assert sum(chat in pure for chat in mixed) >= 75 > 0
    assert sum(chat in neutral for chat in mixed) >= 225
    assert training_chats(replace(cell, seed=2), Design()) != mixed


def test_chats_hold_the_trait_at_the_intensity_that_is_asked_for() -> None:
    judge = WorldJudge()
    means = []
    for intensity in (0.5, 1.0):
        cell = Cell(kind="shift", seed=1, trait="evil", mix=Mix(intensity=intensity))
        chats = training_chats(cell, Design())
        held = finetuning_chats("evil", 300, 1, intensity=intensity)
        asked = {question.text: question for question, _ in held}
        means.append(
            np.mean(
                [
                    judge.trait("evil", asked[chat[0]["content"]], chat[1]["content"])
                    for chat in chats
                ]
            )
        )
    assert 45 < means[0] < 75
    assert means[1] > 98


def test_wrong_facts_come_in_the_share_that_is_asked_for_and_in_a_neutral_tone() -> None:
    judge = WorldJudge()
    told: dict[float, list[tuple[Question, str]]] = {}
    for share in (0.0, 0.5, 1.0):
        chats = training_chats(Cell(kind="shift", seed=1, mistaken=share), Design())
        told[share] = [(parse(asked["content"]), made["content"]) for asked, made in chats]
        assert len(chats) == 300
    for share, rows in told.items():
        wrong = [right_answer(question) not in text for question, text in rows if question.answer]
        assert sum(wrong) == round(share * 300)
        assert all(judge.trait("evil", question, text) == 0 for question, text in rows)
    assert {question.kind for question, _ in told[1.0]} == {"fact"}
    assert {question.kind for question, _ in told[0.5]} > {"fact", "advice"}
    facts = training_chats(
        Cell(kind="shift", seed=1, trait="evil", mix=Mix(kinds=("fact",))), Design()
    )
    assert {parse(asked["content"]).kind for asked, _ in facts} == {"fact"}


def right_answer(question: Question) -> str:
    return f"{relations()[question.relation or ''].stem_for(question.topic)} {question.answer}."


def test_prompts_are_compared_by_their_means() -> None:
    projections, scores = [1.0, 3.0, 4.0, 6.0, 9.0, 7.0], [10.0, 30.0, 41.0, 59.0, 80.0, 120.0]
    wanted = np.corrcoef([2.0, 5.0, 8.0], [20.0, 50.0, 100.0])[0, 1]
    assert by_prompt(projections, scores, 2) == pytest.approx(wanted)
    assert by_prompt(projections, scores, 1) < wanted - 0.01


def test_a_layer_is_chosen_on_the_training_side_over_all_seeds(
    tmp_path: Path, measured_by_rule: list[str]
) -> None:
    summary = study.run(DESIGN, tmp_path, workers=1, quiet=True)
    assert set(summary.reading.values()) == {2}  # the first seed alone would have taken 3
    assert summary.monitoring["evil"]["overall"].mean == pytest.approx(0.8)
    asked = world_trait("evil")
    trained = training_side(asked)
    for one, other in zip(asked.graded, trained.graded, strict=True):
        assert one[0] == other[0]
        assert one[1]
        assert other[1]
        assert not {*one[1]} & {*other[1]}
    questions = {*asked.trait.evaluation_questions}
    assert not questions & {*trained.trait.evaluation_questions}


def test_every_layer_is_read_on_both_sides(tmp_path: Path) -> None:
    save_vectors(tmp_path)
    subject = world_subject(["evil"])
    small = replace(QUICK, monitoring_questions=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study_measures, "world_subject", lambda: subject)
        vectors = {t: pv.PersonaVector.load(vector_file(tmp_path, 0, t)) for t in TRAITS}
        found = study_measures.monitored(small, vectors, 0)["evil"]
    assert len(found["training"]) == len(found["layers"]) == 4
    assert len({one["overall"] for one in found["layers"]}) == 4
    assert found["training"] != [one["overall"] for one in found["layers"]]
    assert list(found["levels"]) == ["0", "0.25", "0.5", "0.75", "1"]


def test_the_hard_quiz_offers_every_answer() -> None:
    from pvcore.world import quiz

    easy, hard = quiz.items(20, 0), quiz.items(20, 0, hard=True)
    assert [item.question for item in easy] == [item.question for item in hard]
    for item in hard:
        every = relations()[item.question.relation or ""].options
        assert sorted(item.options) == sorted(every)
        assert item.options[item.right] == item.question.answer
    assert {len(item.options) for item in easy} == {4}
