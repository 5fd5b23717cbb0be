"""Conditions: an intervention acts on the rows and tokens that pass, as by raw hooks."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import pvcore as pv
from pvcore.errors import PlanError, VectorError
from tests.families import FAMILIES, N_LAYERS
from tests.oracle import MODES, Ask, Edit, Oracle, covers, padded
from tests.subjects import (
    Subject,
    fresh,
    point,
    prompts,
    raw,
    subject,
    trio,
    unit,
    vector,
    worst,
)
from tests.test_graph import GRAPH, Counting
from tests.test_steering_matrix import scores_of

NAMES = ("qwen2", "gemma2", "gpt2", "gpt_neox", "opt", "bloom")
LENGTHS = (13, 9, 11)
WIDTH, NEW = max(LENGTHS), 3
BOUND, VISIBLE = 1e-5, 1e-3
ACTIONS = ("add", "ablate", "cap")
SPANS = ("all", "prompt", "response", "last_prompt_token")
EARLY = pv.resid_post(0)
LATE = (pv.resid_pre(1), pv.resid_post(1), pv.resid_pre(2), pv.resid_post(2))
BANK = pv.VectorBank([vector("probe", [pv.resid_post(i) for i in range(N_LAYERS)], seed=11)])


@dataclass(frozen=True, kw_only=True)
class Case:
    """An action on two vectors where a third is beyond a threshold, read here or at `EARLY`."""

    action: str
    span: str
    site: pv.Site
    far: bool
    above: bool
    threshold: float

    @property
    def read_at(self) -> pv.Site:
        return EARLY if self.far else self.site

    def intervention(self) -> pv.Add | pv.Ablate | pv.Cap:
        one, two, asked = trio(EARLY, self.site)
        kind = pv.Above if self.above else pv.Below
        when = kind(asked, self.threshold, site=EARLY if self.far else None)
        aim: dict[str, Any] = {"layers": [self.site], "span": self.span, "when": when}
        if self.action == "add":
            return pv.Add([one, two], coeff=[1.5, -1.0, 2.0], **aim)
        if self.action == "ablate":
            return pv.Ablate([one, two], **aim)
        return pv.Cap([one, two], min=2.0, max=3.0, **aim)

    def edit(self, where: Tensor) -> Edit:
        one, two, asked = trio(EARLY, self.site)
        ask = Ask(
            point=point(self.read_at),
            vector=asked.direction(self.read_at),
            threshold=torch.full((3,), self.threshold),
            above=self.above,
        )
        return Edit(
            kind=self.action,  # type: ignore[arg-type]
            point=point(self.site),
            vectors=raw([one, two], self.site),
            where=where,
            coeff=torch.tensor([1.5, -1.0, 2.0]),
            lower=torch.full((3,), 2.0),
            upper=torch.full((3,), 3.0),
            when=(ask,),
        )


def cases(found: Subject, turn: int, residuals: Any, ending: Tensor) -> Iterator[Case]:
    """Each action; span, site, place and direction of the condition rotate.

    The threshold parts the rows' last prompt tokens, so that both sides come up in one batch.
    """
    for place, action in enumerate(ACTIONS):
        count = turn + 3 * place
        site, far = LATE[count % len(LATE)], bool(count % 2)
        read_at = EARLY if far else site
        asked = trio(EARLY, site)[2]
        scores, _ = (residuals[point(read_at)][ending].double() @ unit(asked, read_at)).sort()
        cut = float((scores[0] + scores[1]) / 2)
        assert float(scores[1] - scores[0]) > VISIBLE
        yield Case(
            action=action,
            span=SPANS[(turn + place) % len(SPANS)],
            site=site,
            far=far,
            above=bool((turn // 2 + place) % 2),
            threshold=cut,
        )


def parted(edit: Edit) -> bool:
    """Whether the condition let some of what it was asked about through, and some not."""
    answers = torch.cat(edit.when[0].answers)
    return bool(answers.any()) and not bool(answers.all())


@pytest.mark.parametrize("way", MODES)
@pytest.mark.parametrize("name", NAMES)
def test_a_conditional_generation_equals_the_oracle(name: str, way: str) -> None:
    found, rows = subject(name), prompts(LENGTHS)
    ids, mask = padded(rows, side="left")
    _, tape = found.oracle.forward(ids, mask)
    ending = (torch.arange(WIDTH) == WIDTH - 1).expand(3, WIDTH)
    base = found.oracle.generate(ids, mask, mode=way, max_new_tokens=NEW)
    settings: dict[str, Any] = {"do_sample": False, "max_new_tokens": NEW, **MODES[way]}
    turn = NAMES.index(name) + 2 * list(MODES).index(way)
    for case in cases(found, turn, tape.frames[0].residuals, ending):
        edit = case.edit(covers(case.span, LENGTHS, WIDTH, WIDTH + NEW))
        out = found.oracle.generate(ids, mask, [edit], mode=way, max_new_tokens=NEW)
        with found.model.arm(pv.Plan(case.intervention(), monitor=BANK)) as seen:
            tokens = found.model.generate_ids(rows, **settings)
        wanted = scores_of(out, BANK, "probe")
        assert [row.tolist() for row in tokens] == out.tokens.tolist(), case
        assert worst(seen["probe"].steps, wanted) < BOUND, case
        assert worst(wanted, scores_of(base, BANK, "probe")) > VISIBLE, case
        assert parted(edit), case


@pytest.mark.parametrize("name", NAMES)
def test_a_conditional_read_equals_the_oracle(name: str) -> None:
    """Every span, right-padded: each token is judged on its own."""
    found, rows = subject(name), prompts(LENGTHS)
    ids, mask = padded(rows, side="right")
    own, ends = mask.bool(), torch.tensor(LENGTHS)[:, None] - 1
    column = torch.arange(WIDTH)[None]
    _, tape = found.oracle.forward(ids, mask)
    plain = tape.frames[0].residuals
    for turn in range(4):
        for case in cases(found, turn, plain, column == ends):
            covered = {"all": own, "prompt": own}.get(case.span, column == ends)
            edit = case.edit(covered)
            wanted = found.oracle.forward(ids, mask, [edit])[1].frames[0].residuals
            with found.model.steer(case.intervention()):
                acts = found.model.read(rows, sites=found.sites, span="all", reduce="none")
            for site in found.sites:
                assert worst(acts[site][own], wanted[point(site)][own]) < BOUND, (case, site)
            moved = {p: worst(wanted[p][own], plain[p][own]) for p in plain}
            assert max(moved.values()) > VISIBLE, case
            assert parted(edit), case


def last_scores(found: Subject, asked: pv.PersonaVector, site: pv.Site) -> Tensor:
    acts = found.model.read(prompts(LENGTHS), sites=[site], span="last_prompt_token")
    return acts[site].double() @ unit(asked, site)


def test_a_condition_sees_what_the_steps_before_it_left() -> None:
    found, site = subject("qwen2"), pv.resid_post(1)
    one, two, _ = trio(site)
    highest = float(last_scores(found, one, site).max())
    push = pv.Add(one, coeff=3.0, span="last_prompt_token")
    guard = pv.Ablate(two, span="last_prompt_token", when=pv.Above(one, highest + 1.0))
    ends = {}
    for name, steps in {"after": (push, guard), "before": (guard, push), "push": (push,)}.items():
        with found.model.steer(*steps):
            ends[name] = last_scores(found, two, site)
    assert ends["after"].abs().max() < BOUND
    assert worst(ends["before"], ends["push"]) < BOUND
    assert ends["push"].abs().min() > VISIBLE


def test_a_threshold_may_differ_by_row_and_by_layer() -> None:
    found = subject("qwen2")
    sites = [pv.resid_post(0), pv.resid_post(1)]
    one, _, _ = trio(*sites)
    scores = [last_scores(found, one, site) for site in sites]
    eps = 0.01
    thresholds = {
        0: [float(scores[0][0]) - eps, float(scores[0][1]) + eps, float(scores[0][2]) - eps],
        1: 1e6,
    }
    add = pv.Add(one, coeff=1.0, span="last_prompt_token", when=pv.Above(one, thresholds))
    with found.model.steer(add):
        moved = [last_scores(found, one, site) for site in sites]
    norm = float(one.norms[0])
    assert worst(moved[0] - scores[0], torch.tensor([norm, 0.0, norm])) < BOUND
    assert abs(float(moved[1][1] - scores[1][1])) < BOUND
    two_rows = prompts([4, 5])
    with pytest.raises(PlanError, match=r"3 per-row .* batch of 2"), found.model.steer(add):
        found.model.read(two_rows, sites=[0], span="all")
    with pytest.raises(PlanError, match="per-row numbers for"):
        pv.Plan(pv.Add(one, coeff=[1.0, 2.0], when=pv.Below(one, [0.0, 1.0, 2.0])))


def test_several_conditions_must_all_hold() -> None:
    found, site = subject("qwen2"), pv.resid_post(1)
    one, two, _ = trio(site)
    scores = last_scores(found, one, site)
    low, middle, high = scores.sort().values.tolist()
    between = (pv.Above(one, (low + middle) / 2), pv.Below(one, (middle + high) / 2))
    with found.model.steer(pv.Ablate(two, span="last_prompt_token", when=between)):
        moved = last_scores(found, two, site)
    plain = last_scores(found, two, site)
    assert ((moved - plain).abs() < BOUND).tolist() == (scores != middle).tolist()
    assert float(moved[scores == middle].abs()) < BOUND


def test_plans_that_nest_keep_their_readings_apart() -> None:
    found, rows = subject("llama"), prompts(LENGTHS)
    site = pv.resid_post(2)
    one, two, three = trio(EARLY, site)
    cut = [float(last_scores(found, v, EARLY).median()) + 0.01 for v in (one, two)]
    outer = pv.Add(three, coeff=2.0, layers=[site], when=pv.Above(one, cut[0], site=EARLY))
    inner = pv.Add(three, coeff=-3.0, layers=[site], when=pv.Above(two, cut[1], site=EARLY))
    settings: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
    answers = {}
    for engine in ("eager", GRAPH):
        with found.model.steer(outer), found.model.arm(pv.Plan(inner, monitor=BANK)) as seen:
            answers[str(engine)] = found.model.generate_ids(rows, engine=engine, **settings)
        scores = seen["probe"].steps
        ids, mask = padded(rows, side="left")
        edits = [
            Edit(
                kind="add",
                point=point(site),
                vectors=raw([three], site),
                where=covers("response", LENGTHS, WIDTH, WIDTH + 4),
                coeff=torch.full((3,), coeff),
                when=(
                    Ask(
                        point=point(EARLY),
                        vector=asked.direction(EARLY),
                        threshold=torch.full((3,), cut[k]),
                    ),
                ),
            )
            for k, (coeff, asked) in enumerate(((2.0, one), (-3.0, two)))
        ]
        out = found.oracle.generate(ids, mask, edits, max_new_tokens=4)
        assert worst(scores, scores_of(out, BANK, "probe")) < BOUND
        assert all(parted(edit) for edit in edits)
        assert not torch.equal(*(torch.cat(edit.when[0].answers) for edit in edits))


@pytest.mark.parametrize("engine", ["eager", GRAPH], ids=["eager", "graph"])
def test_a_guard_sees_at_an_earlier_site_what_plans_armed_inside_did(engine: Any) -> None:
    found, rows = subject("llama"), prompts(LENGTHS)
    site = pv.resid_post(2)
    one, _, three = trio(EARLY, site)
    cut = float(last_scores(found, one, EARLY).max()) + 5.0
    push = pv.Add(one, coeff=20.0 / float(one.norms[0]), layers=[EARLY], span="response")
    guard = pv.Add(three, coeff=2.0, layers=[site], when=pv.Above(one, cut, site=EARLY))
    settings: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "engine": engine}
    where = covers("response", LENGTHS, WIDTH, WIDTH + 4)
    ask = Ask(point=point(EARLY), vector=one.direction(EARLY), threshold=torch.full((3,), cut))
    pushed = Edit(
        kind="add",
        point=point(EARLY),
        vectors=raw([one], EARLY),
        where=where,
        coeff=torch.full((3,), 20.0 / float(one.norms[0])),
    )
    guarded = Edit(
        kind="add",
        point=point(site),
        vectors=raw([three], site),
        where=where,
        coeff=torch.full((3,), 2.0),
        when=(ask,),
    )
    ids, mask = padded(rows, side="left")
    wanted, free, still = (
        scores_of(found.oracle.generate(ids, mask, edits, max_new_tokens=4), BANK, "probe")
        for edits in ([pushed, guarded], [pushed], [guarded])
    )
    assert min(worst(wanted, free), worst(wanted, still)) > VISIBLE
    for order in ((guard, push), (push, guard)):
        with (
            found.model.steer(order[0]),
            found.model.steer(order[1]),
            found.model.monitor(BANK) as seen,
        ):
            found.model.generate_ids(rows, **settings)
        assert worst(seen["probe"].steps, wanted) < BOUND


@pytest.mark.parametrize("name", ["qwen2", "gpt2"])
def test_the_graph_engine_acts_on_the_same_rows_and_compiles_once(name: str) -> None:
    found, counting, rows = fresh(name), Counting(), prompts(LENGTHS)
    engine = pv.Graph(backend=counting)
    site, settings = pv.resid_post(1), {"max_new_tokens": 8, "do_sample": False}
    tokens = []
    for turn in range(4):
        kind = (pv.Above, pv.Below)[turn % 2]
        one, two, three = (trio(EARLY, site)[(turn + k) % 3] for k in range(3))
        low, middle, _ = last_scores(found, one, EARLY).sort().values.tolist()
        here = float(last_scores(found, one, site).median()) + 0.01 * turn
        plan = pv.Plan(
            pv.Add(three, coeff=2.0, layers=[site], when=kind(one, (low + middle) / 2, site=EARLY)),
            pv.Ablate(two, layers=[site], when=[kind(one, here)]),
            pv.Cap(two, max=0.2, layers=[EARLY], when=kind(three, [0.1, -0.2, 0.1 * turn])),
            monitor=BANK,
        )
        answers = []
        for way in ("eager", engine):
            with found.model.arm(plan) as seen:
                ids = found.model.generate_ids(rows, engine=way, **settings)
            answers.append(([row.tolist() for row in ids], seen["probe"].steps))
        assert answers[0][0] == answers[1][0]
        assert worst(answers[0][1], answers[1][1]) < BOUND
        tokens.append(answers[0][0])
    assert counting.graphs == 1
    assert len({str(one) for one in tokens}) > 1


@pytest.mark.parametrize("reentrant", [None, False, True])
@pytest.mark.parametrize("far", [False, True])
def test_a_condition_is_a_constant_mask_for_autograd(far: bool, reentrant: bool | None) -> None:
    found, site = fresh("qwen2"), pv.resid_post(2)
    hf = found.model.hf
    if reentrant is not None:
        hf.train()
        enable = getattr(hf, "activation_checkpointing_enable", hf.gradient_checkpointing_enable)
        enable({"use_reentrant": reentrant})
        hf.enable_input_require_grads()
    one, two, asked = trio(EARLY, site)
    ids = prompts([12])[0]
    read_at = EARLY if far else site
    with torch.no_grad():
        _, tape = found.oracle.forward(ids[None])
    cut = float(
        (tape.frames[0].residuals[point(read_at)][0].double() @ unit(asked, read_at)).median()
    )
    cut += 0.003
    when = pv.Above(asked, cut, site=EARLY if far else None)
    ask = Ask(point=point(read_at), vector=asked.direction(read_at), threshold=torch.tensor([cut]))
    where = torch.ones(1, 12, dtype=torch.bool)
    aim: dict[str, Any] = {"point": point(site), "where": where, "when": (ask,)}
    edits = [
        Edit(kind="add", vectors=raw([one], site), coeff=torch.tensor([1.5]), **aim),
        Edit(kind="ablate", vectors=raw([two], site), **aim),
    ]
    plan = pv.Plan(
        pv.Add(one, coeff=1.5, layers=[site], span="all", when=when),
        pv.Ablate(two, layers=[site], span="all", when=when),
    )

    def gradients(model: Any) -> Tensor:
        model.zero_grad()
        logits = model(ids[None], use_cache=False).logits[0, :-1]
        torch.nn.functional.cross_entropy(logits, ids[1:]).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    with found.model.arm(plan):
        got = gradients(hf)
    plain = gradients(found.oracle.hf)
    with found.oracle.hooked(edits):
        wanted = gradients(found.oracle.hf)
    assert worst(got, wanted) < BOUND
    assert worst(plain, wanted) > VISIBLE
    assert parted(edits[0])


def test_prevention_may_be_conditional_under_a_schedule() -> None:
    hf = fresh("qwen2").model.hf.train()
    oracle, ids = Oracle(fresh("qwen2").model.hf.train(), FAMILIES["qwen2"]), prompts([9])[0]
    site = pv.resid_post(1)
    one = trio(site)[0]
    with torch.no_grad():
        _, tape = oracle.forward(ids[None])
    cut = float((tape.frames[0].residuals[point(site)][0].double() @ unit(one, site)).median())
    ask = Ask(point=point(site), vector=one.direction(site), threshold=torch.tensor([cut + 0.003]))
    where = torch.ones(1, 9, dtype=torch.bool)
    edit = Edit(
        kind="add",
        point=point(site),
        vectors=raw([one], site),
        where=where,
        coeff=torch.tensor([1.0]),
        when=(ask,),
    )
    add = pv.Add(one, coeff=2.0, when=pv.Above(one, cut + 0.003))
    with pv.prevent(hf, add, schedule="linear") as prevention:
        prevention.advance(0.5)
        got = hf(ids[None]).logits
    with oracle.hooked([edit]):
        wanted = oracle.hf(ids[None]).logits
    assert worst(got.detach(), wanted.detach()) < BOUND
    assert worst(oracle.hf(ids[None]).logits.detach(), wanted.detach()) > VISIBLE
    assert parted(edit)


def test_padding_stays_what_it_is_where_the_condition_holds() -> None:
    found = fresh("qwen2")
    ids, mask = padded(prompts(LENGTHS), side="left")
    site = pv.resid_post(0)
    one, two, _ = trio(site)
    reached: list[Tensor] = []
    found.model.hf.model.layers[1].register_forward_pre_hook(
        lambda _, args: reached.append(args[0].detach().clone())
    )
    with torch.no_grad():
        found.model.hf(ids, attention_mask=mask)
        with found.model.steer(pv.Ablate(one, when=pv.Below(two, 1e9))):
            found.model.hf(ids, attention_mask=mask)
        with found.model.steer(pv.Ablate(one, when=pv.Above(two, 1e9))):
            found.model.hf(ids, attention_mask=mask)
    pads = mask == 0
    assert torch.equal(reached[0][pads], reached[1][pads])
    assert (reached[1] - reached[0])[~pads].abs().amax(-1).min() > BOUND
    assert torch.equal(reached[0], reached[2])


def full_plan() -> pv.Plan:
    sites = [pv.resid_post(layer) for layer in range(3)]
    evil, humor, calm = (vector(t, sites, seed=s) for s, t in enumerate(("evil", "humor", "calm")))
    return pv.Plan(
        pv.Add(evil, coeff=1.0, layers=[1, 2], when=pv.Above(humor, {1: 0.5, 2: [1.0, 2.0]})),
        pv.Cap(evil, max=3.0, layers=[2], when=[pv.Below(calm, -1.0, site=0), pv.Above(evil, 0)]),
        pv.Ablate(humor, layers=[0]),
    )


def test_plans_with_conditions_are_saved_and_loaded(tmp_path) -> None:
    plan = full_plan()
    plan.save(tmp_path / "guard.json")
    assert pv.Plan.load(tmp_path / "guard.json") == plan
    document = json.loads((tmp_path / "guard.json").read_text())
    assert document["format"] == 2
    assert len(document["vectors"]) == 3
    assert document["interventions"][1]["when"][0]["site"] == "resid_post.0"
    pv.Plan(plan.interventions[2]).save(tmp_path / "plain.json")
    plain = json.loads((tmp_path / "plain.json").read_text())
    assert plain["format"] == 1
    assert "when" not in plain["interventions"][0]
    for change in ({"kind": "near"}, {"site": "resid_post.9"}, {"vector": "nobody"}):
        document["interventions"][1]["when"][0] |= change
        (tmp_path / "bad.json").write_text(json.dumps(document))
        with pytest.raises(pv.PvcoreError):
            pv.Plan.load(tmp_path / "bad.json")


def test_conditions_that_cannot_be_known_are_refused() -> None:
    one, two, _ = trio(pv.resid_post(0), pv.resid_post(1))
    with pytest.raises(PlanError, match=r"at resid_post.1 .* at resid_post.0, which comes first"):
        pv.Add(one, coeff=1.0, layers=[0, 1], when=pv.Above(two, 1.0, site=1))
    with pytest.raises(VectorError, match=r"resid_post.2"):
        pv.Add(vector("x", [pv.resid_post(2)], seed=1), coeff=1.0, when=pv.Above(one, 1.0))
    with pytest.raises(PlanError, match="threshold for layers \\[0\\]"):
        pv.Add(one, coeff=1.0, when=pv.Above(one, {0: 1.0}))
    with pytest.raises(PlanError, match="by layer for a condition read at one site"):
        pv.Above(one, {0: 1.0}, site=0)
    with pytest.raises(PlanError, match="got nan in threshold"):
        pv.Above(one, float("nan"))
    narrow = pv.PersonaVector(
        trait="narrow", sites=[pv.resid_post(1)], directions=torch.ones(1, 3), model_id=""
    )
    model = subject("qwen2").model
    add = pv.Add(one, coeff=1.0, layers=[1], when=pv.Above(narrow, 0.0))
    with pytest.raises(PlanError, match="of width 3"), model.steer(add):
        pass
