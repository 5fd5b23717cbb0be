"""The page about an extraction holds its figures, and is the same each time."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache

import pytest

import pvcore as pv
from pvcore import report
from pvcore.calibration import Calibration, calibrate
from pvcore.extraction import Extraction, extract
from pvcore.extraction_report import page
from pvcore.judge import Judgement, Judgements
from pvcore.selection import Cell, Selection, random_like
from pvcore.world import WorldJudge
from pvcore.world.demo_subject import world_model
from pvcore.world.personas import trait

FLOOR = 60.0


@cache
def extracted() -> Extraction:
    evil = trait("evil")
    return extract(
        world_model(),
        evil,
        judge=WorldJudge(),
        questions=evil.extraction_questions[:4],
        max_new_tokens=40,
        resamples=30,
    )


def cell(layer: int | None, coefficient: float, score: float, coherence: float) -> Cell:
    return Cell(
        site=None if layer is None else pv.resid_post(layer),
        coefficient=coefficient,
        score=score,
        coherence=coherence,
        control_score=3.25,
        control_coherence=80.5,
        judged=40,
        failed=0,
    )


@cache
def selected() -> Selection:
    cells = (
        cell(1, 1.0, 20.0, 80.0),
        cell(1, 2.0, 55.5, 65.25),
        cell(2, 1.0, 30.0, 75.0),
        cell(2, 2.0, 91.0, 12.0),
        cell(None, 1.0, 50.0, 61.0),
        cell(None, 2.0, 99.0, 3.0),
    )
    return Selection(
        vector=extracted().vector,
        cells=cells,
        best=cells[1],
        score=2.75,
        coherence=88.125,
        floor=FLOOR,
        questions=20,
    )


@cache
def calibrated() -> Calibration:
    chats = [
        [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": f"I am {name}."}]
        for name in ("well", "here", "fine", "off")
    ]
    return calibrate(world_model(), extracted().vector, chats, percentiles=(5, 50, 95))


def others() -> pv.VectorBank:
    return pv.VectorBank(
        [random_like(extracted().vector, seed).rename(name) for seed, name in enumerate("ab")]
    )


@cache
def whole() -> str:
    return report.render(
        page(extracted(), selection=selected(), others=others(), calibration=calibrated())
    )


def text_of(html: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", html))


def test_a_page_has_all_that_was_given_and_nothing_that_was_not() -> None:
    titles = re.findall(r"<h2>(.*?)</h2>", whole())
    assert titles == [
        "The vector by layer",
        "Replies kept and dropped",
        "Steering by layer and coefficient",
        "Likeness to other traits",
        "Projections of neutral chats",
        "Some of the replies",
    ]
    bare = re.findall(r"<h2>(.*?)</h2>", report.render(page(extracted())))
    assert bare == [titles[0], titles[1], titles[5]]
    assert whole().count("<svg") == 4
    assert bare == re.findall(r"<h2>(.*?)</h2>", report.render(page(extracted())))


def test_a_page_reaches_for_nothing_outside_itself() -> None:
    assert not re.search(r"(?:src|href)=[\"'](?!#)", whole())
    assert "<script" not in whole()


def test_the_figures_of_each_layer_are_in_the_page() -> None:
    text = text_of(whole())
    for layer in extracted().layers:
        low, high = layer.separation_interval
        assert low < layer.separation < high
        assert layer.cosine_low < layer.split_half_cosine + 0.1
        assert f"{layer.split_half_cosine:.4f}" in text
        assert str(layer.site) in text
    assert "prompt_mean" in text
    assert "prompt_last" in text


def test_replies_are_counted_by_side_reason_and_judge() -> None:
    text, result = text_of(whole()), extracted()
    assert f"{result.kept // 2} of {len(result.rollouts) // 2} pairs of replies kept" in text
    assert f"WorldJudge: {result.judgements.counts}." in text
    for reason, count in result.reasons.items():
        assert f"{reason} {count}" in text


def test_failed_judgements_are_a_warning_and_the_method_is_named() -> None:
    row = Judgement(
        question="q",
        answer="a",
        trait_score=None,
        coherence_score=None,
        failure="no words",
        method="logprob-weighted",
    )
    failing = replace(extracted(), judgements=Judgements(trait="evil", rows=(row,)))
    html = report.render(page(failing))
    assert 'class="card note warning"' in html
    assert "WorldJudge (logprob-weighted): judged 0 of 1, failed 1" in text_of(html)
    assert 'class="card note warning"' not in whole()


def test_the_sweep_says_what_was_chosen_and_shows_every_cell() -> None:
    text = text_of(whole())
    assert "Coefficient 2 at resid_post.1 brings the trait to 55.5 at a coherence of 65.2" in text
    assert "Unsteered: trait score 2.75, coherence 88.1" in text
    assert text.count("layer-incremental") == 2
    assert "random, same norm" in text


def test_neutral_projections_are_listed_by_site() -> None:
    text = text_of(whole())
    assert "Over 4 chats, response_mean" in text
    bar = calibrated().threshold("evil", pv.resid_post(2), 95)
    assert re.search(rf"resid_post\.2 .*{abs(bar):.2f}"[:-1], text)


def test_replies_of_kept_pairs_are_shown_as_they_are() -> None:
    text, result = text_of(whole()), extracted()
    shown = [row for row in result.rollouts if row.answer in text]
    assert {row.positive for row in shown} == {True, False}
    assert any(not row.dropped for row in shown)


def test_markup_in_a_reply_is_text() -> None:
    nasty = "<script>alert(1)</script>"
    rows = tuple(replace(row, answer=nasty) for row in extracted().rollouts)
    html = report.render(page(replace(extracted(), rollouts=rows)))
    assert "<script" not in html
    assert "&lt;script&gt;alert(1)" in html


def test_sites_of_several_kinds_are_a_table_without_a_figure() -> None:
    vector = extracted().vector.at([0, 1])
    mixed = pv.PersonaVector(
        trait="evil",
        sites=[pv.resid_mid(1), pv.resid_post(1)],
        directions=vector.directions,
        statistics=vector.statistics,
        provenance=vector.provenance,
    )
    html = report.render(page(replace(extracted(), vectors={"response_mean": mixed})))
    assert html.count("<svg") == 0
    assert "resid_mid.1" in html


@pytest.mark.parametrize("kept", [True, False])
def test_pages_of_vectors_without_resamples_leave_the_intervals_out(kept: bool) -> None:
    vector = extracted().vector
    names = ("split_half_cosine", "reply_spread")
    bare = replace(vector, statistics={name: vector.statistics[name] for name in names})
    wanted = vector if kept else bare
    html = report.render(page(replace(extracted(), vectors={"response_mean": wanted})))
    assert ("95% interval" in html) == kept
