"""Threads on one shared model: every request gets the bits it would get alone."""

import asyncio
import random
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jaxtyping
import pytest
import torch
from torch import Tensor

import pvcore as pv
from tests.families import N_LAYERS
from tests.subjects import Subject, fresh, prompts, trio, vector, worst

THREADS, REQUESTS = 16, 50
KINDS = ("forward", "read", "forward", "idle", "read", "generate", "forward", "read", "stream")
PROBE = vector("probe", [pv.resid_post(layer) for layer in range(N_LAYERS)], seed=3)


@pytest.fixture(autouse=True)
def _hurried(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Switch threads every ten microseconds, inside pvcore and not in the tests' type checker."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    usual = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(usual)


@dataclass(frozen=True, kw_only=True)
class Request:
    """One user's request: what to run, on what, and steered how."""

    kind: str
    ids: Tensor
    site: pv.Site
    coeff: float
    cap: float

    def interventions(self) -> list[Any]:
        one, two, three = trio(self.site)
        return [pv.Add([one, two], coeff=self.coeff, span="all"), pv.Cap(three, max=self.cap)]

    def run(self, model: pv.HookedModel) -> Tensor:
        if self.kind == "idle":
            return self.answer(model)
        with model.steer(*self.interventions()):
            return self.answer(model)

    def answer(self, model: pv.HookedModel) -> Tensor:
        bank, settings = pv.VectorBank([PROBE]), {"do_sample": False, "max_new_tokens": 2}
        if self.kind in ("forward", "idle"):
            with torch.no_grad():
                logits: Tensor = model.hf(self.ids[None]).logits
            return logits
        if self.kind == "read":
            acts = model.read([self.ids], sites=[pv.resid_post(2)], span="all", reduce="none")
            return acts[pv.resid_post(2)]
        if self.kind == "generate":
            with model.monitor(bank) as seen:
                model.generate_ids([self.ids], **settings)
            return seen["probe"].steps
        steps = model.stream([self.ids], bank, **settings)
        return torch.stack([step.projections["probe"] for step in steps])


def requests(sites: Sequence[pv.Site], count: int) -> list[Request]:
    draw = random.Random(4)
    return [
        Request(
            kind=KINDS[index % len(KINDS)],
            ids=prompts([draw.randint(3, 9)], seed=index)[0],
            site=draw.choice(sites),
            coeff=draw.uniform(-1, 1),
            cap=draw.uniform(-1, 1),
        )
        for index in range(count)
    ]


def at_once(work: Callable[[int], Any]) -> list[Any]:
    """Run `work` in all threads, none of which begins before all are there."""
    gate = threading.Barrier(THREADS)

    def begin(thread: int) -> Any:
        gate.wait()
        return work(thread)

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(begin, range(THREADS)))


def test_requests_in_threads_equal_requests_alone_bit_for_bit() -> None:
    found = fresh("qwen2")
    every = requests(found.sites, 45)
    alone = [request.run(found.model) for request in every]
    served = []

    def serve(thread: int) -> list[int]:
        order = random.Random(thread).choices(range(len(every)), k=REQUESTS)
        wrong = [i for i in order if not torch.equal(every[i].run(found.model), alone[i])]
        served.append(len(order))
        return wrong

    assert not any(at_once(serve))
    assert sum(served) == THREADS * REQUESTS == 800
    unsteered = [request.answer(found.model) for request in every]
    moved = [worst(a, b) for a, b in zip(alone, unsteered, strict=True)]
    steered = [index for index, request in enumerate(every) if request.kind != "idle"]
    assert sum(moved[index] > 1e-3 for index in steered) >= len(steered) - 2
    assert all(moved[i] == 0 for i in range(len(every)) if i not in steered)


def first_touch(found: Subject) -> list[Tensor]:
    """All threads arm sites that nobody has used yet, so that all want to tap them at once."""
    ids = prompts([5])[0]

    def touch(thread: int) -> Tensor:
        steps = [pv.Add(trio(site)[0], coeff=float(thread)) for site in found.sites]
        with torch.no_grad(), found.model.steer(*steps):
            return found.model.hf(ids[None]).logits

    at_once(touch)
    late = [touch(thread) for thread in range(THREADS)]
    assert worst(late[0], late[1]) > 1e-3
    return [late[i] - now for i, now in enumerate(at_once(touch))]


@pytest.mark.parametrize("attempt", range(4))
def test_the_first_use_of_a_site_may_come_from_all_threads(attempt: int) -> None:
    assert all(not difference.any() for difference in first_touch(fresh("llama")))


def test_a_plan_acts_only_in_the_thread_that_armed_it() -> None:
    found, ids = fresh("qwen2"), prompts([7])[0]
    request = Request(kind="forward", ids=ids, site=pv.resid_post(1), coeff=1.0, cap=0.0)
    with torch.no_grad():
        base = found.model.hf(ids[None]).logits
    with found.model.steer(*request.interventions()), torch.no_grad():
        with ThreadPoolExecutor(1) as pool:
            outside = pool.submit(request.answer, found.model).result()
        inside = found.model.hf(ids[None]).logits
    assert torch.equal(outside, base)
    assert worst(inside, base) > 1e-3


def test_tasks_of_one_event_loop_do_not_see_each_others_plans() -> None:
    found, ids = fresh("qwen2"), prompts([7])[0]

    async def ask(coeff: float) -> list[Tensor]:
        answers = []
        with found.model.steer(pv.Add(trio(pv.resid_post(1))[0], coeff=coeff)), torch.no_grad():
            for _ in range(3):
                await asyncio.sleep(0)
                answers.append(found.model.hf(ids[None]).logits)
        return answers

    async def everybody() -> list[list[Tensor]]:
        return await asyncio.gather(*(ask(float(coeff)) for coeff in range(8)))

    together = asyncio.run(everybody())
    for coeff, answers in enumerate(together):
        alone = asyncio.run(ask(float(coeff)))
        assert all(torch.equal(a, b) for a, b in zip(answers, alone, strict=True))
    assert worst(together[0][0], together[7][0]) > 1e-3


def test_a_failing_request_disturbs_no_other() -> None:
    """One request in five asks for numbers for the wrong batch and fails in mid-flight."""
    found = fresh("qwen2")
    every = requests(found.sites, 20)
    alone = [request.run(found.model) for request in every]

    def serve(thread: int) -> list[int]:
        wrong = []
        for turn in range(5):
            index = (thread * 7 + turn) % len(every)
            if turn == thread % 5:
                broken = pv.Add(trio(every[index].site)[0], coeff=[1.0, 2.0])
                failure = pytest.raises(pv.PvcoreError, match="2 per-row")
                with failure, found.model.steer(broken):
                    found.model.generate_ids([every[index].ids], max_new_tokens=1)
            if not torch.equal(every[index].run(found.model), alone[index]):
                wrong.append(index)
        return wrong

    assert not any(at_once(serve))
