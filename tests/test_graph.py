"""The graph engine gives what the eager engine gives: tokens bit for bit, scores to rounding."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx

import pvcore as pv
from tests.subjects import Subject, fresh, prompts, subject, trio, worst

FAMILIES = ("qwen2", "llama", "gemma2", "gpt2")
GRAPH = pv.Graph(backend="eager")
GREEDY = {"max_new_tokens": 10, "do_sample": False}
# Sums over a static cache take its empty columns in, so scores differ by rounding.
SCORES = 1e-5
PROMPTS = prompts([4, 9, 6])
SITES = (pv.resid_post(0), pv.resid_pre(2))
EVIL, SYCOPHANCY, APATHY = trio(*SITES)
BANK = pv.VectorBank(trio(*(pv.resid_post(layer) for layer in range(3))))

KINDS: dict[str, Callable[[float], pv.Plan]] = {
    "add": lambda size: pv.Plan(pv.Add(EVIL, coeff=1.5 * size)),
    "ablate": lambda size: pv.Plan(pv.Ablate([SYCOPHANCY, APATHY][: 1 + (size > 0)])),
    "cap": lambda size: pv.Plan(pv.Cap([EVIL, APATHY], min=-0.1 * size, max=0.1)),
    "per-row": lambda size: pv.Plan(pv.Add(EVIL, coeff=[-size, 0.0, 2.0 * size])),
    "monitor": lambda size: pv.Plan(monitor=BANK),
    "both": lambda size: pv.Plan(
        pv.Add([EVIL, APATHY], coeff=[size, -size, 0.5 * size]),
        pv.Cap(SYCOPHANCY, max=[0.2, 0.1, 0.4]),
        pv.Ablate(APATHY, layers=[pv.resid_pre(2)]),
        pv.Add(EVIL, coeff=3.0, span="prompt"),
        monitor=BANK,
    ),
}


class Counting:
    """A backend that runs graphs as they are and counts them."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, module: fx.GraphModule, _inputs: Sequence[Tensor]) -> Callable[..., Any]:
        self.graphs += 1
        return module.forward


Answer = tuple[list[Tensor], dict[str, pv.TraitScores]]


def answer(found: Subject, plan: pv.Plan | None, engine: Any, **settings: Any) -> Answer:
    settings = {**GREEDY, **settings}
    if plan is None:
        return found.model.generate_ids(PROMPTS, engine=engine, **settings), {}
    with found.model.arm(plan) as seen:
        ids = found.model.generate_ids(PROMPTS, engine=engine, **settings)
    return ids, {trait: seen[trait] for trait in seen.traits}


def same_ids(got: Sequence[Tensor], wanted: Sequence[Tensor]) -> bool:
    return len(got) == len(wanted) and all(map(torch.equal, got, wanted))


def check(got: Answer, wanted: Answer) -> None:
    assert same_ids(got[0], wanted[0])
    assert got[1].keys() == wanted[1].keys()
    for trait, scores in wanted[1].items():
        bound = SCORES * float(scores.steps.nan_to_num().abs().max())
        for name in ("steps", "prompt", "last_prompt_token"):
            assert worst(getattr(got[1][trait], name), getattr(scores, name)) <= bound, name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_graph_engine_equals_the_eager_one(family: str, kind: str) -> None:
    found, plan = subject(family), KINDS[kind](1.0)
    wanted = answer(found, plan, "eager")
    check(answer(found, plan, GRAPH), wanted)
    base = answer(found, None, "eager")
    assert same_ids(wanted[0], base[0]) == (kind == "monitor")
    if plan.monitor:
        steps = wanted[1]["evil"].steps
        assert steps.shape == (10, 3, 3)
        assert float((steps[1:] - steps[:-1]).abs().min()) > 0


def armed_then_compiled(found: Subject, graph: pv.Graph, plan: pv.Plan, other: pv.Plan) -> None:
    check(answer(found, plan, graph), answer(found, plan, "eager"))


def compiled_then_armed(found: Subject, graph: pv.Graph, plan: pv.Plan, other: pv.Plan) -> None:
    check(answer(found, None, graph), answer(found, None, "eager"))
    check(answer(found, plan, graph), answer(found, plan, "eager"))


def switched(found: Subject, graph: pv.Graph, plan: pv.Plan, other: pv.Plan) -> None:
    for one in (plan, other, plan):
        check(answer(found, one, graph), answer(found, one, "eager"))


def disarmed(found: Subject, graph: pv.Graph, plan: pv.Plan, other: pv.Plan) -> None:
    for one in (plan, None, plan, None):
        check(answer(found, one, graph), answer(found, one, "eager"))


def zero_first(found: Subject, graph: pv.Graph, plan: pv.Plan, other: pv.Plan) -> None:
    zero = KINDS["add"](0.0)
    check(answer(found, zero, graph), answer(found, None, "eager"))
    check(answer(found, KINDS["add"](1.0), graph), answer(found, KINDS["add"](1.0), "eager"))


def engines_in_turn(found: Subject, graph: pv.Graph, plan: pv.Plan, other: pv.Plan) -> None:
    first = answer(found, plan, "eager")
    check(answer(found, plan, graph), first)
    again = answer(found, plan, "eager")
    assert same_ids(again[0], first[0])
    assert torch.equal(again[1]["evil"].steps, first[1]["evil"].steps)


ORDERS = (armed_then_compiled, compiled_then_armed, switched, disarmed, zero_first, engines_in_turn)
GRAPHS = (1, 2, 1, 2, 1, 1)


@pytest.mark.parametrize(("order", "graphs"), list(zip(ORDERS, GRAPHS, strict=True)))
@pytest.mark.parametrize("family", FAMILIES)
def test_no_order_of_arming_and_compiling_is_ignored(
    family: str, order: Callable[..., None], graphs: int
) -> None:
    found, counting = fresh(family), Counting()
    plan, other = KINDS["both"](1.0), KINDS["both"](-2.0)
    order(found, pv.Graph(backend=counting), plan, other)
    assert counting.graphs == graphs
    ids = [answer(found, one, "eager")[0] for one in (plan, other, None, KINDS["add"](1.0))]
    assert not any(same_ids(ids[a], ids[b]) for a in range(4) for b in range(a))
