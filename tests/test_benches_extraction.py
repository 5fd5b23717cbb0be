"""The record of the extraction: measured as it says, rendered digit by digit."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from benches import extraction, report
from benches.extraction import QUICK
from benches.extraction_table import extraction_summary
from benches.record import RESULTS, RecordError


@cache
def measured() -> dict[str, Any]:
    return extraction.measure(QUICK, command="python -m benches.run extraction --quick")


def test_every_trait_has_its_curves_choice_and_claims() -> None:
    (evil,) = measured()["traits"]
    places = [f"resid_post.{layer}" for layer in range(4)] + ["layer-incremental"]
    assert [cell["place"] for cell in evil["curves"]] == places
    assert {cell["coefficient"] for cell in evil["curves"]} == {2.0}
    assert evil["chosen"] in evil["curves"]
    assert evil["validated"]["place"] == evil["chosen"]["place"]
    assert evil["validated"] != evil["chosen"]
    assert evil["identical"] is True
    assert evil["pairs"] == 20
    claims = measured()["claims"]
    assert len(claims) == 4
    for claim in claims:
        assert claim["passed"] == (claim["measured"] >= claim["bound"])


def test_a_run_that_does_not_repeat_itself_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    counter = iter(range(100))
    monkeypatch.setattr(extraction, "_bytes", lambda _: {"response_mean": bytes(next(counter))})
    made = extraction.measure(QUICK, command="x")
    assert made["traits"][0]["identical"] is False
    (claim,) = [one for one in made["claims"] if "byte" in one["claim"]]
    assert not claim["passed"]


def test_the_table_shows_the_record(tmp_path: Path) -> None:
    document = json.loads(json.dumps(measured()))
    cell = document["traits"][0]["validated"]
    cell |= {"score": 87.25, "coherence": 61.0, "control_score": 3.5, "coefficient": 2.0}
    text = extraction_summary(document)
    assert f"| evil | {document['traits'][0]['kept']} of 20 |" in text
    assert "| 2 | 87.2 | 61.0 | 3.5 |" in text
    held = sum(claim["passed"] for claim in document["claims"])
    assert f"Claims that hold: {held} of 4." in text
    extraction.write(document, tmp_path)
    page = "<!-- figures: extraction --><!-- end -->"
    assert text in report.rendered(page, tmp_path)
    assert json.loads((tmp_path / "extraction.json").read_text("utf-8")) == document


@pytest.mark.parametrize("missing", ["traits", "workload", "claims", "device"])
def test_a_record_without_a_figure_is_refused(missing: str) -> None:
    document = {name: value for name, value in measured().items() if name != missing}
    with pytest.raises(RecordError, match="without a figure the table needs"):
        extraction_summary(document)


def test_claims_of_the_published_record_hold() -> None:
    path = RESULTS / "extraction.json"
    document = json.loads(path.read_text("utf-8"))
    assert len(document["traits"]) == 7
    assert [claim for claim in document["claims"] if not claim["passed"]] == []
