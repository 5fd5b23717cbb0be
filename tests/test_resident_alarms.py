"""Alarms judged in the compiled decode step: the verdicts of the host, and only flags in its loop.

Oracle: raw hooks and float64 projections of a twin, and a loop over values for the hysteresis.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import pvcore as pv
from pvcore import resident
from pvcore.alarms import AlarmBell
from pvcore.guards import Guard
from pvcore.monitor import Seen
from pvcore.resident import Met, Watch
from pvcore.resident_alarms import Bells, Rung
from pvcore.transport import _Copied, _Lane
from tests.families import PAD
from tests.oracle import Edit, Generated, padded
from tests.subjects import Subject, fresh, point, prompts, raw, subject, trio, worst
from tests.test_alarms import crossings
from tests.test_graph import GRAPH, Counting
from tests.test_steering_matrix import scores_of

FAMILIES = ("qwen2", "gemma2", "gpt2")
LENGTHS, WIDTH, NEW = (13, 9, 11), 13, 12
ROWS = prompts(LENGTHS)
GREEDY: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False}
BANK = pv.VectorBank(trio(*(pv.resid_post(layer) for layer in range(3))))
SITE = pv.resid_pre(1)
EVIL = trio(SITE)[0]
BOUND = 1e-4
Place = tuple[str, pv.Site, int, int]
Levels = dict[str, Any]


# --- the verdict ----------------------------------------------------------------------------------


def near(level: float, dtype: torch.dtype) -> list[float]:
    """Scores of a dtype around a level: its neighbours on both sides, and what is far off."""
    middle = torch.tensor(level, dtype=torch.float64).to(dtype)
    ends = [torch.full_like(middle, sign * math.inf) for sign in (-1, 1)]
    beside = [torch.nextafter(middle, end) for end in ends]
    further = [torch.nextafter(one, end) for one, end in zip(beside, ends, strict=True)]
    return [float(x) for x in (middle, *beside, *further, *ends)] + [0.0, -0.0, math.nan]


LEVELS = st.one_of(
    st.floats(-8, 8),
    st.sampled_from([0.0, 0.1, 1 / 3, 1e-50, -1e-50, 1e39, -1e39, 3.4028235e38, 1.5]),
    # Half-way between two neighbours of float32, and just beside the middle.
    st.sampled_from([1 + 2.0**-24, 1 + 2.0**-24 + 2.0**-52, 1 + 2.0**-24 - 2.0**-52]),
)


@given(
    bounds=st.tuples(LEVELS, LEVELS),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    picks=st.lists(st.tuples(*[st.integers(0, 19)] * 4), min_size=1, max_size=9),
)
def test_a_decode_step_judges_as_the_host_does_also_at_its_thresholds(
    bounds: tuple[float, float], dtype: torch.dtype, picks: list[tuple[int, ...]]
) -> None:
    low, high = sorted(bounds)
    values = near(high, dtype) + near(low, dtype)
    course = torch.tensor([[values[k] for k in row] for row in picks], dtype=dtype)
    course = course.view(len(picks), 1, 2, 2)  # one site, two rows, two vectors
    levels: Levels = {"b": pv.Threshold(high, low), "a": high}
    sites = [pv.resid_post(0)]
    bells, bell = Bells(torch.zeros(4, 1, 2, 2, dtype=dtype)), AlarmBell(levels, "ab", sites)
    bells.write(bell.bounds())
    bells.begin(bell.rung(2))
    told: dict[tuple[int, str], list[int]] = {}
    for step, scores in enumerate(course):
        slot = torch.tensor([step % 4])
        bells.scores.index_copy_(0, slot, scores[None])
        bells.judge(scores, slot)
        rung, (ringing, found) = bells.rows_rung(), bells.fetch(step, torch.arange(2))
        assert rung.tolist() == ringing.any(-1).any(0).tolist()
        assert torch.equal(found.nan_to_num(), scores.nan_to_num())
        ours = bell.told(step, ringing, found)
        host = bell.ring(step, {"a": scores[..., 0], "b": scores[..., 1]})
        assert ours == host
        for alarm in ours:
            told.setdefault((alarm.chat, alarm.trait), []).append(step)
    for k, trait in enumerate("ab"):
        for chat in range(2):
            steps = crossings(course[:, 0, chat, k].tolist(), high, low if trait == "b" else high)
            assert told.get((chat, trait), []) == steps


def test_a_decode_step_goes_on_from_what_rang_in_the_prompt() -> None:
    bell = AlarmBell({"a": 1.0}, ["a"], [pv.resid_post(0)])
    bell.ring(0, {"a": torch.tensor([[2.0, 0.0]])})
    bells = Bells(torch.zeros(2, 1, 2, 1))
    bells.write(bell.bounds())
    bells.begin(bell.rung(2))
    bells.judge(torch.tensor([[[3.0], [3.0]]]), torch.tensor([0]))
    assert bells.rows_rung().tolist() == [False, True]


def test_alarms_on_128_vectors_at_all_layers_of_a_7b_stay_below_64_mib() -> None:
    """Beside the bank, of 32 rows of Qwen2.5-7B in bfloat16."""
    monitor = Shape(tuple(pv.resid_post(layer) for layer in range(28)), 128)
    met = Met(device=torch.device("meta"), dtype=torch.bfloat16)
    plain, armed = (
        Watch(Shape(monitor.sites, 128, False), met, 32, 3584),
        Watch(monitor, met, 32, 3584),
    )
    assert plain.bells is None
    assert armed.bells is not None
    entries = 28 * 32 * 128
    assert armed.ring.shape == plain.ring.shape
    wanted = entries * (len(armed.ring) + 1) + 32 + 2 * 28 * 128 * 4
    assert armed.beside_bank - plain.beside_bank == armed.bells.nbytes == wanted
    assert armed.beside_bank < 64 << 20


@dataclass
class Shape:
    """A monitor's outline."""

    sites: tuple[pv.Site, ...]
    n_vec: int
    sounds: bool = True
    before: bool = False

    def _never(self, *_: object) -> Any:
        raise AssertionError

    begin = end = close = units = settle = receive = bounds = hand_over = receive_rung = _never


# --- against the oracle ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A family with the end token and the levels that make its rows ring and end on the way."""

    found: Subject
    end: int
    levels: Levels

    @property
    def settings(self) -> dict[str, Any]:
        return {**GREEDY, "eos_token_id": self.end, "pad_token_id": PAD}

    def run(self, edits: Sequence[Edit] = ()) -> Generated:
        ids, mask = padded(ROWS, side="left")
        return self.found.oracle.generate(ids, mask, edits, **self.settings)

    def lengths(self, out: Generated) -> list[int]:
        return [
            row.index(self.end) + 1 if self.end in row else len(row) for row in out.tokens.tolist()
        ]

    def rung(self, out: Generated) -> list[Place]:
        """Every alarm of the oracle's run, step by step in the order of alarms, layers, chats."""
        lengths, found = self.lengths(out), []
        for order, (trait, by_site) in enumerate(self.levels.items()):
            scores = scores_of(out, BANK, trait)
            for layer, site in enumerate(BANK.sites):
                level = by_site.get(site.layer) if isinstance(by_site, dict) else by_site
                if level is None:
                    continue
                level = level if isinstance(level, pv.Threshold) else pv.Threshold(level)
                for chat, length in enumerate(lengths):
                    values = scores[:length, layer, chat]
                    for bound in (level.high, level.floor):
                        assert float((values - bound).abs().min()) > BOUND
                    for step in crossings(values.tolist(), level.high, level.floor):
                        found.append((step, order, layer, chat, (trait, site, chat, step)))
        return [one[-1] for one in sorted(found)]


def between(values: Tensor, share: float) -> float:
    """A level near a share of the values, in the widest gap there."""
    ordered = values.flatten().sort().values
    first = int(share * len(ordered))
    gaps = (ordered[1:] - ordered[:-1])[first : first + 6]
    return float(ordered[first + int(gaps.argmax())] + gaps.max() / 2)


def case(name: str) -> Case:
    found = subject(name)
    free = Case(found, -1, {}).run()
    # A token that one row makes early and not all rows make.
    ends = [
        end
        for end in free.tokens[0, 3:8].tolist()
        if not all(end in row for row in free.tokens.tolist())
    ]
    out = Case(found, ends[0], {}).run()
    evil, other = (scores_of(out, BANK, trait) for trait in ("evil", "sycophancy"))
    high = between(other[:, 2], 0.6)
    levels: Levels = {
        "sycophancy": {
            2: pv.Threshold(high, between(other[:, 2], 0.2)),
            0: between(other[:, 0], 0.5),
        },
        "evil": between(evil, 0.5),
    }
    return Case(found, ends[0], levels)


def places(alarms: Sequence[pv.Alarm]) -> list[Place]:
    return [(one.trait, one.site, one.chat, one.step) for one in alarms]


def answered(case: Case, engine: Any, **rules: Any) -> tuple[list[list[int]], Guard]:
    guarded = case.found.model.monitor(BANK, alarms=case.levels, **rules)
    with guarded as seen:
        ids = case.found.model.generate_ids(ROWS, engine=engine, **case.settings)
    return [row.tolist() for row in ids], seen


def noted(alarm: pv.Alarm, controls: pv.Controls) -> None:
    """A reaction that changes nothing."""


@pytest.mark.parametrize("rules", [{}, {"on_alarm": noted}], ids=["looking-back", "acting"])
@pytest.mark.parametrize("name", FAMILIES)
def test_alarms_are_the_oracles_where_rows_end_early(
    name: str, rules: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resident, "RING_STEPS", 4)  # so that it wraps
    one = case(name)
    out = one.run()
    wanted, lengths = one.rung(out), one.lengths(out)
    assert len(set(lengths)) > 1
    for engine in ("eager", GRAPH):
        ids, seen = answered(one, engine, **rules)
        assert ids == [row[:n] for row, n in zip(out.tokens.tolist(), lengths, strict=True)]
        assert places(seen.alarms) == wanted
        for alarm in seen.alarms:
            at = BANK.sites.index(alarm.site)
            score = scores_of(out, BANK, alarm.trait)[alarm.step, at, alarm.chat]
            assert alarm.value == pytest.approx(float(score), abs=1e-5)
            assert alarm.value > alarm.threshold
    # Prompts and decode steps ring, again after falling, and so would rows that have ended.
    assert min(step for *_, step in wanted) == 0 < max(step for *_, step in wanted)
    series = [place[:3] for place in wanted]
    assert len(set(series)) < len(series)
    deaf = Case(one.found, -1, one.levels)
    longer = {(chat, step) for *_, chat, step in deaf.rung(deaf.run())}
    assert any(step >= lengths[chat] for chat, step in longer)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_reaction_acts_from_the_next_token_on_and_never_on_rows_that_ended(name: str) -> None:
    one, add = case(name), pv.Add(EVIL, coeff=[1.5, -2.0, 2.5])
    known: list[Place] = []
    # A reaction changes nothing before its alarm, so repeating the run settles it step by step.
    for _ in range(3 * NEW):
        edits = []
        for chat in {place[2] for place in known}:
            step = min(place[3] for place in known if place[2] == chat)
            where = torch.zeros(3, WIDTH + NEW, dtype=torch.bool)
            where[chat, WIDTH + step :] = True
            coeff = torch.full((3,), [1.5, -2.0, 2.5][chat])
            vectors = raw([EVIL], SITE)
            edits.append(
                Edit(kind="add", point=point(SITE), vectors=vectors, where=where, coeff=coeff)
            )
        out = one.run(edits)
        if one.rung(out) == known:
            break
        known = one.rung(out)
    lengths = one.lengths(out)
    for engine in ("eager", GRAPH):
        ids, seen = answered(one, engine, on_alarm=add)
        assert ids == [row[:n] for row, n in zip(out.tokens.tolist(), lengths, strict=True)]
        assert places(seen.alarms) == known
        for k, trait in enumerate(BANK.traits):
            wanted = scores_of(out, BANK, trait)
            for chat, length in enumerate(lengths):
                got = seen[trait].steps[:length, :, chat]
                assert worst(got, wanted[:length, :, chat].to(got.dtype)) < 1e-4, k
    assert places(seen.alarms) != one.rung(one.run())


# --- what the loop hands over ---------------------------------------------------------------------


class Ledger:
    """Counts what comes from a decode step to the host."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.copied: list[tuple[int, int]] = []
        self.received: list[int] = []
        self.asked = 0
        self.fetched: list[tuple[int, list[int]]] = []
        copy, receive, rows, fetch = _Lane.copy, Seen.receive, Bells.rows_rung, Bells.fetch

        def copying(lane: _Lane, first: int, end: int) -> _Copied:
            self.copied.append((first, end))
            return copy(lane, first, end)

        def receiving(seen: Seen, call: Any, steps: Tensor) -> None:
            self.received.append(len(steps))
            receive(seen, call, steps)

        def asking(bells: Bells) -> Tensor:
            self.asked += 1
            told = rows(bells)
            assert told.nbytes == len(told) == len(ROWS)
            return told

        def fetching(bells: Bells, step: int, chosen: Tensor) -> Rung:
            self.fetched.append((step, chosen.tolist()))
            rung = fetch(bells, step, chosen)
            assert rung.scores.shape == (3, len(chosen), 3)
            return rung

        monkeypatch.setattr(_Lane, "copy", copying)
        monkeypatch.setattr(Seen, "receive", receiving)
        monkeypatch.setattr(Bells, "rows_rung", asking)
        monkeypatch.setattr(Bells, "fetch", fetching)


@pytest.fixture
def ledger(monkeypatch: pytest.MonkeyPatch) -> Ledger:
    monkeypatch.setattr(resident, "RING_STEPS", 8)
    # A subject that others used has rings of another length.
    monkeypatch.setitem(globals(), "subject", fresh)
    return Ledger(monkeypatch)


PACE = [(0, 4), (4, 8), (8, 11)]


def test_who_acts_on_alarms_waits_for_one_flag_a_row_and_scores_keep_their_pace(
    ledger: Ledger,
) -> None:
    model = subject("qwen2").model
    with model.monitor(BANK, alarms={"evil": 1e6, "apathy": 1e6}, on_alarm="stop") as seen:
        model.generate_ids(ROWS, engine=GRAPH, **GREEDY)
    assert ledger.copied == PACE
    assert ledger.received == [4, 4, 3]
    assert ledger.asked == NEW - 1
    assert ledger.fetched == []
    assert seen.alarms == ()
    assert seen["evil"].steps.shape[0] == NEW


def test_only_rows_that_rang_and_have_not_ended_are_fetched(ledger: Ledger) -> None:
    one = case("qwen2")
    _, seen = answered(one, GRAPH, on_alarm=noted)
    wanted = {
        step: sorted({alarm.chat for alarm in seen.alarms if alarm.step == step})
        for step in {alarm.step for alarm in seen.alarms} - {0}
    }
    assert {step + 1: rows for step, rows in ledger.fetched} == wanted
    assert len(ledger.fetched) == len(wanted) > 0
    assert any(len(rows) < len(ROWS) for rows in wanted.values())
    assert ledger.asked > len(ledger.fetched)
    assert [first for first, _ in ledger.copied] == list(range(0, ledger.asked, 4))


def test_where_nobody_acts_the_loop_asks_nothing(ledger: Ledger) -> None:
    _, seen = answered(case("qwen2"), GRAPH)
    assert len(seen.alarms) > 0
    assert ledger.asked == 0
    assert ledger.fetched == []
    steps = sum(ledger.received)
    # The scores, and what rang beside them.
    pace = [(first, min(first + 4, steps)) for first in range(0, steps, 4)]
    assert ledger.copied == [span for span in pace for _ in range(2)]


def test_a_reaction_that_looks_at_the_scores_has_those_of_its_step(ledger: Ledger) -> None:
    one, looked = case("qwen2"), []

    def react(alarm: pv.Alarm, controls: pv.Controls) -> None:
        steps = seen[alarm.trait].steps
        looked.append(len(steps) - 1 == alarm.step)
        at = BANK.sites.index(alarm.site)
        assert float(steps[alarm.step, at, alarm.chat]) == alarm.value

    with one.found.model.monitor(BANK, alarms=one.levels, on_alarm=react) as seen:
        one.found.model.generate_ids(ROWS, engine=GRAPH, **one.settings)
    assert len(looked) == len(seen.alarms) > 0
    assert all(looked)
    _, plain = answered(one, "eager", on_alarm=noted)
    assert places(seen.alarms) == places(plain.alarms)


def test_a_stream_under_a_guard_outside_tells_both_alarms(ledger: Ledger) -> None:
    model, chats = subject("qwen2").model, ["Is it 3?", "well", "or so"]
    told = []
    for engine in ("eager", GRAPH):
        with model.monitor(BANK, alarms={"apathy": 0.0}, on_alarm=noted) as outer:
            steps = list(model.stream(chats, BANK, alarms={"evil": 0.0}, engine=engine, **GREEDY))
        told.append(
            (places([alarm for step in steps for alarm in step.alarms]), places(outer.alarms))
        )
    assert told[0] == told[1]
    assert all(told[0])
    assert ledger.asked == 2 * (NEW - 1)


def test_other_thresholds_compile_nothing() -> None:
    found, counting = fresh("qwen2"), Counting()
    engine = pv.Graph(backend=counting)
    with found.model.monitor(BANK) as plain:
        found.model.generate_ids(ROWS, **GREEDY)
    middle = {trait: between(plain[trait].steps, 0.5) for trait in BANK.traits}
    counts = []
    rules: list[tuple[Levels, Callable[..., None] | None]] = [
        ({"evil": middle["evil"]}, None),
        ({"evil": middle["evil"]}, noted),
        ({"evil": middle["evil"] + 0.2, "apathy": pv.Threshold(middle["apathy"], -1e3)}, noted),
        ({"sycophancy": {1: middle["sycophancy"]}}, None),
        ({"sycophancy": {0: 1e6, 2: -1e6}}, noted),
        (dict.fromkeys(BANK.traits, 1e6), noted),
    ]
    for levels, react in rules:
        told = []
        for way in ("eager", engine):
            with found.model.monitor(BANK, alarms=levels, on_alarm=react) as seen:
                found.model.generate_ids(ROWS, engine=way, **GREEDY)
            told.append(places(seen.alarms))
        assert told[0] == told[1]
        counts.append(len(told[0]))
    assert counting.graphs == 1
    assert counts[-1] == 0 < min(counts[:-1])
    assert len(set(counts)) > 3


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")  # by inductor
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compilers_that_rewrite_the_step_judge_the_same(backend: str) -> None:
    one, engine = case("qwen2"), pv.Graph(backend=backend)
    for rules in ({}, {"on_alarm": noted}):
        _, wanted = answered(one, "eager", **rules)
        _, got = answered(one, engine, **rules)
        assert places(got.alarms) == places(wanted.alarms) != []
