"""Reactions to alarms act on the row that rang, from its next token on, in both engines."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

import pvcore as pv
from pvcore.errors import PlanError
from tests.oracle import Edit, Generated, padded
from tests.subjects import Subject, fresh, point, prompts, raw, subject, trio, vector, worst
from tests.test_alarms import crossings
from tests.test_graph import GRAPH, Counting
from tests.test_steering_matrix import scores_of

NAMES = ("qwen2", "gemma2", "gpt2")
WAYS: dict[str, dict[str, Any]] = {
    "cached": {},
    "uncached": {"use_cache": False},
    "chunked": {"prefill_chunk_size": 4},
    "graph": {"engine": GRAPH},
}
LENGTHS = (13, 9, 11)
WIDTH, NEW = max(LENGTHS), 10
BOUND, VISIBLE = 1e-5, 1e-3
ROWS = prompts(LENGTHS)
SITE = pv.resid_post(1)
BANK = pv.VectorBank([vector("probe", [pv.resid_post(2)], seed=11)])
ONE, TWO, THREE = trio(SITE)
REACH = 0.3
Rung = set[tuple[int, int]]


def modes(way: str) -> str:
    return way if way in ("cached", "uncached", "chunked") else "cached"


def oracle_run(found: Subject, way: str, edits: Sequence[Edit]) -> Generated:
    ids, mask = padded(ROWS, side="left")
    return found.oracle.generate(ids, mask, edits, mode=modes(way), max_new_tokens=NEW)


def rung_in(scores: Tensor, high: float, low: float) -> Rung:
    """(chat, step) of every crossing of the oracle's scores at the one site of the bank."""
    return {
        (chat, step)
        for chat in range(3)
        for step in crossings(scores[:, 0, chat].tolist(), high, low)
    }


def threshold_of(found: Subject) -> float:
    """A level that some replies cross on the way, away from every score."""
    scores = scores_of(oracle_run(found, "cached", []), BANK, "probe").flatten().sort().values
    gaps = scores[1:] - scores[:-1]
    middle = slice(len(gaps) // 2, 4 * len(gaps) // 5)
    place = int(gaps[middle].argmax()) + len(gaps) // 2
    return float((scores[place] + scores[place + 1]) / 2)


def settled(
    found: Subject, way: str, react: Callable[[Rung], list[Edit]], *, reach: float = REACH
) -> tuple[Any, Rung]:
    """The run in which every reaction follows from the alarms of that same run.

    A reaction changes nothing before its alarm, so repeating the run settles it step by step.
    """
    high = threshold_of(found)
    known: Rung = set()
    for _ in range(3 * NEW):
        out = oracle_run(found, way, react(known))
        rung = rung_in(scores_of(out, BANK, "probe"), high, high - reach)
        if rung == known:
            return out, rung
        known = rung
    raise AssertionError("the oracle's run does not settle")


def from_next_token(kind: Any, vectors: Any, chat: int, step: int, **amounts: Any) -> Edit:
    where = torch.zeros(3, WIDTH + NEW, dtype=torch.bool)
    where[chat, WIDTH + step :] = True
    filled = {name: torch.full((3,), value) for name, value in amounts.items()}
    return Edit(kind=kind, point=point(SITE), vectors=raw(vectors, SITE), where=where, **filled)


def firsts(rung: Rung) -> list[tuple[int, int]]:
    """The first alarm of each chat."""
    return [min(pair for pair in rung if pair[0] == chat) for chat in {c for c, _ in rung}]


REACTIONS: dict[str, tuple[pv.Add | pv.Ablate | pv.Cap, Callable[[int, int], Edit]]] = {
    "re-steer": (
        pv.Add([ONE, TWO], coeff=[-1.5, 1.0, 2.0]),
        lambda chat, step: from_next_token(
            "add", [ONE, TWO], chat, step, coeff=[-1.5, 1.0, 2.0][chat]
        ),
    ),
    "ablate": (
        pv.Ablate([ONE, THREE]),
        lambda chat, step: from_next_token("ablate", [ONE, THREE], chat, step),
    ),
    "cap": (
        pv.Cap([ONE, TWO], max=-0.5, min=-1.0),
        lambda chat, step: from_next_token("cap", [ONE, TWO], chat, step, upper=-0.5, lower=-1.0),
    ),
}


def compiled(name: str, kind: str) -> bool:
    """Tracing takes seconds, so each kind meets the graph engine in two families."""
    return (NAMES.index(name) + list(REACTIONS).index(kind)) % 2 == 0


@pytest.mark.parametrize(
    ("name", "kind", "way"),
    [
        (name, kind, way)
        for name in NAMES
        for kind in REACTIONS
        for way in WAYS
        if way != "graph" or compiled(name, kind)
    ],
)
def test_an_armed_intervention_acts_from_the_next_token_on(name: str, kind: str, way: str) -> None:
    found, (intervention, edit) = subject(name), REACTIONS[kind]
    out, rung = settled(found, way, lambda known: [edit(*first) for first in firsts(known)])
    high = threshold_of(found)
    plain = oracle_run(found, way, [])
    settings = {"max_new_tokens": NEW, "do_sample": False, **WAYS[way]}
    guarded = found.model.monitor(
        BANK, alarms={"probe": pv.Threshold(high, high - REACH)}, on_alarm=intervention
    )
    with guarded as seen:
        tokens = found.model.generate_ids(ROWS, **settings)
    wanted = scores_of(out, BANK, "probe")
    assert [row.tolist() for row in tokens] == out.tokens.tolist()
    assert worst(seen["probe"].steps, wanted) < BOUND
    assert {(alarm.chat, alarm.step) for alarm in seen.alarms} == rung
    assert len(seen.alarms) == len(rung) > 0
    base = scores_of(plain, BANK, "probe")
    changes = []
    for chat, step in firsts(rung):
        assert worst(wanted[: step + 1, :, chat], base[: step + 1, :, chat]) < BOUND
        if step + 1 < NEW:
            changes.append(worst(wanted[step + 1, :, chat], base[step + 1, :, chat]))
    assert max(changes) > VISIBLE
    quiet = set(range(3)) - {chat for chat, _ in rung}
    assert all(worst(wanted[..., chat], base[..., chat]) < BOUND for chat in quiet)


@pytest.mark.parametrize(
    ("name", "way"),
    [(name, way) for name in NAMES for way in WAYS if way != "graph" or name == "gpt2"],
)
def test_a_stopped_reply_ends_with_the_token_that_rang(name: str, way: str) -> None:
    found = subject(name)
    high = threshold_of(found)
    plain = oracle_run(found, way, [])
    first = dict(firsts(rung_in(scores_of(plain, BANK, "probe"), high, high - REACH)))
    assert first
    settings = {"max_new_tokens": NEW, "do_sample": False, **WAYS[way]}
    with found.model.monitor(BANK, alarms={"probe": high}, on_alarm="stop") as seen:
        tokens = found.model.generate_ids(ROWS, **settings)
    for chat, row in enumerate(plain.tokens.tolist()):
        length = first.get(chat, NEW - 1) + 1
        assert tokens[chat].tolist() == row[:length]
        assert int((~seen["probe"].steps[:, 0, chat].isnan()).sum()) == length
    assert {(a.chat, a.step) for a in seen.alarms} == set(first.items())


@pytest.mark.parametrize("engine", ["eager", GRAPH])
def test_levels_may_begin_above_nothing_and_be_turned_at_every_alarm(engine: Any) -> None:
    found = subject("qwen2")
    add = pv.Add(ONE, coeff=0.5)
    turns: dict[int, int] = {}

    def react(alarm: pv.Alarm, controls: pv.Controls) -> None:
        turns[alarm.chat] = turns.get(alarm.chat, 0) + 1
        controls.set(add, [1.0, -2.0, 0.0, 3.0][turns[alarm.chat] % 4])

    def edits(known: Rung) -> list[Edit]:
        where = torch.zeros(3, WIDTH + NEW, dtype=torch.bool)
        where[:, WIDTH - 1 :] = True
        first = Edit(
            kind="add",
            point=point(SITE),
            vectors=raw([ONE], SITE),
            where=where,
            coeff=torch.full((3,), 0.5),
        )
        made = [first]
        for chat in range(3):
            before = 1.0
            for count, (_, step) in enumerate(sorted(p for p in known if p[0] == chat), 1):
                level = [1.0, -2.0, 0.0, 3.0][count % 4]
                change = 0.5 * (level - before)
                made.append(from_next_token("add", [ONE], chat, step, coeff=change))
                before = level
        return made

    out, rung = settled(found, "cached", edits, reach=0.0)
    guarded = found.model.monitor(
        BANK,
        alarms={"probe": threshold_of(found)},
        on_alarm=react,
        standby={add: 1.0},
    )
    with guarded as seen:
        tokens = found.model.generate_ids(ROWS, engine=engine, max_new_tokens=NEW, do_sample=False)
    assert [row.tolist() for row in tokens] == out.tokens.tolist()
    assert worst(seen["probe"].steps, scores_of(out, BANK, "probe")) < BOUND
    assert {(alarm.chat, alarm.step) for alarm in seen.alarms} == rung
    assert max(turns.values()) > 1


@pytest.mark.parametrize("engine", ["eager", GRAPH])
def test_a_stream_tells_the_alarms_and_reacts_alike(engine: Any) -> None:
    found = subject("qwen2")
    chats, settings = ["Is it 3?", "well"], {"max_new_tokens": NEW, "do_sample": False}
    with found.model.monitor(BANK) as seen:
        found.model.generate_ids(chats, **settings)
    level = float(seen["probe"].steps.median())
    cap = pv.Cap(ONE, max=-2.0)
    rules: dict[str, Any] = {"alarms": {"probe": level}, "on_alarm": cap}
    with found.model.monitor(BANK, **rules) as seen:
        texts = found.model.generate(chats, engine=engine, **settings)
    steps = list(found.model.stream(chats, BANK, **rules, engine=engine, **settings))
    assert ["".join(step.text[row] for step in steps) for row in (0, 1)] == texts
    assert tuple(alarm for step in steps for alarm in step.alarms) == seen.alarms
    assert all(alarm.step == count for count, s in enumerate(steps) for alarm in s.alarms)
    assert {alarm.chat for alarm in seen.alarms} == {0, 1}
    stopped = list(
        found.model.stream(chats, BANK, alarms={"probe": -1e6}, on_alarm="stop", **settings)
    )
    assert len(stopped) == 1
    assert len(stopped[0].alarms) == 2


def test_a_reaction_may_read_with_the_model_it_watches() -> None:
    model, chats = subject("qwen2").model, ["Is it 3?", "well"]
    settings = {"max_new_tokens": NEW, "do_sample": False}
    rules: dict[str, Any] = {"alarms": {"probe": -1e6}, "standby": [pv.Add(ONE, coeff=2.0)]}
    read: list[Tensor] = []

    def react(alarm: pv.Alarm, controls: pv.Controls) -> None:
        controls.set(rules["standby"][0])
        read.append(model.read(ROWS, sites=[1], span="all")[SITE])

    def quiet(alarm: pv.Alarm, controls: pv.Controls) -> None:
        controls.set(rules["standby"][0])

    wanted = list(model.stream(chats, BANK, on_alarm=quiet, **rules, **settings))
    got = list(model.stream(chats, BANK, on_alarm=react, **rules, **settings))
    assert [step.text for step in got] == [step.text for step in wanted]
    for one, other in zip(got, wanted, strict=True):
        assert torch.equal(one.projections["probe"], other.projections["probe"])
    # What is on standby acts in the generation it was set for, and in nothing that runs within it.
    assert len(read) == 2
    plain = model.read(ROWS, sites=[1], span="all")[SITE]
    assert all(worst(one, plain) < BOUND for one in read)


def test_nothing_compiles_anew_when_a_reaction_acts() -> None:
    found, counting = fresh("qwen2"), Counting()
    engine = pv.Graph(backend=counting)
    settings = {"max_new_tokens": NEW, "do_sample": False, "engine": engine}
    high = threshold_of(found)
    told = []
    for level, coeff in ((high, 2.0), (1e6, 2.0), (high, -3.0), (high - 0.1, [1.0, 0.0, 2.0])):
        add, cap = pv.Add(ONE, coeff=coeff), pv.Cap(TWO, max=0.1)

        def react(
            alarm: pv.Alarm, controls: pv.Controls, add: pv.Add = add, cap: pv.Cap = cap
        ) -> None:
            controls.set(add, 1.5)
            controls.set(cap)

        answers = []
        for way in (settings, settings | {"engine": "eager"}):
            guarded = found.model.monitor(
                BANK, alarms={"probe": level}, on_alarm=react, standby=[add, cap]
            )
            with guarded as seen:
                ids = found.model.generate_ids(ROWS, **way)
            answers.append(([row.tolist() for row in ids], len(seen.alarms)))
        assert answers[0] == answers[1]
        told.append(answers[0][1])
    assert counting.graphs == 1
    assert told[1] == 0 < told[0]


def test_what_waits_changes_nothing_and_alarms_alone_need_no_waiting() -> None:
    found, settings = subject("qwen2"), {"max_new_tokens": NEW, "do_sample": False}
    high = threshold_of(found)
    with found.model.monitor(BANK) as plain:
        wanted = found.model.generate_ids(ROWS, **settings)
    waiting = found.model.monitor(
        BANK, alarms={"probe": 1e6}, on_alarm=pv.Ablate(ONE), standby=[pv.Add(TWO, coeff=9.0)]
    )
    with waiting as seen:
        tokens = found.model.generate_ids(ROWS, **settings)
    assert all(map(torch.equal, tokens, wanted))
    assert torch.equal(seen["probe"].steps, plain["probe"].steps)
    assert seen.alarms == ()
    with found.model.monitor(
        BANK, alarms={"probe": pv.Threshold(high, high - REACH)}
    ) as looked_back:
        found.model.generate_ids(ROWS[:1], **settings)
        found.model.generate_ids(ROWS[1:], **settings)
    told = {(alarm.chat, alarm.step) for alarm in looked_back.alarms}
    assert told == rung_in(plain["probe"].steps, high, high - REACH)
    assert {chat for chat, _ in told} & {1, 2}


def test_sampled_sequences_of_a_chat_are_rows_of_their_own() -> None:
    found = subject("qwen2")
    settings: dict[str, Any] = {"do_sample": True, "num_return_sequences": 2, "temperature": 2.0}
    with found.model.monitor(BANK) as plain:
        torch.manual_seed(3)
        free = found.model.generate_ids(ROWS, max_new_tokens=NEW, **settings)
    scores = plain["probe"].steps[:, 0]
    high = float(scores.median()) + 0.01
    with found.model.monitor(BANK, alarms={"probe": high}, on_alarm="stop") as seen:
        torch.manual_seed(3)
        tokens = found.model.generate_ids(ROWS, max_new_tokens=NEW, **settings)
    first = {alarm.chat: alarm.step for alarm in seen.alarms}
    assert len(tokens) == 6
    assert first
    for row in range(6):
        length = first.get(row, NEW - 1) + 1
        # Rows that have not ended yet draw the same numbers.
        assert (
            tokens[row].tolist()[: min(first.values())] == free[row].tolist()[: min(first.values())]
        )
        assert len(tokens[row]) == length


def test_rules_that_cannot_come_into_force_are_refused() -> None:
    model = subject("qwen2").model
    with pytest.raises(PlanError, match="on_alarm or standby and no alarms"):
        model.monitor(BANK, on_alarm="stop")
    with pytest.raises(PlanError, match=r"got on_alarm=.halt.; wanted .stop."):
        model.monitor(BANK, alarms={"probe": 1.0}, on_alarm="halt")  # type: ignore[arg-type]
    with pytest.raises(PlanError, match=r"level 0\.5 for Cap; wanted 0 or 1"):
        model.monitor(BANK, alarms={"probe": 1.0}, standby={pv.Cap(ONE, max=1.0): 0.5})
    with pytest.raises(PlanError, match="got an alarm for envy"):
        model.monitor(BANK, alarms={"envy": 1.0})
    with pytest.raises(PlanError, match="got an alarm for evil"):
        model.stream(["well"], alarms={"evil": 1.0})

    def strange(alarm: pv.Alarm, controls: pv.Controls) -> None:
        controls.set(pv.Ablate(TWO))

    guarded = model.monitor(BANK, alarms={"probe": -1e6}, on_alarm=strange)
    with pytest.raises(PlanError, match="Ablate to set, which is not on standby"), guarded:
        model.generate_ids(ROWS, max_new_tokens=3)
    beams = model.monitor(BANK, alarms={"probe": 0.0}, on_alarm="stop")
    with pytest.raises(PlanError, match="got beams under a monitor that acts"), beams:
        model.generate_ids(ROWS, max_new_tokens=3, num_beams=2)


def test_threads_on_one_model_keep_their_alarms_and_levels_apart() -> None:
    found = subject("qwen2")
    settings: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False}
    high = threshold_of(found)
    jobs = [
        (high, pv.Add(ONE, coeff=-1.5)),
        (high - 0.2, pv.Add(TWO, coeff=2.0)),
        (1e6, pv.Ablate(ONE)),
        (high, pv.Cap(THREE, max=-1.0)),
    ]

    def work(job: tuple[float, Any]) -> tuple[list[list[int]], list[tuple[int, int]]]:
        guarded = found.model.monitor(BANK, alarms={"probe": job[0]}, on_alarm=job[1])
        with guarded as seen, torch.no_grad():
            ids = found.model.generate_ids(ROWS, **settings)
        return [row.tolist() for row in ids], [(a.chat, a.step) for a in seen.alarms]

    alone = [work(job) for job in jobs]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(work, jobs * 3))
    assert together == alone * 3
    assert len({str(one) for one in alone}) == 4
    # One compiled generation at a time: the others wait for their turn.
    settings["engine"] = GRAPH
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(work, [jobs[0]] * 3)) == [alone[0]] * 3


def test_an_error_in_a_reaction_ends_the_generation_and_leaves_nothing() -> None:
    found, settings = fresh("qwen2"), {"max_new_tokens": NEW, "do_sample": False}
    plain = found.model.generate_ids(ROWS, **settings)

    def fail(alarm: pv.Alarm, controls: pv.Controls) -> None:
        controls.set(strong)
        raise RuntimeError("out of order")

    strong = pv.Add(ONE, coeff=9.0)
    for engine in ("eager", GRAPH):
        guarded = found.model.monitor(BANK, alarms={"probe": -1e6}, on_alarm=fail, standby=[strong])
        with pytest.raises(RuntimeError, match="out of order"), guarded:
            found.model.generate_ids(ROWS, engine=engine, **settings)
        after = found.model.generate_ids(ROWS, engine=engine, **settings)
        assert all(map(torch.equal, after, plain))


@pytest.mark.parametrize("span", ["prompt", "last_prompt_token"])
def test_an_alarm_of_a_reply_reaches_no_prompt(span: Any) -> None:
    model = subject("qwen2").model
    add = pv.Add(ONE, coeff=1.0, span=span)
    for rules in ({"on_alarm": add}, {"standby": [add], "on_alarm": "stop"}):
        with pytest.raises(PlanError, match=f"span '{span}' on standby"):
            model.monitor(BANK, alarms={"probe": 1.0}, **rules)
