"""Calibration: percentiles of neutral projections, against a reader with nothing of pvcore."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import pvcore as pv
from pvcore.calibration import calibrate, stored_threshold
from pvcore.errors import CalibrationError, PlanError, SpanError
from tests.families import build, tokenizer
from tests.subjects import vector

SITES = (pv.resid_post(0), pv.resid_post(1))  # hidden_states holds both before any norm
MODEL_ID = "tiny/qwen2"
CHATS = [
    [
        {"role": "user", "content": f"Is it {letter * (1 + at % 4)}?"},
        {"role": "assistant", "content": f"{letter} " * (1 + at % 5)},
    ]
    for at, letter in enumerate("abcdefghijkl")
]


@cache
def model() -> pv.HookedModel:
    return pv.HookedModel(build("qwen2"), tokenizer(), model_id=MODEL_ID)


@cache
def bank() -> pv.VectorBank:
    names = ("evil", "apathy", "humor")
    return pv.VectorBank(
        [vector(name, SITES, seed=seed, model_id=MODEL_ID) for seed, name in enumerate(names)]
    )


@cache
def states() -> tuple[tuple[Tensor, int, int], ...]:
    """Of each chat: hidden states `[site, pos, d_model]`, and where its reply begins and ends."""
    hf, plain = build("qwen2"), tokenizer()
    found = []
    for chat in CHATS:
        prompt = plain.apply_chat_template(chat[:1], add_generation_prompt=True, return_dict=False)
        reply = plain(chat[1]["content"], add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            hidden = hf(torch.tensor([prompt + reply]), output_hidden_states=True).hidden_states
        rows = torch.stack([hidden[site.layer + 1][0].double() for site in SITES])
        found.append((rows, len(prompt), len(prompt) + len(reply)))
    return tuple(found)


def projected(rows: Tensor) -> np.ndarray[Any, Any]:
    """`[site, row, d_model]` along unit vectors, as `[site, trait, row]`."""
    units = torch.stack(
        [torch.stack([one.direction(site).double() for one in bank()]) for site in SITES]
    )
    units = units / units.norm(dim=-1, keepdim=True)
    return (units @ rows.mT).numpy()


def wanted(span: str, per: str) -> np.ndarray[Any, Any]:
    parts = []
    for rows, start, end in states():
        first, last = {
            "response": (start, end),
            "prompt": (0, start),
            "last_prompt_token": (start - 1, start),
        }[span]
        inside = rows[:, first:last]
        parts.append(projected(inside if per == "token" else inside.mean(1, keepdim=True)))
    return np.concatenate(parts, axis=-1)


CASES = [
    ("response", "chat", "response_mean"),
    ("response", "token", "response_tokens"),
    ("prompt", "chat", "prompt_mean"),
    ("last_prompt_token", "chat", "last_prompt_token"),
]


@pytest.mark.parametrize(("span", "per", "key"), CASES)
def test_percentiles_are_those_of_the_projections_read_by_hand(
    span: str, per: str, key: str
) -> None:
    percentiles = (0, 12.5, 50, 95, 100)
    found = calibrate(
        model(), bank(), CHATS, span=span, per=per, percentiles=percentiles, batch_size=5
    )
    right = wanted(span, per)
    assert (found.chats, found.count, found.key) == (len(CHATS), right.shape[-1], key)
    # Residuals are of order one and read in float32 by both.
    for at, percentile in enumerate(percentiles):
        values = np.percentile(right, percentile, axis=-1)
        assert np.abs(found.values[..., at].numpy() - values).max() < 1e-4
    assert np.abs(found.means.numpy() - right.mean(-1)).max() < 1e-4
    assert np.abs(found.deviations.numpy() - right.std(-1)).max() < 1e-4
    assert float((found.values[..., -1] - found.values[..., 0]).min()) > 0.1


def test_a_threshold_parts_the_share_it_says() -> None:
    found = calibrate(model(), bank(), CHATS, per="token")
    right = wanted("response", "token")
    for place, site in enumerate(SITES):
        for k, trait in enumerate(bank().traits):
            bar = found.threshold(trait, site, 75)
            share = float((right[place, k] <= bar + 1e-5).mean())
            assert share == pytest.approx(0.75, abs=2 / right.shape[-1])
            gap = found.threshold(trait, site, 95) - float(right[place, k].mean())
            spread = float(right[place, k].std())
            assert found.standardised(
                trait, site, found.threshold(trait, site, 95)
            ) == pytest.approx(gap / spread, abs=1e-3)


def test_calibrations_are_kept_in_the_files_of_the_vectors(tmp_path: Path) -> None:
    means = calibrate(model(), bank(), CHATS)
    tokens = calibrate(model(), means.vectors(), CHATS, span="last_prompt_token")
    evil = tokens.vectors()["evil"]
    assert torch.equal(evil.directions, bank()["evil"].directions)
    evil.save(tmp_path / "evil.safetensors")
    loaded = pv.PersonaVector.load(tmp_path / "evil.safetensors")
    for site in SITES:
        assert set(loaded.calibration[str(site)]) == {"response_mean", "last_prompt_token"}
        assert stored_threshold(loaded, site, 95) == means.threshold("evil", site, 95)
        assert stored_threshold(loaded, site, 50, key="last_prompt_token") == tokens.threshold(
            "evil", site, 50
        )
    assert set(loaded.at([1]).calibration) == {"resid_post.1"}
    assert bank()["evil"].calibration == {}


def test_what_else_stands_in_a_calibration_stays() -> None:
    noted = replace(bank()["evil"], calibration={"remark": "by hand", "resid_post.0": {"own": 1}})
    kept = calibrate(model(), noted, CHATS).vectors()["evil"].calibration
    assert kept["remark"] == "by hand"
    assert kept["resid_post.0"].keys() == {"own", "response_mean"}


@pytest.mark.parametrize(
    ("settings", "error", "complaint"),
    [
        ({"percentiles": (101,)}, CalibrationError, "got percentiles 101; wanted numbers from 0"),
        ({"percentiles": ()}, CalibrationError, "got percentiles none"),
        ({"percentiles": (5, 5)}, CalibrationError, "each once"),
        ({"percentiles": (float("nan"),)}, CalibrationError, "got percentiles nan"),
        ({"per": "row"}, CalibrationError, "got per='row'; wanted one of chat, token"),
        ({"span": "reply"}, SpanError, "got span 'reply'"),
        ({"neutral_chats": CHATS[:1]}, CalibrationError, "got a single projection"),
        ({"neutral_chats": [CHATS[0][:1]] * 2}, SpanError, "holds a prompt only"),
    ],
)
def test_what_cannot_be_calibrated_is_one_typed_error(
    settings: dict[str, Any], error: type[Exception], complaint: str
) -> None:
    with pytest.raises(error, match=complaint):
        calibrate(model(), bank(), **({"neutral_chats": CHATS} | settings))


def test_what_was_not_calibrated_is_one_typed_error() -> None:
    found = calibrate(model(), bank(), CHATS)
    with pytest.raises(CalibrationError, match=r"got percentile 90; this calibration has 1, 5, 25"):
        found.threshold("evil", SITES[0], 90)
    with pytest.raises(CalibrationError, match=r"got resid_post.2; calibrated are resid_post.0"):
        found.threshold("evil", pv.resid_post(2), 95)
    with pytest.raises(CalibrationError, match="got 'greed'; calibrated are evil, apathy"):
        found.standardised("greed", SITES[0], 1.0)
    with pytest.raises(CalibrationError, match="got 'evil' without percentile 95"):
        stored_threshold(bank()["evil"], SITES[0], 95)


def test_neutral_chats_that_project_alike_give_no_scale() -> None:
    found = calibrate(model(), bank(), [CHATS[0]] * 3, batch_size=3)
    with pytest.raises(CalibrationError, match="all project alike"):
        found.standardised("evil", SITES[0], 1.0)


def test_vectors_of_another_model_are_refused_unless_asked_for() -> None:
    foreign = replace(bank()["evil"], model_id="other/model")
    with pytest.raises(PlanError, match="other/model"):
        calibrate(model(), foreign, CHATS)
    assert calibrate(model(), foreign, CHATS, check_model=False).count == len(CHATS)
