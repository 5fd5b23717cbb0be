"""A scan under an armed plan is another scan, whatever the plan does to a probe."""

from __future__ import annotations

import re
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pvcore as pv
from pvcore.errors import FlagError
from pvcore.flag_plans import armed_on
from pvcore.numerals import number
from tests.flag_data import bank, chats, furthest, model, scores, table


def chats_of(count: int) -> list[dict[str, Any]]:
    return [{"messages": chat} for chat in chats(count)]


ROWS = chats_of(24)
EVIL = bank()["evil"]
LOW = bank(sites=[pv.resid_post(0)])


@pytest.fixture(scope="module")
def hooked() -> pv.HookedModel:
    return model()


def unseen_by_the_probe(hooked: pv.HookedModel, folder: Path) -> pv.Cap:
    """A cap between what the probe's tokens reach and what the data reaches."""
    flags = pv.flag(hooked, ROWS, bank(), out=folder)
    held = flags.manifest["asked"]["model"]["probe"]
    at_last_site = held[str(pv.resid_post(2))]["evil"]  # reply mean, last prompt token
    highest = flags.top("evil", 1, score="last_prompt_token")[0].score
    assert max(at_last_site) < highest
    return pv.Cap(EVIL, max=highest - 1e-3, layers=[2], span="last_prompt_token")


@pytest.mark.parametrize("stopped", [False, True], ids=["finished", "half done"])
@pytest.mark.parametrize("kind", ["cap", "condition", "deeper"])
def test_a_plan_that_no_probe_sees_is_noticed(
    hooked: pv.HookedModel, tmp_path: Path, kind: str, stopped: bool
) -> None:
    step: Any = unseen_by_the_probe(hooked, tmp_path / "first")
    if kind == "condition":
        step = pv.Add(EVIL, coeff=1.0, layers=[2], span="all", when=pv.Above(EVIL, 1e4))
    elif kind == "deeper":
        step = pv.Add(EVIL, coeff=5.0, layers=[2])
    found = LOW if kind == "deeper" else bank()
    settings: dict[str, Any] = {"out": tmp_path / "out", "shard_rows": 8}
    if kind == "deeper":
        settings |= {"difference": "exact", "max_new_tokens": 3}
    wanted = scores(pv.flag(hooked, ROWS, found, **settings))
    if stopped:
        (tmp_path / "out/scores/part-000002.parquet").unlink()
    with hooked.steer(step), pytest.raises(FlagError, match=r"plan was absent and is .*armed"):
        pv.flag(hooked, ROWS, found, **settings)
    assert scores(pv.flag(hooked, ROWS, found, **settings)) == wanted


def test_a_scan_under_a_plan_goes_on_under_that_plan_alone(
    hooked: pv.HookedModel, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"difference": "exact", "max_new_tokens": 4, "shard_rows": 8}
    plain = pv.flag(hooked, ROWS, LOW, out=tmp_path / "plain", **settings)
    out = tmp_path / "out"
    with hooked.steer(pv.Add(EVIL, coeff=9.0, layers=[2])):
        wanted = scores(pv.flag(hooked, ROWS, LOW, out=out, **settings))
    (out / "scores/part-000001.parquet").unlink()
    for coeffs in ([9.5], []):
        with ExitStack() as stack:
            for coeff in coeffs:
                stack.enter_context(hooked.steer(pv.Add(EVIL, coeff=coeff, layers=[2])))
            with pytest.raises(FlagError, match=r"plan was .* and is "):
                pv.flag(hooked, ROWS, LOW, out=out, **settings)
    with hooked.steer(pv.Add(EVIL, coeff=9.0, layers=[2])):
        assert scores(pv.flag(hooked, ROWS, LOW, out=out, **settings)) == wanted
    # The bank's site lies before the plan's: only the own replies can differ, and do.
    gaps = [
        abs(wanted[key][2] - row[2]) for key, row in scores(plain).items()
    ]  # the difference of the first vector
    assert max(gaps) > 1e-2
    assert (
        furthest(
            {key: row[:2] for key, row in wanted.items()},
            {key: row[:2] for key, row in scores(plain).items()},
        )
        <= 1e-6
    )


def test_own_replies_under_a_plan_are_the_steered_models(
    hooked: pv.HookedModel, tmp_path: Path
) -> None:
    step = pv.Add(EVIL, coeff=9.0, layers=[2])
    settings: dict[str, Any] = {"difference": "exact", "max_new_tokens": 4}
    with hooked.steer(step):
        flags = pv.flag(hooked, ROWS[:6], LOW, out=tmp_path / "out", **settings)
        prompts = [row["messages"][:-1] for row in ROWS[:6]]
        own = hooked.generate(prompts, do_sample=False, max_new_tokens=4)
    unit = EVIL.unit().direction(pv.resid_post(0)).double()
    means = []
    for texts in (own, [row["messages"][-1]["content"] for row in ROWS[:6]]):
        pairs = [
            [*prompt, {"role": "assistant", "content": text}]
            for prompt, text in zip(prompts, texts, strict=True)
        ]
        read = hooked.read(pairs, sites=[pv.resid_post(0)])[pv.resid_post(0)]
        means.append((read.double() @ unit).numpy())
    got = [row[2] for row in scores(flags).values()]
    np.testing.assert_allclose(got, means[1] - means[0], atol=2e-5)


def test_a_clean_scan_of_another_plan_sets_no_threshold(
    hooked: pv.HookedModel, tmp_path: Path
) -> None:
    flags = pv.flag(hooked, ROWS, bank(), out=tmp_path / "plain")
    with hooked.steer(pv.Add(EVIL, coeff=1.0, layers=[1], span="all")):
        clean = pv.flag(hooked, ROWS, bank(), out=tmp_path / "clean")
    with pytest.raises(FlagError, match="got a clean scan scored otherwise: its plan is"):
        flags.filter("evil", clean=clean)
    assert clean.filter("evil", clean=clean).n_flagged == 2


def test_a_calibration_sets_no_threshold_for_a_scan_under_a_plan(
    hooked: pv.HookedModel, tmp_path: Path
) -> None:
    calibrated = pv.calibrate(hooked, bank(), chats(30)).vectors()
    plain = pv.flag(hooked, ROWS, calibrated, out=tmp_path / "plain")
    with hooked.steer(pv.Add(EVIL, coeff=30.0, layers=[2])):
        steered = pv.flag(hooked, ROWS, calibrated, out=tmp_path / "steered")
        under = pv.flag(hooked, chats_of(30), calibrated, out=tmp_path / "clean")
    (rule,) = plain.filter("evil").rules
    values = [row["evil/resid_post.2/response_mean"] for row in table(steered).values()]
    assert min(values) > rule.threshold  # every row would be flagged
    assert plain.filter("evil").n_flagged < 24
    for asked in ({}, {"percentile": 75}, {"score": "response_mean"}):
        with pytest.raises(FlagError, match=r"under an armed plan, and no threshold.*Give clean="):
            steered.filter("evil", **asked)
    assert steered.filter("evil", threshold=rule.threshold, score="response_mean").n_flagged == 24
    assert steered.filter("evil", clean=under, score="response_mean").n_flagged < 24


def test_a_report_made_without_the_plan_colours_no_token(
    hooked: pv.HookedModel, tmp_path: Path
) -> None:
    step = pv.Add(EVIL, coeff=30.0, layers=[1])
    with hooked.steer(step):
        steered = pv.flag(hooked, ROWS, bank(), out=tmp_path / "steered")
        steered.report(tmp_path / "inside.html")
    plain = pv.flag(hooked, ROWS, bank(), out=tmp_path / "plain")
    steered.report(tmp_path / "outside.html")
    plain.report(tmp_path / "plain.html")
    with hooked.steer(step):
        hooked.read([ROWS[0]["messages"]], sites=[2])  # a plan wants a forward
        plain.report(tmp_path / "armed.html")
    with hooked.monitor(bank(), alarms={"evil": 0.0}, on_alarm=pv.Ablate(EVIL)):
        hooked.read([ROWS[0]["messages"]], sites=[2])
        plain.report(tmp_path / "acting.html")
    pages = {path.stem: path.read_text() for path in tmp_path.glob("*.html")}
    for name, coloured in (("inside", True), ("plain", True), ("outside", False), ("armed", False)):
        assert ('type="radio"' in pages[name]) == coloured, name
        assert ("Tokens are not coloured" in pages[name]) != coloured, name
        assert ("Tokens are coloured" in pages[name]) == coloured, name
    assert 'type="radio"' not in pages["acting"]
    assert "acts on alarms" in pages["acting"]
    assert "Say " in pages["outside"]  # the text is that of the rows all the same
    named = f"armed plan {steered.manifest['asked']['plan']}"
    assert named in pages["inside"]
    assert named in pages["outside"]
    assert "armed plan" not in pages["plain"]
    # What the page shows inside the plan is what was scored.
    shown = re.findall(r"over the reply\">evil<b>(\S+)</b>", pages["inside"])
    best = steered.top("evil", 1)[0].scores["evil/resid_post.2/response_mean"]
    assert number(best, signed=True) in shown


def test_watching_is_no_plan_and_what_acts_on_alarms_is_refused(
    hooked: pv.HookedModel, tmp_path: Path
) -> None:
    wanted = scores(pv.flag(hooked, ROWS[:8], LOW, out=tmp_path / "out"))
    with hooked.monitor(bank()):
        assert armed_on(hooked) is None
        assert scores(pv.flag(hooked, ROWS[:8], LOW, out=tmp_path / "out")) == wanted
    for react in ("stop", pv.Ablate(EVIL)):
        with (
            pytest.raises(FlagError, match="acts on alarms"),
            hooked.monitor(bank(), alarms={"evil": 0.0}, on_alarm=react),
        ):
            pv.flag(hooked, ROWS[:8], LOW, out=tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_plan_is_named_by_what_it_does_and_where_it_stands(hooked: pv.HookedModel) -> None:
    add, cap = pv.Add(EVIL, coeff=1.0, layers=[1]), pv.Cap(EVIL, max=1.0, layers=[1])
    elsewhere = pv.Ablate(EVIL, layers=[0])

    def named(*plans: Any) -> str | None:
        if not plans:
            hooked.read([ROWS[0]["messages"]], sites=[2])  # a plan wants a forward
            return armed_on(hooked)
        with hooked.steer(plans[0]):
            return named(*plans[1:])

    assert named() is None
    assert named(add) == named(pv.Add(EVIL, coeff=1.0, layers=[1]))
    assert len({named(add), named(cap), named(add, cap), named(cap, add), named(add, add)}) == 5
    assert named(add, elsewhere) == named(elsewhere, add) != named(add)
    other = model(seed=1)
    with hooked.steer(add):
        assert armed_on(other) is None
        hooked.read([ROWS[0]["messages"]], sites=[2])
