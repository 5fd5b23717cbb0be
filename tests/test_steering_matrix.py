"""Steering: every family, intervention, span and way to run, against rewritten layer inputs.

Bounds are absolute and per element: residuals, logits and projections are of order one to ten in
all families. Greedy tokens must be identical. Every combination also moves the model visibly.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import pvcore as pv
from tests.families import FAMILIES, N_LAYERS
from tests.oracle import MODES, Edit, Generated, Point, covers, padded
from tests.subjects import (
    NAMES,
    Subject,
    conversations,
    encoded,
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
WIDTH, NEW = max(LENGTHS), 3
BOUND, VISIBLE = 1e-5, 1e-3
ACTIONS = ("add", "ablate", "cap")
SPANS = ("all", "prompt", "response", "last_prompt_token")
WAYS = ("read", "raw", *MODES)
COEFFS = (1.5, 0.0, -1.5)

Combination = tuple[str, str, str, str]


def combinations(name: str, way: str) -> Iterator[Combination]:
    """(family, action, span, way): all spans in a forward, in generation some of them in turn."""
    stride = {"read": 1, "raw": 1, "cached": 2}.get(way, len(SPANS))
    for action in ACTIONS:
        for span in SPANS:
            turn = NAMES.index(name) + WAYS.index(way) + ACTIONS.index(action) + SPANS.index(span)
            if turn % stride == 0:
                yield name, action, span, way


def test_the_matrix_is_as_large_as_promised() -> None:
    every = {c for name in NAMES for way in WAYS for c in combinations(name, way)}
    assert len(NAMES) >= 12
    assert len(every) == len(NAMES) * 3 * (4 + 4 + 2 + 4) >= 400
    assert {c[1:] for c in every} == {(a, s, w) for a in ACTIONS for s in SPANS for w in WAYS}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One combination: raw vectors at one site, and amounts for three rows."""

    action: str
    site: pv.Site
    vectors: tuple[pv.PersonaVector, ...]
    low: float
    high: float
    span: str

    def intervention(self) -> pv.Add | pv.Ablate | pv.Cap:
        aim: dict[str, Any] = {"layers": [self.site], "span": self.span}
        if self.action == "add":
            return pv.Add(self.vectors, coeff=list(COEFFS), **aim)
        if self.action == "ablate":
            return pv.Ablate(self.vectors, **aim)
        return pv.Cap(self.vectors, min=self.low, max=self.high, **aim)

    def edit(self, where: Tensor) -> Edit:
        rows = len(where)
        return Edit(
            kind=self.action,  # type: ignore[arg-type]
            point=point(self.site),
            vectors=raw(self.vectors, self.site),
            where=where,
            coeff=torch.tensor(COEFFS),
            lower=torch.full((rows,), self.low),
            upper=torch.full((rows,), self.high),
        )


def test_the_vectors_are_neither_orthogonal_nor_of_one_length() -> None:
    one, two, three = trio(pv.resid_post(1))
    cosines = [float(a.cosine(b)[0]) for a, b in ((one, two), (one, three), (two, three))]
    assert all(0.1 < cosine < 0.8 for cosine in cosines)
    assert float(three.norms[0]) > 2 * float(two.norms[0]) > 0.1


def site_of(found: Subject, combination: Combination) -> pv.Site:
    """The site rotates with the parts of a combination, in strides that reach all of them."""
    name, action, span, way = combination
    turn = NAMES.index(name) + 3 * ACTIONS.index(action) + 5 * SPANS.index(span) + WAYS.index(way)
    # Prompts of conversations end alike: only deep sites have rows that a bound can part.
    sites = found.sites[-3:] if (action, way) == ("cap", "read") else found.sites
    return sites[turn % len(sites)]


def case(found: Subject, combination: Combination, last: dict[Any, Tensor]) -> Case:
    """The combination's case; the site rotates, the bounds lie between the rows' projections."""
    _, action, span, _ = combination
    site = site_of(found, combination)
    vectors = trio(site)[: {"add": 2, "ablate": 3, "cap": 2}[action]]
    scores, _ = (last[point(site)].double() @ unit(vectors[0], site)).sort()
    low, high = (float((scores[i] + scores[i + 1]) / 2) for i in (0, 1))
    assert action != "cap" or scores[0] + VISIBLE < low < scores[1] < high < scores[2] - VISIBLE
    return Case(action=action, site=site, vectors=tuple(vectors), low=low, high=high, span=span)


def columns(span: str, ends: Tensor, width: int) -> Tensor:
    """What an intervention's span covers in conversations whose prompts end at columns `ends`."""
    column, last = torch.arange(width)[None], ends[:, None]
    return {
        "all": column >= 0,
        "prompt": column <= last,
        "response": column >= last,
        "last_prompt_token": column == last,
    }[span]


@pytest.mark.parametrize("name", NAMES)
def test_a_steered_read_equals_the_oracle(name: str) -> None:
    """Every site of every token, downstream of the intervention and upstream."""
    found = subject(name)
    ids, mask = padded([whole for whole, _ in encoded()], side="right")
    own, ends = mask.bool(), torch.tensor([prompt - 1 for _, prompt in encoded()])
    base = found.oracle.forward(ids, mask)[1].frames[0].residuals
    last = {p: h[torch.arange(3), ends] for p, h in base.items()}
    wrong, checked = [], set()
    for combination in combinations(name, "read"):
        now = case(found, combination, last)
        with found.model.steer(now.intervention()):
            acts = found.model.read(conversations(), sites=found.sites, span="all", reduce="none")
        edit = now.edit(own & columns(now.span, ends, ids.shape[1]))
        wanted = found.oracle.forward(ids, mask, [edit])[1].frames[0].residuals
        for site in found.sites:
            # Rounding grows with what is rounded: gemma2's residuals reach ten, others about one.
            largest = max(1.0, float(wanted[point(site)][own].abs().max()))
            error = worst(acts[site][own], wanted[point(site)][own]) / largest
            if error >= BOUND or not acts[site][~own].isnan().all():
                wrong.append((*combination, str(now.site), str(site), error))
        checked.add(combination)
        moved = max(worst(wanted[p][own], base[p][own]) for p in base)
        if moved <= VISIBLE:
            wrong.append((*combination, "vacuous", moved))
    assert not wrong
    assert checked == set(combinations(name, "read"))


@pytest.mark.parametrize("name", NAMES)
def test_a_steered_plain_forward_equals_the_oracle(name: str) -> None:
    """`hf(...)` called by hand: the whole row is a prompt, its last own token ends it."""
    found = subject(name)
    wrong, checked = [], set()
    for turn, combination in enumerate(combinations(name, "raw")):
        side = ("left", "right")[(turn + turn // 4) % 2]
        ids, mask, base, ending = unsteered(found, side)
        last = {p: h[ending] for p, h in base[1].items()}
        now, own = case(found, combination, last), mask.bool()
        where = own if now.span in ("all", "prompt") else ending
        wanted, _ = found.oracle.forward(ids, mask, [now.edit(where)])
        inputs = {"attention_mask": mask}
        if FAMILIES[name].takes_positions:
            inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
        with torch.no_grad(), found.model.steer(now.intervention()):
            got = found.model.hf(ids, **inputs).logits
        checked.add(combination)
        if (error := worst(got[own], wanted[own])) >= BOUND:
            wrong.append((*combination, side, str(now.site), error))
        if (moved := worst(wanted[own], base[0][own])) <= VISIBLE:
            wrong.append((*combination, side, "vacuous", moved))
    assert not wrong
    assert checked == set(combinations(name, "raw"))


@cache
def unsteered(
    found: Subject, side: str
) -> tuple[Tensor, Tensor, tuple[Tensor, dict[Point, Tensor]], Tensor]:
    """Ids and mask of the prompts, their logits and residuals, and where each row ends."""
    ids, mask = padded(prompts(LENGTHS), side=side)
    ends = torch.full((3,), WIDTH) if side == "left" else torch.tensor(LENGTHS)
    logits, tape = found.oracle.forward(ids, mask)
    ending = torch.arange(WIDTH)[None] == ends[:, None] - 1
    return ids, mask, (logits, tape.frames[0].residuals), ending


ALL_POSTS = tuple(pv.resid_post(layer) for layer in range(N_LAYERS))


def scores_of(out: Generated, bank: pv.VectorBank, trait: str) -> Tensor:
    """Float64 projections `[step, site, row]` of the oracle's own run."""
    every = []
    for step in range(out.tokens.shape[1]):
        row = []
        for site in bank.sites:
            h = out.tape.step(point(site), WIDTH, step)[out.rows[:, step]].double()
            row.append(h @ unit(bank[trait], site))
        every.append(torch.stack(row))
    return torch.stack(every)


@pytest.mark.parametrize("way", MODES)
@pytest.mark.parametrize("name", NAMES)
def test_a_steered_generation_equals_the_oracle(name: str, way: str) -> None:
    """Tokens are identical; so are, within the bound, the projections at every block."""
    found = subject(name)
    rows = prompts(LENGTHS)
    ids, mask, (_, residuals), ending = unsteered(found, "left")
    bank = pv.VectorBank([vector("probe", ALL_POSTS, seed=11)])
    base = found.oracle.generate(ids, mask, mode=way, max_new_tokens=NEW)
    last = {p: h[ending] for p, h in residuals.items()}
    settings: dict[str, Any] = {"do_sample": False, "max_new_tokens": NEW, **MODES[way]}
    wrong, checked, other_tokens = [], set(), 0
    for combination in combinations(name, way):
        now = case(found, combination, last)
        edit = now.edit(covers(now.span, LENGTHS, WIDTH, WIDTH + NEW))
        out = found.oracle.generate(ids, mask, [edit], mode=way, max_new_tokens=NEW)
        with found.model.arm(pv.Plan(now.intervention(), monitor=bank)) as seen:
            tokens = found.model.generate_ids(rows, **settings)
        checked.add(combination)
        wanted = scores_of(out, bank, "probe")
        error = worst(seen["probe"].steps, wanted)
        if [row.tolist() for row in tokens] != out.tokens.tolist() or error >= BOUND:
            wrong.append((*combination, str(now.site), error))
        if (moved := worst(wanted, scores_of(base, bank, "probe"))) <= VISIBLE:
            wrong.append((*combination, "vacuous", moved))
        other_tokens += out.tokens.tolist() != base.tokens.tolist()
    assert not wrong
    assert checked == set(combinations(name, way))
    assert other_tokens > 0


def test_every_kind_of_site_is_steered_by_every_action() -> None:
    sites = {
        (combination[1], site_of(subject(name), combination).kind)
        for name in NAMES
        for way in WAYS
        for combination in combinations(name, way)
    }
    kinds = ("resid_pre", "resid_mid", "resid_post")
    assert sites == {(action, kind) for action in ACTIONS for kind in kinds}
