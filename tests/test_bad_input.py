"""Bad input: one typed error that says what came and what to do, and nothing armed afterwards."""

import copy
import re
from collections.abc import Callable
from typing import Any

import jaxtyping
import pytest
import torch
from torch import Tensor

import pvcore as pv
from pvcore import errors
from tests.bad_input import CASES, IDS, POSTS, SHORT, evil, made_of
from tests.subjects import Subject, subject, vector


def logits(found: Subject) -> Tensor:
    with torch.no_grad():
        got: Tensor = found.model.hf(IDS[None]).logits
    return got


@pytest.mark.parametrize("what", CASES)
def test_bad_input_is_one_typed_error_and_arms_nothing(
    what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The tests' own type checker would refuse some of these before pvcore can.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    attempt, kind, text = CASES[what]
    found = subject("qwen2")
    base = logits(found)
    with pytest.raises(pv.PvcoreError) as raised:
        attempt(found)
    assert type(raised.value) is kind or kind is errors.PvcoreError
    assert re.search(text, str(raised.value), re.DOTALL), str(raised.value)
    assert torch.equal(logits(found), base)
    with found.model.steer(pv.Add(evil(), coeff=1.0)):
        assert not torch.equal(logits(found), base)


def test_the_cases_are_many() -> None:
    assert len(CASES) >= 70


@pytest.mark.parametrize("name", ["gpt_neox", "falcon_parallel", "phi"])
@pytest.mark.parametrize("use", ["read", "steer", "monitor"])
def test_parallel_blocks_have_no_residual_between_attention_and_mlp(name: str, use: str) -> None:
    found = subject(name)
    one = vector("evil", [pv.resid_mid(1)], seed=0)
    uses: dict[str, Callable[[], Any]] = {
        "read": lambda: found.model.read([IDS], sites=[pv.resid_mid(1)], span="all"),
        "steer": lambda: found.model.steer(pv.Add(one, coeff=1.0)),
        "monitor": lambda: found.model.monitor(pv.VectorBank([one])),
    }
    base = logits(found)
    with pytest.raises(errors.SiteError, match=r"resid_mid\.1.*in parallel.*resid_pre"):
        uses[use]()
    assert torch.equal(logits(found), base)


def test_errors_come_before_anything_is_armed() -> None:
    """`steer` itself raises; no block is entered, so no forward is missed either."""
    found = subject("qwen2")
    with pytest.raises(errors.PlanError, match="width 32"):
        found.model.steer(pv.Add(made_of(torch.ones(1, 32)), coeff=1.0))
    with pytest.raises(errors.SiteError, match="3 blocks"):
        found.model.steer(pv.Add(vector("evil", [pv.resid_post(9)], seed=0), coeff=1.0))


def test_a_vector_of_another_model_is_let_through_on_request() -> None:
    found = subject("qwen2")
    base = logits(found)
    step = pv.Add(evil(model_id="other/gpt"), coeff=1.0)
    with found.model.steer(step, check_model=False):
        assert not torch.equal(logits(found), base)


def test_a_wrong_batch_in_the_middle_leaves_the_plan_usable() -> None:
    found = subject("qwen2")
    base = logits(found)
    with found.model.steer(pv.Add(evil(), coeff=[1.0, 0.0])), torch.no_grad():
        with pytest.raises(errors.PlanError, match="2 per-row"):
            found.model.hf(IDS[None])
        both = found.model.hf(torch.stack([IDS, IDS])).logits
    assert (both[0] - base[0]).abs().max() > 1e-3
    assert (both[1] - base[0]).abs().max() < 1e-5


def test_the_inputs_are_not_changed() -> None:
    """Vectors, coefficients and ids given to pvcore stay what they were."""
    found = subject("qwen2")
    directions, coeff, ids = torch.randn(3, 64), torch.tensor([1.0]), IDS.clone()
    kept = [copy.deepcopy(value) for value in (directions, coeff, ids)]
    one = pv.PersonaVector(trait="evil", sites=tuple(POSTS), directions=directions)
    with found.model.steer(pv.Add(one, coeff=coeff), pv.Ablate(one)):
        found.model.generate_ids([ids], **SHORT)
        found.model.read([ids], sites=POSTS, span="all")
    for value, before in zip((directions, coeff, ids), kept, strict=True):
        assert torch.equal(value, before)
    directions.zero_()
    assert float(one.norms.min()) > 1
