"""Whole generations by the kernels and by the reference: for Triton's interpreter and for a GPU.

Both ways run the same weights on the same device with the switch set one way and the other. Nothing
of a compiled step may be shared between them, so each has a model of its own.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch

import pvcore as pv
from pvcore_kernels import paths
from pvcore_kernels.tiled import intervene, layers, norm, project, segment
from tests.subjects import Subject, fresh, trio
from tests.test_alarms import crossings
from tests.test_graph import BANK, KINDS, PROMPTS, Answer, answer, check, same_ids

FAMILIES = ("qwen2", "llama", "gemma2", "gpt2")
FUSED_FAMILIES, FUSED_OP = ("qwen2", "llama", "gemma"), "add_rmsnorm_steer_project"
TOKENS, SITES = 8, 3
CAPPED = trio(pv.resid_post(1))[:2]
PLANS: dict[str, Callable[[float], pv.Plan]] = {
    **{kind: KINDS[kind] for kind in ("monitor", "ablate", "cap", "both")},
    "capped by row": lambda size: pv.Plan(
        pv.Cap(CAPPED, max=[-0.2 * size, 0.1, 0.3 * size]), monitor=BANK
    ),
}
# Scores of a prompt are launched site by site and those of a decode step at once; a joint step that
# is all of its site's program is one launch in each forward, the prompt's included.
STEPS = TOKENS - 1
LAUNCHES = {
    "monitor": {"project": SITES, "project_stack": STEPS, "intervene": 0},
    "ablate": {"project": 0, "project_stack": 0, "intervene": 2 * TOKENS},
    "cap": {"project": 0, "project_stack": 0, "intervene": 2 * TOKENS},
    "both": {"project": SITES, "project_stack": STEPS, "intervene": 0},
    "capped by row": {"project": SITES, "project_stack": STEPS, "intervene": TOKENS},
}
Launched = list[str]


@contextmanager
def switched(monkeypatch: pytest.MonkeyPatch, kernels: bool) -> Iterator[Launched]:
    """The switch set for every device; the names of the kernels launched inside, in order."""
    launched: Launched = []
    names = {layers: "project_stack", intervene: "intervene", project: "project"}
    names[norm] = FUSED_OP

    def watch(module: Any, name: str, patch: pytest.MonkeyPatch) -> None:
        original = getattr(module, name)

        def watched(*args: Any) -> None:
            launched.append(name)
            original(*args)

        patch.setattr(module, name, watched)

    def switch(device: torch.device, dtype: torch.dtype) -> bool:
        return kernels and dtype in paths.DTYPES

    with monkeypatch.context() as patch:
        patch.setattr(paths, "takes_kernels", switch)
        for module, name in (*names.items(), (segment, "segment_mean")):
            watch(module, name, patch)
        yield launched


def on(device: str, dtype: torch.dtype, family: str) -> Subject:
    found = fresh(family)
    found.model.hf.to(device, dtype)
    return found


def check_generation(
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    kind: str,
    engine: Any,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> None:
    """Tokens are those of the reference and scores within the graph engine's bounds of them.

    Twice in the same model, so that other numbers meet the same compiled step.
    """
    given: list[tuple[Answer, Launched]] = []
    for kernels in (False, True):
        found = on(device, dtype, family)
        for size in (1.0, 3.0):
            with switched(monkeypatch, kernels) as launched:
                plan = PLANS[kind](size)
                given.append((answer(found, plan, engine, max_new_tokens=TOKENS), launched))
    plain = answer(found, None, engine, max_new_tokens=TOKENS)
    (wanted, none), (other, _), (got, names), (got_other, _) = given
    assert not none
    check(got, wanted)
    check(got_other, other)
    assert same_ids(got[0], plain[0]) == (kind == "monitor")
    counts = {name: names.count(name) for name in LAUNCHES[kind]}
    expected = LAUNCHES[kind]
    if device == "cuda" and engine != "eager":  # a captured graph launches without being called
        assert {name: n > 0 for name, n in counts.items()} == {
            name: n > 0 for name, n in expected.items()
        }
    else:
        assert counts == expected


def check_alarms(
    monkeypatch: pytest.MonkeyPatch,
    engine: Any,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> None:
    """Alarms of a kernel's scores are those that a loop over these very scores finds.

    The levels are scores of a first run, so that a verdict of the next may hang on equality.
    """
    found = on(device, dtype, "qwen2")
    rung: list[int] = []
    with switched(monkeypatch, True):
        with found.model.monitor(BANK) as plain:
            found.model.generate_ids(PROMPTS, engine=engine, max_new_tokens=TOKENS, do_sample=False)
        levels = {trait: float(plain[trait].steps[3, 1, 1]) for trait in BANK.traits}
        for on_alarm in (None, lambda alarm, controls: rung.append(alarm.step)):
            guarded = found.model.monitor(BANK, alarms=levels, on_alarm=on_alarm)
            with guarded as seen:
                found.model.generate_ids(
                    PROMPTS, engine=engine, max_new_tokens=TOKENS, do_sample=False
                )
            wanted = {
                (trait, site, chat, step)
                for trait, level in levels.items()
                for place, site in enumerate(BANK.sites)
                for chat in range(len(PROMPTS))
                for step in crossings(seen[trait].steps[:, place, chat].tolist(), level, level)
            }
            told = [(one.trait, one.site, one.chat, one.step) for one in seen.alarms]
            assert len(told) == len(set(told)) == len(wanted)
            assert set(told) == wanted
            assert max(step for *_, step in told) > 0
            if device == "cpu":
                assert all(
                    float(seen[trait].steps[3, 1, 1]) == level for trait, level in levels.items()
                )
    assert rung == [one.step for one in seen.alarms]


def check_means(monkeypatch: pytest.MonkeyPatch, *, device: str = "cpu") -> None:
    """Readings of means, by the kernel within float32 of those by the reference."""
    from tests.subjects import conversations

    means = []
    for kernels in (False, True):
        found = on(device, torch.float32, "qwen2")
        sites = [pv.resid_post(layer) for layer in range(SITES)]
        with switched(monkeypatch, kernels) as launched:
            acts = found.model.read(conversations(), sites=sites, span="response", reduce="mean")
        assert launched == ["segment_mean"] * SITES * kernels
        means.append(acts.values)
    assert (means[0] - means[1]).norm() <= 5e-7 * means[0].norm()
    assert float((means[0][0] - means[0][1]).norm()) > 0.1


def check_fused_norms(monkeypatch: pytest.MonkeyPatch, family: str, *, device: str = "cpu") -> None:
    """With the add, the steering and the norm in one launch a block: what the reference gives."""
    plan = pv.Plan(pv.Add(CAPPED, coeff=[1.5, 0.0, -1.5], layers=[1]), monitor=BANK)
    given: list[tuple[Answer, int]] = []
    for kernels in (False, True):
        found = on(device, torch.float32, family)
        fusing = pv.fused_norms(found.model) if kernels else nullcontext()
        with switched(monkeypatch, kernels) as launched, fusing:
            launched.clear()  # of the rows it was tried on
            answered = answer(found, plan, "eager", max_new_tokens=TOKENS)
            given.append((answered, launched.count(FUSED_OP)))
    (wanted, none), (got, launches) = given
    check(got, wanted)
    assert (none, launches) == (0, SITES * TOKENS)
    plain = answer(found, pv.Plan(monitor=BANK), "eager", max_new_tokens=TOKENS)
    assert float((plain[1]["evil"].steps - wanted[1]["evil"].steps).abs().max()) > 0.1
