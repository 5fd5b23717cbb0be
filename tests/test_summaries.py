"""Summaries are those of the steps that a monitor of everything keeps, and of raw hooks' own."""

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import pvcore as pv
from pvcore import resident, summaries
from pvcore.errors import HookError, PlanError, VectorError
from pvcore.frames import Call, Outcome
from pvcore.monitor import SeenSummary
from pvcore.summaries import Reach, Summary
from tests.families import END, PAD
from tests.oracle import Generated, padded
from tests.subjects import Subject, conversations, fresh, point, prompts, subject, trio, unit
from tests.test_graph import GRAPH, Counting
from tests.test_outflow import LiveBytes, elsewhere

FAMILIES = ("qwen2", "gemma2", "gpt2")
ENGINES = {"eager": "eager", "graph": GRAPH}
SITES = tuple(pv.resid_post(layer) for layer in range(3))
BANK = pv.VectorBank(trio(*SITES))
LENGTHS = (4, 9, 6)
WIDTH, NEW = max(LENGTHS), 14
PROMPTS = prompts(LENGTHS)
GREEDY: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False}
# Residuals are of order one and scores of order ten; a step too many must be told from rounding.
BOUND, VISIBLE = 1e-5, 1e-3


class Stops:
    """A stopping criterion of one's own: row `r` ends with its `after[r]`-th token."""

    def __init__(self, *after: int) -> None:
        self.after = torch.tensor(after)

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return self.after <= input_ids.shape[1] - WIDTH


def oracle_scores(out: Generated, trait: pv.PersonaVector) -> Tensor:
    """Projections `[step, layer, row]` of every step that was computed, in float64."""
    return torch.stack(
        [
            torch.stack(
                [
                    out.tape.step(point(site), WIDTH, t).double() @ unit(trait, site)
                    for site in SITES
                ]
            )
            for t in range(out.tokens.shape[1])
        ]
    )


def held_to(got: pv.TraitSummary, scores: Tensor, lengths: Sequence[int], bound: float) -> None:
    """A summary against float64 scores `[step, layer, row]`, of which each row has so many."""
    assert got.count.tolist() == list(lengths)
    for row, length in enumerate(lengths):
        own = scores[:length, :, row].double()
        for figure, wanted in (
            (got.last_prompt_token, own[0]),
            (got.mean, own.mean(0)),
            (got.highest, own.amax(0)),
            (got.lowest, own.amin(0)),
        ):
            assert (figure[:, row].double() - wanted).abs().max() <= bound


def same_as_tables(got: pv.TraitSummary, tables: pv.TraitScores) -> None:
    """Bit for bit, but for the mean, which is the float64 mean to rounding."""
    steps = tables.steps.double()
    over = steps.isnan()
    assert torch.equal(got.last_prompt_token, tables.last_prompt_token)
    assert torch.equal(got.count, (~over).any(1).sum(0))
    assert torch.equal(got.highest.double(), steps.masked_fill(over, -torch.inf).amax(0))
    assert torch.equal(got.lowest.double(), steps.masked_fill(over, torch.inf).amin(0))
    mean = steps.nanmean(0)
    assert ((got.mean.double() - mean).abs() <= 1e-6 * mean.abs()).all()
    assert got.mean.dtype == tables.steps.dtype


def both(found: Subject, run: Callable[[], Any], *, bank: pv.VectorBank = BANK) -> Any:
    """What one run shows a monitor of summaries, held to what it shows one of everything."""
    with found.model.monitor(bank) as every, found.model.monitor(bank, keep="summary") as seen:
        result = run()
    for trait in bank.traits:
        same_as_tables(seen[trait], every[trait])
    return result, seen


def an_end(free: Sequence[Tensor]) -> int:
    """An id with which rows end at different steps, one of them before the last."""
    for candidate in torch.cat(list(free)).tolist():
        ends = {
            next((i for i, t in enumerate(ids.tolist()) if t == candidate), NEW) for ids in free
        }
        if len(ends) > 1 and 1 <= min(ends) < NEW - 3:
            return int(candidate)
    raise AssertionError("no token ends these replies apart")


def cut(tokens: Tensor, end: int) -> list[int]:
    """Tokens of each row up to and including its end."""
    return [
        next((i + 1 for i, token in enumerate(row) if token == end), len(row))
        for row in tokens.tolist()
    ]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_that_end_apart_are_summed_up_to_their_ends(family: str, engine: str) -> None:
    found = subject(family)
    end = an_end(found.model.generate_ids(PROMPTS, **GREEDY))
    settings = {**GREEDY, "eos_token_id": end, "pad_token_id": PAD}
    replies, seen = both(
        found, lambda: found.model.generate_ids(PROMPTS, engine=ENGINES[engine], **settings)
    )
    out = found.oracle.generate(*padded(PROMPTS, side="left"), **settings)
    lengths = cut(out.tokens, end)
    assert [len(ids) for ids in replies] == lengths
    assert len(set(lengths)) > 1
    early = lengths.index(min(lengths))
    for trait in BANK.vectors:
        scores = oracle_scores(out, trait)
        held_to(seen[trait.trait], scores, lengths, BOUND * float(scores.abs().max()))
        # What the batch computed past the end of the row would have shown.
        spoilt = scores[:, :, early].mean(0)
        assert (seen[trait.trait].mean[:, early].double() - spoilt).abs().min() > VISIBLE
    widest = [
        (scores[:, :, early].amax(0) - scores[: lengths[early], :, early].amax(0)).max()
        for scores in (oracle_scores(out, trait) for trait in BANK.vectors)
    ]
    assert max(widest) > VISIBLE


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("after", [(3, 12, 7), (1, 99, 99), (99, 99, 99)])
def test_criteria_of_the_callers_own_end_rows_as_well(engine: str, after: tuple[int, ...]) -> None:
    found = subject("qwen2")
    settings = {**GREEDY, "stopping_criteria": [Stops(*after)], "pad_token_id": PAD}
    replies, seen = both(
        found, lambda: found.model.generate_ids(PROMPTS, engine=ENGINES[engine], **settings)
    )
    lengths = [min(one, NEW) for one in after]
    assert [len(ids) for ids in replies] == lengths
    out = found.oracle.generate(*padded(PROMPTS, side="left"), **settings)
    for trait in BANK.vectors:
        scores = oracle_scores(out, trait)
        held_to(seen[trait.trait], scores, lengths, BOUND * float(scores.abs().max()))


@pytest.mark.parametrize("engine", ENGINES)
def test_stop_strings_end_rows_as_well(engine: str) -> None:
    found = subject("qwen2")
    free = found.model.generate(PROMPTS, **GREEDY)
    settings = {**GREEDY, "stop_strings": [free[0][3:5]], "engine": ENGINES[engine]}
    replies, seen = both(found, lambda: found.model.generate_ids(PROMPTS, **settings))
    assert seen["evil"].count.tolist() == [len(ids) for ids in replies]
    assert min(map(len, replies)) < NEW == max(map(len, replies))


@pytest.mark.parametrize(
    "settings",
    [{"use_cache": False}, {"cache_implementation": "static"}, {"prefill_chunk_size": 4}],
)
def test_other_caches_give_the_same(settings: dict[str, Any]) -> None:
    found = subject("llama")
    end = an_end(found.model.generate_ids(PROMPTS, **GREEDY))
    settings = {**GREEDY, **settings, "eos_token_id": end, "pad_token_id": PAD}
    _, seen = both(found, lambda: found.model.generate_ids(PROMPTS, **settings))
    plain = {**GREEDY, "eos_token_id": end, "pad_token_id": PAD}
    out = found.oracle.generate(*padded(PROMPTS, side="left"), **plain)
    scores = oracle_scores(out, BANK.vectors[0])
    held_to(seen["evil"], scores, cut(out.tokens, end), BOUND * float(scores.abs().max()))


@pytest.mark.parametrize("engine", ENGINES)
def test_returned_sequences_are_chats(engine: str) -> None:
    found = subject("qwen2")
    end = an_end(found.model.generate_ids(PROMPTS, **GREEDY))
    settings = {
        **GREEDY,
        "do_sample": True,
        "num_return_sequences": 2,
        "eos_token_id": end,
        "pad_token_id": PAD,
    }

    def sample() -> list[Tensor]:
        torch.manual_seed(3)
        return found.model.generate_ids(PROMPTS, engine=ENGINES[engine], **settings)

    replies, seen = both(found, sample)
    torch.manual_seed(3)
    out = found.oracle.generate(*padded(PROMPTS, side="left"), **settings)
    lengths = cut(out.tokens, end)
    assert len(replies) == 6
    assert [len(ids) for ids in replies] == lengths
    assert len(set(lengths)) > 1
    for trait in BANK.vectors:
        scores = oracle_scores(out, trait)
        held_to(seen[trait.trait], scores, lengths, BOUND * float(scores.abs().max()))


@pytest.mark.parametrize("engine", ENGINES)
def test_calls_follow_each_other_along_the_chats(engine: str) -> None:
    found, how = subject("qwen2"), {**GREEDY, "engine": ENGINES[engine]}
    five = prompts([9, 2, 5, 7, 3])

    def several() -> None:
        found.model.generate_ids(PROMPTS, stopping_criteria=[Stops(2, 9, 5)], **how)
        found.model.read(five, sites=[pv.resid_post(2)], span="prompt", batch_size=2)
        found.model.generate_ids(PROMPTS[:1], **how | {"max_new_tokens": 1})
        found.model.generate_ids(PROMPTS[1:], **how | {"max_new_tokens": 3})

    _, seen = both(found, several)
    assert seen["evil"].count.tolist() == [2, 9, 5, *[1] * 5, 1, 3, 3]
    assert seen["evil"].mean.shape == (3, 11)
    assert seen["apathy"].mean.is_contiguous()


def test_a_conversation_that_is_read_is_summed_up_over_its_reply() -> None:
    found = subject("qwen2")
    _, seen = both(
        found,
        lambda: found.model.read(conversations(), sites=[pv.resid_post(2)], batch_size=2),
    )
    assert len(set(seen["evil"].count.tolist())) == 3
    assert (seen["evil"].highest > seen["evil"].lowest).all()
    assert (seen["evil"].mean - seen["evil"].last_prompt_token).abs().min() > VISIBLE


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_forward_of_ones_own_shows_its_last_tokens(side: str) -> None:
    found = subject("qwen2")
    ids, mask = padded(PROMPTS, side=side)
    _, seen = both(found, lambda: found.model.hf(ids, attention_mask=mask))
    assert seen["evil"].count.tolist() == [1, 1, 1]
    assert not seen["evil"].mean.requires_grad
    _, tape = found.oracle.forward(ids, mask)
    columns = [WIDTH - 1] * 3 if side == "left" else [length - 1 for length in LENGTHS]
    for layer, site in enumerate(SITES):
        rows = tape.frames[0].residuals[point(site)][torch.arange(3), columns].double()
        wanted = rows @ unit(BANK.vectors[0], site)
        for name in ("last_prompt_token", "mean", "highest", "lowest"):
            assert (getattr(seen["evil"], name)[layer].double() - wanted).abs().max() <= 1e-4


# Half of five slots comes past the ring's end between steps 5 and 6, where a row of 6 tokens ends.
@pytest.mark.parametrize("slots", [2, 5, 8])
@pytest.mark.parametrize("tokens", [1, 2, 7, 13])
def test_a_ring_is_folded_before_it_is_written_over(
    slots: int, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resident, "RING_STEPS", slots)
    found = fresh("qwen2")
    settings: dict[str, Any] = {"max_new_tokens": tokens, "do_sample": False, "engine": GRAPH}
    criteria = [Stops(1, min(6, tokens), tokens)]
    _, seen = both(
        found, lambda: found.model.generate_ids(PROMPTS, stopping_criteria=criteria, **settings)
    )
    # The way of everything takes the ring's slots in the same order: only hooks can tell.
    plain = {"max_new_tokens": tokens, "do_sample": False, "eos_token_id": None}
    scores = oracle_scores(
        found.oracle.generate(*padded(PROMPTS, side="left"), **plain), BANK.vectors[0]
    )
    lengths = [1, min(6, tokens), tokens]
    held_to(seen["evil"], scores, lengths, BOUND * float(scores.abs().max()))


def test_steps_wait_and_are_folded_together(monkeypatch: pytest.MonkeyPatch) -> None:
    found, sizes = subject("qwen2"), []
    fold = Summary.fold

    def counted(self: Summary, steps: Tensor) -> None:
        sizes.append(len(steps))
        fold(self, steps)

    monkeypatch.setattr(Summary, "fold", counted)
    monkeypatch.setattr(summaries, "WAITING_STEPS", 5)
    monkeypatch.setattr("pvcore.monitor.WAITING_STEPS", 2)
    both(found, lambda: found.model.generate_ids(PROMPTS, **GREEDY))
    assert sum(sizes) == NEW - 1
    assert max(sizes) == 6


def test_engines_and_what_is_kept_share_one_compiled_step() -> None:
    found, backend = fresh("qwen2"), Counting()
    graph, shown = pv.Graph(backend=backend), []
    for keep in ("all", "summary", "summary", "all"):
        with found.model.monitor(BANK, keep=keep) as seen:
            found.model.generate_ids(PROMPTS, engine=graph, **GREEDY)
        shown.append(seen["evil"])
    assert backend.graphs == 1
    same_as_tables(shown[1], shown[0])
    assert torch.equal(shown[1].mean, shown[2].mean)


class NoWaiting(TorchDispatchMode):
    """Fails on operations whose result a host has to wait for."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "masked_select", "equal"), name
        if name == "index":
            assert all(one is None or one.dtype != torch.bool for one in args[1]), name
        return func(*args, **(kwargs or {}))


def test_no_fold_and_no_ending_waits_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    found, calls = subject("qwen2"), []

    def watched(kind: type, name: str) -> None:
        plain = getattr(kind, name)

        def bare(*given: Any, **more: Any) -> Any:
            calls.append(name)
            with NoWaiting():
                return plain(*given, **more)

        monkeypatch.setattr(kind, name, bare)

    watched(Summary, "fold")
    watched(summaries.Ending, "__call__")
    with found.model.monitor(BANK, keep="summary") as seen:
        found.model.generate_ids(PROMPTS, engine=GRAPH, eos_token_id=END, **GREEDY)
    assert seen["evil"].count.max() > 1
    assert {"fold", "__call__"} == set(calls)
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoWaiting():
        bool(torch.ones(1).any())


class Census:
    """A logits processor that counts the live tensors of the process at some steps."""

    def __init__(self, *steps: int) -> None:
        self.steps, self.step, self.found = steps, -1, {}

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.step += 1
        if self.step in self.steps:
            gc.collect()
            self.found[self.step] = live()[0]
        return scores


def live() -> tuple[int, int]:
    """How many tensors live, and the bytes of their storages."""
    found = [one for one in gc.get_objects() if type(one) is Tensor]
    tensors = [one for one in found if one.layout == torch.strided]  # others have no storage
    storages = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors}
    return len(tensors), sum(storages.values())


@pytest.mark.parametrize("engine", ENGINES)
def test_nothing_grows_with_the_reply(engine: str) -> None:
    found = subject("qwen2")
    how: dict[str, Any] = {"do_sample": False, "engine": ENGINES[engine]}
    grown, left = {}, {}
    for keep in ("all", "summary"):
        # Steps wait together by 32 where that is cheaper.
        census = Census(32, 288)
        with found.model.monitor(BANK, keep=keep):
            found.model.generate_ids(PROMPTS, max_new_tokens=300, logits_processor=[census], **how)
        grown[keep] = census.found[288] - census.found[32]
        for tokens in (30, 300):
            with found.model.monitor(BANK, keep=keep) as seen:
                # A step compiled for the longer reply serves both, so that only scores can differ.
                found.model.generate_ids(PROMPTS, max_new_tokens=tokens, **how)
                gc.collect()
                left[keep, tokens] = live()
            del seen
    assert grown["summary"] == 0
    assert grown["all"] > 200
    assert left["summary", 300][0] == left["summary", 30][0]
    assert left["all", 300][0] > left["all", 30][0] + 200


@pytest.mark.parametrize("engine", ENGINES)
def test_alarms_ring_as_they_do_beside_tables(engine: str) -> None:
    found, rung = subject("qwen2"), {}
    with found.model.monitor(BANK) as free:
        found.model.generate_ids(PROMPTS, **GREEDY)
    level = float(free["evil"].steps[:, 1].quantile(0.7))
    rules: dict[str, Any] = {"alarms": {"evil": {1: level}}}
    how = {**GREEDY, "stopping_criteria": [Stops(4, NEW, 9)], "engine": ENGINES[engine]}
    for keep in ("all", "summary"):
        for name in ("tell", "stop", "ablate"):
            react = {"tell": None, "stop": "stop", "ablate": pv.Ablate(BANK.vectors[0])}[name]
            with found.model.monitor(BANK, keep=keep, on_alarm=react, **rules) as seen:
                ids = found.model.generate_ids(PROMPTS, **how)
                again = found.model.generate_ids(PROMPTS[:1], **how | {"stopping_criteria": None})
            rung[keep, name] = (
                [(one.chat, one.step, one.value) for one in seen.alarms],
                [len(one) for one in (*ids, *again)],
                seen["evil"],
            )
    for name in ("tell", "stop", "ablate"):
        alarms, lengths, tables = rung["all", name]
        assert rung["summary", name][:2] == (alarms, lengths)
        same_as_tables(rung["summary", name][2], tables)
        assert len({chat for chat, *_ in alarms}) > 1
    assert rung["all", "stop"][1] != rung["all", "tell"][1]
    assert not torch.equal(rung["all", "ablate"][2].steps, rung["all", "tell"][2].steps)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_summary_may_be_asked_for_while_a_reply_is_made(engine: str) -> None:
    found, asked = subject("qwen2"), []
    how = {**GREEDY, "engine": ENGINES[engine]}

    def look(input_ids: Tensor, _scores: Any, **_: Any) -> Tensor:
        asked.append((seen["evil"], tables["evil"], seen.newest(), tables.newest()))
        return Stops(3, 99, 8)(input_ids, None)

    with found.model.monitor(BANK) as tables, found.model.monitor(BANK, keep="summary") as seen:
        found.model.generate_ids(PROMPTS, stopping_criteria=[look], **how)
    assert len(asked) == NEW
    for made, (got, scores, newest, wanted) in enumerate(asked, 1):
        lengths = [min(made, 3), made, min(made, 8)]
        held_to(got, scores.steps, lengths, 1e-5)
        assert torch.equal(newest, wanted)
    same_as_tables(seen["evil"], tables["evil"])


@pytest.mark.parametrize("engine", ENGINES)
def test_inference_mode_does_not_outlive_its_block(engine: str) -> None:
    found = subject("qwen2")

    def run() -> Any:
        with torch.inference_mode():
            found.model.generate_ids(PROMPTS, engine=ENGINES[engine], **GREEDY)

    _, seen = both(found, run)
    assert not any(getattr(seen["evil"], one.name).is_inference() for one in fields(seen["evil"]))
    weight = torch.ones(3, requires_grad=True)
    (weight @ seen["evil"].mean).sum().backward()
    assert weight.grad is not None


def test_wide_models_are_summed_up_in_their_own_precision() -> None:
    found = fresh("qwen2")
    found.model.hf.double()
    _, seen = both(found, lambda: found.model.generate_ids(PROMPTS, **GREEDY))
    assert seen["evil"].mean.dtype == torch.float64


@pytest.mark.parametrize("piece", [1 << 9, 1 << 12])
def test_where_scores_leave_a_prompt_is_folded_piece_by_piece(
    piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = subject("qwen2")
    with elsewhere(monkeypatch, piece):
        both(found, lambda: found.model.generate_ids(PROMPTS, **GREEDY))
        both(found, lambda: found.model.read(conversations(), sites=[pv.resid_post(2)]))
        long = [torch.randint(5, 100, (2, 110))[row] for row in range(2)]
        seen, units = SeenSummary(BANK), None
        units = seen.units(torch.device("cpu"), torch.float32)
        call = Call(
            rows=torch.arange(2),
            n_chats=2,
            mask=torch.ones(2, 110, dtype=torch.bool),
            last=torch.full((2,), 50),
            generating=False,
        )
        h = torch.randn(2, 110, units.shape[-1])
        with LiveBytes(h, units) as counted:
            summary = Summary(call, torch.full((2,), 50), 3)
            for place in range(3):
                summary.score(place, h, units[place], 0)
    scores = torch.einsum("bpd,lvd->plbv", h.double(), units.double())[50:]
    held_to(summary.trait(1), scores[..., 1], [60, 60], BOUND * float(scores.abs().max()))
    assert len(long) == 2
    # Indices of the steps (two numbers of eight bytes each), a few pieces, and the figures.
    assert counted.most < 2 * 60 * 8 * 12 + 8 * piece + 3 * 2 * 3 * 64


def test_a_failed_generation_leaves_no_rows() -> None:
    found = subject("qwen2")

    def fail(*_: Any, **__: Any) -> Tensor:
        raise ValueError("no more")

    with found.model.monitor(BANK, keep="summary") as seen:
        with pytest.raises(ValueError, match="no more"):
            found.model.generate_ids(PROMPTS, stopping_criteria=[fail], **GREEDY)
        with pytest.raises(HookError, match="got no forward to report yet"):
            seen["evil"]
        found.model.generate_ids(PROMPTS, **GREEDY)
    assert seen["evil"].count.tolist() == [NEW] * 3
    with pytest.raises(VectorError, match="got trait 'envy'"):
        seen["envy"]


def test_a_plan_is_armed_with_a_summary() -> None:
    found = subject("qwen2")
    plan = pv.Plan(pv.Add(BANK.vectors[0], coeff=1.0), monitor=BANK)
    with found.model.arm(plan) as tables:
        found.model.generate_ids(PROMPTS, **GREEDY)
    with found.model.arm(plan, keep="summary") as seen:
        found.model.generate_ids(PROMPTS, **GREEDY)
    same_as_tables(seen["evil"], tables["evil"])


def test_what_cannot_be_summed_up_is_refused_before_anything_runs() -> None:
    found = subject("qwen2")
    with pytest.raises(PlanError, match="got keep='some'; wanted 'all' or 'summary'"):
        found.model.monitor(BANK, keep="some")  # type: ignore[call-overload]
    with pytest.raises(PlanError, match="got keep=''"):
        found.model.arm(pv.Plan(monitor=BANK), keep="")  # type: ignore[call-overload]
    steer = pv.Plan(pv.Add(BANK.vectors[0], coeff=1.0))
    with pytest.raises(PlanError, match="a plan that watches nothing: give it monitor="):
        found.model.arm(steer, keep="summary")
    with found.model.monitor(BANK, keep="summary") as seen:
        with pytest.raises(PlanError, match='got beams under a monitor with keep="summary"'):
            found.model.generate_ids(PROMPTS, num_beams=2, **GREEDY)
        with pytest.raises(PlanError, match="got prompt_lookup_num_tokens while a plan is armed"):
            found.model.generate_ids(PROMPTS[:1], prompt_lookup_num_tokens=2, **GREEDY)
        with pytest.raises(HookError, match=r"monitor it with model.generate\(...\)"):
            found.model.hf.generate(PROMPTS[0][None], **GREEDY)
        with pytest.raises(HookError, match="got no forward to report yet"):
            seen["evil"]
        found.model.generate_ids(PROMPTS[:1], **GREEDY)


@contextmanager
def begun() -> Iterator[tuple[Summary, Reach, Call]]:
    """A summary of a call of two rows whose prompts were scored."""
    mask = torch.ones(2, 3, dtype=torch.bool)
    last = torch.full((2,), 2)
    call = Call(rows=torch.arange(2), n_chats=2, mask=mask, last=last, generating=True)
    reach, summary = Reach(call), Summary(call, last, 1)
    summary.score(0, torch.randn(2, 3, 4), torch.eye(4)[:1], 0)
    yield summary, reach, call


def test_a_loop_that_asks_its_criteria_too_late_is_refused() -> None:
    step = torch.ones(1, 1, 2, 1)
    with begun() as (summary, reach, call):
        with pytest.raises(HookError, match=r'got decode step 1 and no word .* use keep="all"'):
            summary.fold(step)
        reach.leave(call)
    with begun() as (summary, reach, _):
        reach.note(torch.tensor([True, False]))
        summary.fold(step)
        with pytest.raises(HookError, match=r"of .2, 2. tokens and summaries of .1, 2. steps"):
            summary.close(Outcome(rows=torch.zeros(2, 2).long(), lengths=torch.tensor([2, 2])))


def test_a_chat_without_a_token_has_no_figures() -> None:
    with begun() as (summary, _, call):
        call.mask[0] = False
        other = Summary(call, torch.tensor([-1, 2]), 1)
        other.score(0, torch.randn(2, 3, 4), torch.eye(4)[:1], 0)
    told = other.trait(0)
    assert told.count.tolist() == [0, 1]
    for one in ("last_prompt_token", "mean", "highest", "lowest"):
        assert getattr(told, one).isnan().tolist() == [[True, False]]
    assert summary.trait(0).count.tolist() == [1, 1]
