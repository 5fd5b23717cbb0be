"""Steering: order of steps, nesting, numbers per row and layer, and what must stay untouched."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import pvcore as pv
from tests.families import FAMILIES, N_LAYERS, build
from tests.oracle import Edit, covers, padded
from tests.subjects import (
    NAMES,
    Subject,
    encoded,
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

LENGTHS = (13, 9, 11)
WIDTH, NEW = max(LENGTHS), 4
BOUND, VISIBLE = 1e-5, 1e-3
SEQUENTIAL = [name for name in NAMES if FAMILIES[name].attention]


def everywhere(rows: int = 3) -> Tensor:
    return torch.ones(rows, WIDTH + NEW, dtype=torch.bool)


def edit(kind: Any, vectors: Sequence[pv.PersonaVector], site: pv.Site, **amounts: Any) -> Edit:
    where = amounts.pop("where", everywhere())
    filled = {name: torch.as_tensor(v).expand(len(where)) for name, v in amounts.items()}
    return Edit(kind=kind, point=point(site), vectors=raw(vectors, site), where=where, **filled)


def residuals(found: Subject, rows: Sequence[Tensor]) -> Tensor:
    acts = found.model.read(rows, sites=found.sites, span="all", reduce="none")
    assert acts.values is not None
    return acts.values


def reference(found: Subject, rows: Sequence[Tensor], edits: Sequence[Edit] = ()) -> Tensor:
    """The oracle's residuals `[site, row, pos, d_model]` of right-padded rows, NaN on padding."""
    ids, mask = padded(rows, side="right")
    _, tape = found.oracle.forward(ids, mask, edits)
    every = torch.stack([tape.frames[0].residuals[point(site)] for site in found.sites])
    return every.masked_fill(~mask.bool()[..., None], torch.nan)


@pytest.mark.parametrize("name", NAMES)
def test_steps_of_a_plan_act_in_the_order_given(name: str) -> None:
    found, rows = subject(name), prompts(LENGTHS)
    site = found.sites[-1]
    one, two, three = trio(site)
    steps = {
        "add": (pv.Add([one, two], coeff=0.7), edit("add", [one, two], site, coeff=0.7)),
        "ablate": (pv.Ablate([two, three]), edit("ablate", [two, three], site)),
        "cap": (pv.Cap(one, max=-0.3), edit("cap", [one], site, upper=-0.3)),
    }
    ends = []
    for order in (["add", "ablate", "cap"], ["cap", "add", "ablate"], ["ablate", "cap", "add"]):
        with found.model.steer(*(steps[step][0] for step in order)):
            got = residuals(found, rows)
        wanted = reference(found, rows, [steps[step][1] for step in order])
        assert worst(got, wanted) < BOUND, order
        ends.append(wanted)
    base = reference(found, rows)
    for index, end in enumerate(ends):
        assert worst(end, base) > VISIBLE
        assert worst(end, ends[index - 1]) > VISIBLE


@pytest.mark.parametrize("name", NAMES)
def test_one_plan_steers_many_sites_and_spans(name: str) -> None:
    """All sites at once, `resid_post.l` before `resid_pre.l+1`, each with another span."""
    found = subject(name)
    spans = ("all", "response", "prompt", "last_prompt_token")
    interventions: list[Any] = []
    drafts = []
    for turn, site in enumerate(found.sites):
        vectors, span = trio(site), spans[turn % 4]
        made = (
            pv.Add(vectors[0], coeff=0.3 * (turn + 1), span=span),
            pv.Ablate(vectors[1:], span=span),
            pv.Cap(vectors[:2], min=-0.2, max=0.2, span=span),
        )
        interventions.append(made[turn % 3])
        drafts.append((turn, site, vectors, span))
    chats = [ids for ids, _ in encoded()]
    with found.model.steer(*interventions):
        tokens = found.model.generate_ids(chats, do_sample=False, max_new_tokens=NEW)
    lengths = [len(ids) for ids in chats]
    ids, mask = padded(chats, side="left")
    edits = []
    for turn, site, vectors, span in drafts:
        where = covers(span, lengths, max(lengths), max(lengths) + NEW)
        edits.append(
            (
                edit("add", vectors[:1], site, coeff=0.3 * (turn + 1), where=where),
                edit("ablate", vectors[1:], site, where=where),
                edit("cap", vectors[:2], site, lower=-0.2, upper=0.2, where=where),
            )[turn % 3]
        )
    wanted = found.oracle.generate(ids, mask, edits, max_new_tokens=NEW).tokens
    base = found.oracle.generate(ids, mask, max_new_tokens=NEW).tokens
    assert [row.tolist() for row in tokens] == wanted.tolist() != base.tolist()


@pytest.mark.parametrize("name", NAMES)
def test_ablation_is_joint(name: str) -> None:
    """All three projections land on zero; one vector after another leaves the first ones off."""
    found, rows = subject(name), prompts(LENGTHS)
    site = found.sites[1]
    vectors = trio(site)
    at = found.sites.index(site)
    with found.model.steer(pv.Ablate(vectors)):
        joint = residuals(found, rows)
    with found.model.steer(*(pv.Ablate(one) for one in vectors)):
        single = residuals(found, rows)
    assert worst(joint, reference(found, rows, [edit("ablate", vectors, site)])) < BOUND
    one_by_one = [edit("ablate", [one], site) for one in vectors]
    assert worst(single, reference(found, rows, one_by_one)) < BOUND
    units = torch.stack([unit(one, site) for one in vectors])
    left = (joint[at].double() @ units.T).nan_to_num().abs().amax((0, 1))
    left_singly = (single[at].double() @ units.T).nan_to_num().abs().amax((0, 1))
    assert left.max() < BOUND
    assert left_singly[:2].min() > 0.01


@pytest.mark.parametrize("name", NAMES)
def test_a_cap_moves_only_the_rows_beyond_it(name: str) -> None:
    found, rows = subject(name), prompts(LENGTHS)
    site = found.sites[-1]
    one = trio(site)[0]
    base = residuals(found, rows)[-1]
    scores = base.double() @ unit(one, site)
    bound = float(scores[~scores.isnan()].median()) + 1e-3
    with found.model.steer(pv.Cap(one, max=bound)):
        capped = residuals(found, rows)[-1]
    over = scores > bound
    kept = ~over & ~scores.isnan()
    assert torch.equal(capped[kept], base[kept])
    after = capped.double() @ unit(one, site)
    assert (after[over] - bound).abs().max() < BOUND
    assert over.sum() > 5
    assert kept.sum() > 5
    assert (capped[over] - base[over]).abs().amax(-1).min() > 0


@pytest.mark.parametrize("name", NAMES)
def test_rows_have_their_own_numbers_and_zero_is_nothing(name: str) -> None:
    found, rows = subject(name), prompts((9, 9, 9))
    site = found.sites[0]
    vectors = trio(site)[:2]
    base = residuals(found, rows)
    with found.model.steer(pv.Add(vectors, coeff=torch.tensor([0.8, 0.0, -0.6]))):
        mixed = residuals(found, rows)
    # Experts sum in an order that depends on what the other rows were routed to.
    same = torch.equal if name != "mixtral" else lambda a, b: worst(a, b) < BOUND
    assert same(mixed[:, 1], base[:, 1])
    for row, coeff in ((0, 0.8), (2, -0.6)):
        with found.model.steer(pv.Add(vectors, coeff=coeff)):
            alone = residuals(found, rows)
        assert same(mixed[:, row], alone[:, row])
        assert worst(mixed[:, row], base[:, row]) > VISIBLE
    with found.model.steer(pv.Cap(vectors[0], min=[5.0, -99.0, 7.0], max=[99.0, 99.0, 7.0])):
        held = residuals(found, rows)[0].double() @ unit(vectors[0], site)
    assert (held[0] >= 5.0 - BOUND).all()
    assert (held[2] - 7.0).abs().max() < BOUND
    assert worst(held[1], base[0, 1].double() @ unit(vectors[0], site)) < 1e-15


def test_numbers_per_row_follow_the_chats_through_length_buckets() -> None:
    """`read` sorts chats by length into batches; each must keep its own coefficient."""
    found, rows = subject("qwen2"), prompts((13, 5, 11, 7, 3))
    site = pv.resid_post(0)
    one = trio(site)[0]
    coeffs = [0.5, -1.0, 2.0, 0.0, -0.25]
    with found.model.steer(pv.Add(one, coeff=coeffs)):
        acts = found.model.read(rows, sites=found.sites, span="all", reduce="last", batch_size=2)
    for index, row in enumerate(rows):
        with found.model.steer(pv.Add(one, coeff=coeffs[index])):
            alone = found.model.read([row], sites=found.sites, span="all", reduce="last")
        assert worst(acts.values[:, index], alone.values[:, 0]) < BOUND
    assert worst(acts.values[:, 0], acts.values[:, 2]) > VISIBLE


@pytest.mark.parametrize("name", NAMES)
def test_numbers_may_differ_by_layer(name: str) -> None:
    found, rows = subject(name), prompts(LENGTHS)
    sites = [pv.resid_post(layer) for layer in range(N_LAYERS)]
    one = trio(*sites)[0]
    coeff: dict[int, Any] = {0: 0.5, 1: [0.0, 1.0, -1.0], 2: torch.tensor([0.2, 0.3, 0.4])}
    with found.model.steer(pv.Add(one, coeff=coeff)):
        got = residuals(found, rows)
    edits = [edit("add", [one], site, coeff=coeff[site.layer]) for site in sites]
    assert worst(got, reference(found, rows, edits)) < BOUND
    flat = [edit("add", [one], site, coeff=0.5) for site in sites]
    assert worst(got, reference(found, rows, flat)) > VISIBLE


@pytest.mark.parametrize("name", NAMES)
def test_plans_nest_and_leaving_restores_the_outer_exactly(name: str) -> None:
    found, rows = subject(name), prompts(LENGTHS)
    site = pv.resid_post(1)
    one, two, _ = trio(site)
    outer, inner = pv.Add(one, coeff=2.0), pv.Cap([one, two], max=0.1)
    both = [edit("add", [one], site, coeff=2.0), edit("cap", [one, two], site, upper=0.1)]
    base = residuals(found, rows)
    with found.model.steer(outer):
        before = residuals(found, rows)
        with found.model.steer(inner):
            nested = residuals(found, rows)
        after = residuals(found, rows)
    with found.model.steer(inner), found.model.steer(outer):
        swapped = residuals(found, rows)
    assert torch.equal(before.nan_to_num(), after.nan_to_num())
    assert torch.equal(base.nan_to_num(), residuals(found, rows).nan_to_num())
    assert worst(before, reference(found, rows, both[:1])) < BOUND
    assert worst(nested, reference(found, rows, both)) < BOUND
    assert worst(swapped, reference(found, rows, both[::-1])) < BOUND
    assert worst(nested, swapped) > VISIBLE
    assert worst(nested, before) > VISIBLE


def test_an_outer_monitor_reports_what_flows_on_after_an_inner_plan() -> None:
    found, rows = subject("llama"), prompts(LENGTHS)
    site = pv.resid_post(1)
    one = trio(site)[0]
    ablation = found.model.steer(pv.Ablate(one, span="all"))
    with found.model.monitor(pv.VectorBank([one])) as seen, ablation:
        found.model.generate_ids(rows, do_sample=False, max_new_tokens=NEW)
    assert seen["evil"].steps.abs().max() < BOUND
    with found.model.steer(pv.Ablate(one)):
        acts = found.model.read(rows, sites=[site], span="all", reduce="last", before=True)
    earlier = acts[site].double() @ unit(one, site)
    assert worst(earlier, residuals_last(found, rows, site) @ unit(one, site)) < BOUND
    assert earlier.abs().max() > VISIBLE


def residuals_last(found: Subject, rows: Sequence[Tensor], site: pv.Site) -> Tensor:
    lasts = [found.oracle.forward(row[None])[1].frames[0].residuals[point(site)] for row in rows]
    return torch.cat([h[:, -1] for h in lasts]).double()


SEARCHES: dict[str, dict[str, Any]] = {
    "beams": {"num_beams": 3},
    "two beams returned": {"num_beams": 3, "num_return_sequences": 2},
    "samples": {"do_sample": True, "num_return_sequences": 3},
    "sampled beams": {"do_sample": True, "num_beams": 2, "num_return_sequences": 2},
}


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("name", NAMES)
def test_rows_keep_their_numbers_through_searches(name: str, search: str) -> None:
    """One coefficient a chat, however many rows generate() makes of it; so do the steps seen."""
    found, rows = subject(name), prompts(LENGTHS)
    site = pv.resid_post(1)
    one = trio(site)[0]
    coeff = [2.0, 0.0, -2.0]
    settings = {"do_sample": False, "max_new_tokens": NEW, **SEARCHES[search]}
    probe = vector("probe", [pv.resid_post(2)], seed=3)
    plan = pv.Plan(pv.Add(one, coeff=coeff), monitor=pv.VectorBank([probe]))
    torch.manual_seed(5)
    with found.model.arm(plan) as seen:
        tokens = found.model.generate_ids(rows, **settings)
    where = covers("response", LENGTHS, WIDTH, WIDTH + NEW)
    ids, mask = padded(rows, side="left")
    steps = [edit("add", [one], site, coeff=torch.tensor(coeff), where=where)]
    torch.manual_seed(5)
    out = found.oracle.generate(ids, mask, steps, **settings)
    torch.manual_seed(5)
    base = found.oracle.generate(ids, mask, **settings)
    assert [row.tolist() for row in tokens] == out.tokens.tolist() != base.tokens.tolist()
    per_chat = len(out.tokens) // 3
    assert (
        out.tokens[per_chat : 2 * per_chat].tolist()
        == base.tokens.tolist()[per_chat : 2 * per_chat]
        or settings["do_sample"]
    )
    direction = unit(probe, pv.resid_post(2))
    for step in range(NEW):
        h = out.tape.step(("resid_post", 2), WIDTH, step)[out.rows[:, step]].double()
        assert worst(seen["probe"].steps[step, 0], h @ direction) < BOUND
    first = seen["probe"].last_prompt_token[0]
    assert torch.equal(first, seen["probe"].steps[0, 0])


@pytest.mark.parametrize("name", NAMES)
def test_sequences_that_end_early_are_cut_and_their_steps_are_nan_after_it(name: str) -> None:
    found, rows = subject(name), prompts(LENGTHS)
    base = found.oracle.generate(*padded(rows, side="left"), max_new_tokens=6).tokens
    end = int(base[0, 2])
    lengths = [next((t + 1 for t in range(6) if row[t] == end), 6) for row in base.tolist()]
    probe = vector("probe", [pv.resid_post(2)], seed=3)
    with found.model.monitor(pv.VectorBank([probe])) as seen:
        tokens = found.model.generate_ids(rows, do_sample=False, max_new_tokens=6, eos_token_id=end)
    assert lengths[0] <= 3
    for row, length in enumerate(lengths):
        assert tokens[row].tolist()[:length][: len(tokens[row])] == tokens[row].tolist()
        assert len(tokens[row]) in (length, length - 1)
        steps = seen["probe"].steps[:, 0, row]
        assert not steps[:length].isnan().any()
        assert steps[length:].isnan().all()


@contextmanager
def inputs_of(module: torch.nn.Module) -> Iterator[list[Tensor]]:
    """What reaches a module, seen by a hook of the test's own."""
    reached: list[Tensor] = []
    handle = module.register_forward_pre_hook(
        lambda _, args: reached.append(args[0].detach().clone())
    )
    yield reached
    handle.remove()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", NAMES)
def test_padding_is_never_touched(name: str, side: str) -> None:
    found = fresh(name)
    ids, mask = padded(prompts(LENGTHS), side=side)
    site = pv.resid_post(0)
    vectors = trio(site)
    block = found.model.hf.get_submodule(FAMILIES[name].blocks)[1]
    with inputs_of(block) as reached, torch.no_grad():
        found.model.hf(ids, attention_mask=mask)
        for step in (pv.Add(vectors, coeff=3.0), pv.Ablate(vectors), pv.Cap(vectors, max=-9.0)):
            with found.model.steer(step):
                found.model.hf(ids, attention_mask=mask)
    base, pads = reached[0], mask == 0
    for after in reached[1:]:
        assert torch.equal(after[pads], base[pads])
        assert (after[~pads] - base[~pads]).abs().amax(-1).min() > VISIBLE
    assert pads.sum() == 6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", ["qwen2", "gpt2", "gemma2", "opt"])
def test_the_sum_is_rounded_once_to_the_models_dtype(name: str, dtype: torch.dtype) -> None:
    model = pv.HookedModel(build(name, dtype=dtype))
    site, row = pv.resid_post(1), prompts([9])[0]
    one = trio(site)[0]
    with inputs_of(model.hf.get_submodule(FAMILIES[name].blocks)[2]) as reached, torch.no_grad():
        model.hf(row[None])
        with model.steer(pv.Add(one, coeff=1.25)):
            model.hf(row[None])
    base, after = reached
    exact = base.double() + 1.25 * one.direction(site).double()
    assert after.dtype == dtype
    assert torch.equal(after, exact.to(dtype))
    assert (after - base).abs().max() > VISIBLE
    twice = base + (1.25 * one.direction(site).to(dtype))
    assert dtype == torch.float64 or not torch.equal(after, twice)
