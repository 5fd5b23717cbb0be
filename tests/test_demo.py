"""The demo: a small real run in the persona world, and the claims and the page of any record."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, replace
from math import nan
from pathlib import Path
from typing import Any

import pytest
import torch

import pvcore as pv
from pvcore import report, world
from pvcore.world.demo import run_demo
from pvcore.world.demo_chats import best_dose
from pvcore.world.demo_claims import all_enforced
from pvcore.world.demo_measures import random_like
from pvcore.world.demo_record import (
    DemoError,
    DemoRecord,
    DoseFigures,
    Workload,
    ZeroFigures,
    write_record,
)
from pvcore.world.demo_report import page
from pvcore.world.demo_subject import own_subject, world_subject
from pvcore.world.personas import trait
from tests import demo_sample
from tests.demo_sample import sample
from tests.families import build, tokenizer

ROOT = Path(__file__).resolve().parents[1]
TINY = Workload(
    extraction_questions=2,
    steering_questions=6,
    coefficients=(0.0, 2.5),
    layers=(2,),
    monitoring_questions=1,
    max_new_tokens=40,
    rounds=1,
    timed_tokens=2,
    finetuning_chats=48,
    finetuning_steps=8,
)
TWO = ("evil", "humor")
CLAIMS = {
    "lost_rows",
    "zero",
    "positive_prompts",
    "negative_prompts",
    "split_half_cosine",
    "steering_acts",
    "plain_coherence",
    "steering",
    "usable_dose",
    "capping",
    "capped_coherence",
    "monitoring",
}
FINETUNED = {"prevention", "prevented_coherence", "finetuning_shift"}
CLAIMS |= FINETUNED


@pytest.fixture(scope="module")
def record() -> DemoRecord:
    subject = world_subject(TWO)
    return run_demo(subject, TINY, command="pvcore demo", quiet=True)


def test_a_run_in_the_world_loses_no_row_and_changes_nothing_at_zero(record: DemoRecord) -> None:
    passed = {claim.name: claim.passed for claim in record.claims}
    assert passed.keys() == CLAIMS
    assert passed["lost_rows"]
    assert passed["zero"]
    assert passed["steering_acts"]
    counts = [
        part.sampled
        for part in (*record.doses, *record.caps, *record.monitoring, *record.finetunes)
    ]
    graded = [sum(len(prompts) for _, prompts in world.graded_prompts(t)) for t in TWO]
    assert counts == [24, 24, 12, 12, *graded, 6, 6, 6, 6]


def test_a_run_measures_what_it_says(record: DemoRecord) -> None:
    assert [one.trait for one in record.vectors] == ["evil", "humor"]
    assert [(one.trait, one.layer) for one in record.doses] == [("evil", 2), ("humor", 2)]
    for vector, dose, cap in zip(record.vectors, record.doses, record.caps, strict=True):
        assert vector.pairs == 10
        assert vector.positive_score - vector.negative_score >= 50
        # The same random numbers: without a dose, vector and control write the same replies.
        assert dose.scores[0] == dose.control_scores[0]
        assert dose.scores[1] - dose.control_scores[1] >= 30
        assert set(cap.max) == {"0", "1", "2", "3"}
        assert cap.score > cap.capped_score
    assert {one.trait: len(one.level_scores) for one in record.monitoring} == {
        "evil": 5,
        "humor": 5,
    }
    assert {one.batch for one in record.overhead} == {1, 16}
    assert record.cosines[0][0] == pytest.approx(1.0)
    assert record.cosines[0][1] == pytest.approx(record.cosines[1][0])


def test_a_mixed_data_set_is_flagged(record: DemoRecord) -> None:
    found = record.flags
    assert found is not None
    assert found.counts == {"neutral": 80, "evil": 20, "humor": 20}
    assert found.rejected == 0
    assert min(found.found.values()) >= 0.8  # by chance it would be a sixth
    for name in TWO:
        assert found.means[name][name] > found.means["neutral"][name]
    assert len(found.rows) == 4
    html = report.render(page(record))
    assert "Training data, flagged" in html
    assert found.rows[0].reply in html


def test_a_run_finetunes_towards_its_first_trait(record: DemoRecord) -> None:
    before, undefended, prevented, control = record.finetunes
    assert [one.way for one in record.finetunes] == [
        "before", "undefended", "prevented", "random vector"
    ]  # fmt: skip
    assert {one.trait for one in record.finetunes} == {"evil"}
    assert before.losses == ()
    assert before.shift == pytest.approx({"evil": 0.0, "humor": 0.0}, abs=1e-6)
    assert undefended.losses[0] > undefended.losses[1]
    assert undefended.losses[0] != prevented.losses[0] != control.losses[0]
    assert undefended.shift["evil"] > prevented.shift["evil"]
    assert undefended.shift["evil"] > 5


def test_replies_are_shown_token_by_token(record: DemoRecord) -> None:
    assert len(record.chats) == 3
    plain, steered = record.chats[0].replies
    assert "".join(plain.tokens) != "".join(steered.tokens)
    for reply in (plain, steered):
        assert reply.projections.keys() == {"evil", "humor"}
        assert {len(line) for line in reply.projections.values()} == {len(reply.tokens)}
        assert "<|im_end|>" not in "".join(reply.tokens)
    means = [sum(r.projections["evil"]) / len(r.tokens) for r in (plain, steered)]
    assert means[1] > means[0]


def test_a_run_on_another_model_enforces_the_machinery_only(tmp_path: Path) -> None:
    subject = own_subject(
        pv.HookedModel(build("qwen2"), tokenizer(), model_id="tiny/qwen2"),
        Halves(),
        [short_trait()],
    )
    assert subject.workload.layer == 2
    sizes = {"max_new_tokens": 6, "batch_size": 25, "rollouts": 4}
    work = replace(TINY, layers=(1,), monitoring_layer=1, **sizes)
    record = run_demo(subject, work, command="pvcore demo --model tiny", quiet=True)
    assert {claim.name for claim in record.claims if claim.enforced} == {"lost_rows", "zero"}
    assert not all(claim.passed for claim in record.claims)
    assert record.failed == ()
    assert record.flags is None
    assert {claim.name for claim in all_enforced(record).failed} >= {"positive_prompts"}
    assert record.finetunes == ()
    assert FINETUNED.isdisjoint(claim.name for claim in record.claims)
    assert "tiny/qwen2" in report.render(page(record))


class Halves:
    """A judge of anything: about half of all answers show the trait."""

    def trait(self, trait: str, question: str, answer: str) -> float:
        return 100.0 * (sum(map(ord, answer)) % 2)

    def coherence(self, question: str, answer: str) -> float:
        return 100.0


def short_trait() -> pv.Trait:
    return replace(
        pv.Trait.load("evil"),
        instructions=tuple(
            replace(pair, positive=f"Be {word}.", negative=f"Be no {word}.")
            for pair, word in zip(pv.Trait.load("evil").instructions, "abcde", strict=True)
        ),
        extraction_questions=("Why?", "How?", "Who?"),
        evaluation_questions=("When?", "Where?", "What?"),
    )


def test_every_claim_holds_in_a_sound_record() -> None:
    assert {claim.name for claim in sample().claims if claim.passed} == CLAIMS
    assert sample().failed == ()


def worse(part: str, **changes: Any) -> dict[str, Any]:
    """The sample with the second figure of one part changed."""
    first, second, *others = getattr(sample(), part)
    return {part: (first, replace(second, **changes), *others)}


def trained(**changes: Any) -> dict[str, Any]:
    """The sample with the prevented finetune changed."""
    before, undefended, prevented, control = sample().finetunes
    return {"finetunes": (before, undefended, replace(prevented, **changes), control)}


BROKEN = {
    "lost_rows": worse("doses", judged=179),
    "zero": {"zero": ZeroFigures(rows=30, equal_at_zero=29, equal_at_strongest=0)},
    "positive_prompts": worse("vectors", positive_score=84.0),
    "negative_prompts": worse("vectors", negative_score=16.0),
    "split_half_cosine": worse("vectors", split_half_cosine=(0.97, 0.89)),
    "steering_acts": {"zero": ZeroFigures(rows=30, equal_at_zero=30, equal_at_strongest=4)},
    "plain_coherence": worse("doses", coherence=(69.0, 80.0, 40.0)),
    "steering": worse("doses", control_scores=(2.0, 1.0, 51.0)),
    "usable_dose": worse("doses", coherence=(93.0, 49.0, 40.0)),
    "capping": worse("caps", capped_score=66.0),
    "capped_coherence": worse("caps", capped_coherence=59.0),
    "monitoring": worse("monitoring", overall=0.59),
    "prevention": trained(score=56.0),
    "prevented_coherence": trained(coherence=59.0),
    "finetuning_shift": trained(shift={"evil": 66.0, "humor": 0.0}),
}


@pytest.mark.parametrize("name", sorted(CLAIMS))
def test_every_claim_can_fail(name: str) -> None:
    assert {claim.name for claim in sample(**BROKEN[name]).failed} == {name}


@pytest.mark.parametrize(("plain", "prevented"), [(0.0, 0.0), (9.0, 9.0), (-2.0, -9.0)])
def test_a_shift_that_prevention_leaves_or_that_is_none_is_no_evidence(
    plain: float, prevented: float
) -> None:
    before, first, second, control = sample().finetunes
    ways = [
        replace(one, shift={"evil": shift}) for one, shift in ((first, plain), (second, prevented))
    ]
    failed = sample(finetunes=(before, *ways, control)).failed
    assert {claim.name for claim in failed} == {"finetuning_shift"}


def test_the_recorded_finetunes_shift_by_more_than_the_claim_asks() -> None:
    record = json.loads((ROOT / "benches" / "results" / "demo.json").read_text())
    shifts = {one["way"]: one["shift"]["evil"] for one in record["finetunes"]}
    finetunes = tuple(replace(one, shift={"evil": shifts[one.way]}) for one in sample().finetunes)
    (claim,) = (one for one in sample(finetunes=finetunes).claims if one.name == "finetuning_shift")
    taken = 1.0 - shifts["prevented"] / shifts["undefended"]
    assert claim.passed
    assert claim.measured == pytest.approx(taken)
    assert taken > 0.75


def test_what_was_not_measured_is_not_claimed() -> None:
    assert {claim.name for claim in sample(**worse("monitoring", overall=nan)).failed} == {
        "monitoring"
    }


def test_claims_about_traits_bind_in_the_world_only() -> None:
    broken = sample(**BROKEN["steering"], in_world=False)
    assert broken.failed == ()
    assert [claim.name for claim in all_enforced(broken).failed] == ["steering"]
    assert sample(**BROKEN["zero"], in_world=False).failed != ()


def test_the_page_shows_every_figure_and_escapes_what_was_written() -> None:
    html = report.render(page(sample()))
    for text in (
        "Trick &lt;i&gt;them",
        "95%",
        "15 of 15 claims hold",
        "0123456789ab",
        "WorldJudge",
        "torch 2.13.0",
        "humor",
    ):
        assert text in html
    assert " &lt;b&gt;" in html
    assert "<script" not in html
    assert "14 of 15 claims hold" in report.render(page(sample(**BROKEN["zero"])))


def test_a_page_is_drawn_where_scores_are_missing() -> None:
    missing = (nan, nan, nan)
    unknown = worse("caps", capped_score=nan) | worse("doses", scores=missing, coherence=missing)
    assert "11 of 15 claims hold" in report.render(page(sample(**unknown)))


def test_a_record_is_json_without_loss(tmp_path: Path) -> None:
    record = sample(**worse("monitoring", within=nan))
    write_record(record, tmp_path / "new" / "demo.json")
    document = json.loads((tmp_path / "new" / "demo.json").read_text())
    assert (document["name"], document["status"]) == ("demo", "measured")
    assert document["workload"]["layers"] == [0, 1]
    assert document["monitoring"][1]["within"] is None
    assert document["monitoring"][0]["replies"][0] == [0.0, -3.0, 0.0]
    assert document == record.as_json()
    with pytest.raises(DemoError, match="cannot be written"):
        write_record(record, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"coefficients": (1.0, 2.0)}, "got coefficients 1, 2; wanted 0 and then"),
        ({"coefficients": (0.0,)}, "got coefficients 0; wanted"),
        ({"coefficients": (0.0, 2.0, 1.0)}, "rising"),
        ({"rounds": 0}, "got rounds=0; wanted at least 1"),
        ({"layers": ()}, "got no layers"),
    ],
)
def test_a_workload_that_measures_nothing_is_refused(
    change: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(DemoError, match=complaint):
        replace(TINY, **change)


def test_layers_the_model_lacks_are_refused_before_anything_runs() -> None:
    subject = world_subject(("evil",))
    for change in ({"layers": (1, 4)}, {"monitoring_layer": 4}):
        with pytest.raises(DemoError, match="got layer 4; this model has layers 0 to 3"):
            run_demo(subject, replace(TINY, **change), command="", quiet=True)


def test_the_control_is_as_long_as_the_vector_and_points_elsewhere() -> None:
    directions = torch.randn(3, 128) * torch.tensor([[1.0], [2.0], [5.0]])
    sites = tuple(map(pv.resid_post, range(3)))
    evil = pv.PersonaVector(trait="evil", sites=sites, directions=directions)
    control = random_like(evil, seed=0)
    assert control.norms.tolist() == pytest.approx(evil.norms.tolist())
    assert float(control.cosine(evil).abs().max()) < 0.4
    assert control != random_like(evil, seed=1)
    assert control != random_like(evil.rename("humor"), seed=0)


def test_the_dose_shown_has_both_trait_and_coherence() -> None:
    dose: DoseFigures = demo_sample.dose("evil", 1)
    assert best_dose(dose) == 1.0
    assert best_dose(replace(dose, coherence=(93.0, 40.0, 60.0))) == 2.0


def test_traits_of_the_world_are_sent_as_they_are_and_asked_about_apart() -> None:
    for name in world.TRAITS:
        evil = trait(name)
        assert [(p.positive, p.negative) for p in evil.system_prompts] == world.extraction_prompts(
            name
        )
        assert set(evil.extraction_questions).isdisjoint(evil.evaluation_questions)


def test_the_shipped_record_is_of_a_full_run_whose_claims_hold() -> None:
    document = json.loads((ROOT / "benches/results/demo.json").read_text())
    assert document["command"] == "pvcore demo --record benches/results/demo.json"
    assert document["workload"] == json.loads(json.dumps(asdict(Workload())))
    assert [vector["trait"] for vector in document["vectors"]] == list(world.TRAITS)
    assert {claim["name"]: claim["passed"] for claim in document["claims"]} == dict.fromkeys(
        CLAIMS, True
    )
    assert re.fullmatch("[0-9a-f]{40}", document["commit"])
    assert document["device"] == "cpu"
