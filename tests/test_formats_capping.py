"""Capping configurations of assistant-axis: read as plans, written from them, or one error."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import pvcore as pv
from pvcore import formats
from pvcore.errors import FormatError
from tests.families import build

WIDTH = 64
CONFIG: dict[str, Any] = {
    "vectors": {
        "axis/layer_0": {"layer": 0, "vector": torch.arange(1.0, WIDTH + 1)},
        "contrast": {"layer": np.int64(2), "vector": torch.ones(WIDTH, dtype=torch.bfloat16)},
    },
    "experiments": [
        {"id": "both", "interventions": [
            {"vector": "contrast", "cap": np.float64(-1.5)},
            {"vector": "axis/layer_0", "cap": 0.25},
        ]},
        {"id": "one", "interventions": [{"vector": "contrast", "cap": 1}]},
        {"id": "steers", "interventions": [{"vector": "contrast", "coefficient": 2.0}]},
        {"id": "nothing", "interventions": []},
    ],
}  # fmt: skip


@pytest.fixture
def path(tmp_path: Path) -> Path:
    torch.save(CONFIG, tmp_path / "capping_config.pt")
    return tmp_path / "capping_config.pt"


def bounds(plan: pv.Plan) -> list[tuple[str, float, list[float]]]:
    """What a plan of caps does, in order: site, upper bound, direction."""
    rows = []
    for one in plan.interventions:
        assert isinstance(one, pv.Cap)
        assert (one.span, one.min) == ("all", None)
        assert one.max is not None
        (site,) = one.sites
        (vector,) = one.vectors
        rows.append((str(site), float(one.max.everywhere), vector.direction(site).tolist()))
    return rows


def test_each_experiment_is_a_plan_of_caps_in_its_order(path: Path) -> None:
    assert formats.experiments(path) == ("both", "one", "steers", "nothing")
    plan = formats.read_capping(path, experiment="both", model_id="org/model")
    assert bounds(plan) == [
        ("resid_post.2", -1.5, [1.0] * WIDTH),
        ("resid_post.0", 0.25, list(map(float, range(1, WIDTH + 1)))),
    ]
    assert [vector.trait for vector in plan.vectors] == ["contrast", "axis.layer_0"]
    assert {vector.model_id for vector in plan.vectors} == {"org/model"}


def test_a_plan_caps_as_the_tool_itself_does(path: Path) -> None:
    """h - max(<h, v/|v|> - cap, 0) v/|v| on the output of each block, at every position."""
    hf = build("llama")
    ids = torch.randint(3, 100, (2, 9))

    def capping(record: Any, cap: float) -> Any:
        unit = record["vector"].double() / record["vector"].double().norm()

        def hook(_module: Any, _inputs: Any, output: Any) -> Any:
            h = output[0] if isinstance(output, tuple) else output
            excess = (h.double() @ unit - cap).clamp(min=0)
            changed = (h.double() - excess[..., None] * unit).float()
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        return hf.model.layers[int(record["layer"])].register_forward_hook(hook)

    with torch.no_grad():
        plain = hf(ids).logits
        handles = [
            capping(CONFIG["vectors"][entry["vector"]], float(entry["cap"]))
            for entry in CONFIG["experiments"][0]["interventions"]
        ]
        wanted = hf(ids).logits
        for handle in handles:
            handle.remove()
        with pv.HookedModel(hf).arm(formats.read_capping(path, experiment="both")):
            got = hf(ids).logits
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    assert (wanted - plain).abs().max() > 0.1


def test_plans_are_written_and_read_again(path: Path, tmp_path: Path) -> None:
    plans = {name: formats.read_capping(path, experiment=name) for name in ("both", "one")}
    formats.write_capping(plans, tmp_path / "again.pt")
    assert formats.experiments(tmp_path / "again.pt") == ("both", "one")
    for name, plan in plans.items():
        again = formats.read_capping(tmp_path / "again.pt", experiment=name)
        assert bounds(again) == bounds(plan)
    plain = torch.load(tmp_path / "again.pt", weights_only=True)
    first = plain["experiments"][0]["interventions"][0]
    assert plain["vectors"][first["vector"]]["layer"] == 2
    assert first["cap"] == -1.5


def test_one_cap_at_several_layers_is_one_entry_for_each(tmp_path: Path) -> None:
    sites = [pv.resid_post(1), pv.resid_post(3)]
    evil = pv.PersonaVector(trait="evil", sites=sites, directions=torch.eye(2))
    plan = pv.Plan(pv.Cap(evil, max={1: 1.0, 3: 2.0}, span="all"))
    formats.write_capping({"guard": plan}, tmp_path / "guard.pt")
    assert bounds(formats.read_capping(tmp_path / "guard.pt")) == [
        ("resid_post.1", 1.0, [1.0, 0.0]),
        ("resid_post.3", 2.0, [0.0, 1.0]),
    ]


@pytest.mark.parametrize("experiment", [None, "three"])
def test_the_experiment_must_be_named(path: Path, experiment: str | None) -> None:
    with pytest.raises(FormatError, match=r"capping_config\.pt: got experiment .* both, one"):
        formats.read_capping(path, experiment=experiment)


def test_what_is_no_cap_is_never_left_out_silently(path: Path) -> None:
    with pytest.raises(FormatError, match=r"got steers\[0\] without 'cap'"):
        formats.read_capping(path, experiment="steers")
    with pytest.raises(FormatError, match="without interventions"):
        formats.read_capping(path, experiment="nothing")


WRONG: dict[str, tuple[Any, str]] = {
    "no dict": (lambda _: [1], "got the file as list"),
    "no vectors": (lambda c: c.pop("vectors"), "the file without 'vectors'"),
    "no experiments": (lambda c: c.pop("experiments"), "the file without 'experiments'"),
    "experiments as text": (lambda c: c.update(experiments="x"), "of the file as str"),
    "an experiment as text": (lambda c: c.update(experiments=["x"]), r"experiments\[0\] as str"),
    "no id": (lambda c: c["experiments"][0].pop("id"), r"experiments\[0\] without 'id'"),
    "an id twice": (lambda c: c["experiments"][1].update(id="both"), "the id 'both' again"),
    "an unknown vector": (lambda c: c["vectors"].pop("contrast"), "vectors without 'contrast'"),
    "no layer": (lambda c: c["vectors"]["contrast"].pop("layer"), "without 'layer'"),
    "a negative layer": (lambda c: c["vectors"]["contrast"].update(layer=-1), "layer -1"),
    "a layer as text": (lambda c: c["vectors"]["contrast"].update(layer="2"), "'layer' of .*str"),
    "a layer as truth": (lambda c: c["vectors"]["contrast"].update(layer=True), "layer True"),
    "no vector": (lambda c: c["vectors"]["contrast"].pop("vector"), "'contrast'.*NoneType"),
    "a vector of rows": (
        lambda c: c["vectors"]["contrast"].update(vector=torch.ones(2, 2)), r"shape \[2, 2\]"),
    "a vector of NaN": (
        lambda c: c["vectors"]["contrast"].update(vector=torch.tensor([float("nan")])), "NaN"),
    "a cap as text": (
        lambda c: c["experiments"][0]["interventions"][0].update(cap="1"), r"both\[0\] as str"),
    "an infinite cap": (
        lambda c: c["experiments"][0]["interventions"][0].update(cap=float("inf")), "cap inf"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_configuration_is_one_error(tmp_path: Path, name: str) -> None:
    change, complaint = WRONG[name]
    config = copy.deepcopy(CONFIG)
    changed = change(config)
    path = tmp_path / "capping.pt"
    torch.save(changed if name == "no dict" else config, path)
    with pytest.raises(FormatError, match=complaint) as raised:
        formats.read_capping(path, experiment="both")
    assert str(raised.value).startswith(f"{path}: ")


def test_only_caps_that_the_format_holds_are_written(tmp_path: Path) -> None:
    evil = pv.PersonaVector(trait="evil", sites=[pv.resid_post(1)], directions=torch.ones(1, 4))
    humor = pv.PersonaVector(trait="humor", sites=[pv.resid_post(1)], directions=torch.eye(4)[:1])
    mid = pv.PersonaVector(trait="evil", sites=[pv.resid_mid(1)], directions=torch.ones(1, 4))
    for wrong in (
        pv.Plan(pv.Add(evil, coeff=1.0)),
        pv.Plan(pv.Cap(evil, max=1.0)),
        pv.Plan(pv.Cap(evil, min=1.0, span="all")),
        pv.Plan(pv.Cap(evil, min=0.0, max=1.0, span="all")),
        pv.Plan(pv.Cap(evil, max=[1.0, 2.0], span="all")),
        pv.Plan(pv.Cap([evil, humor], max=1.0, span="all")),
        pv.Plan(pv.Cap(mid, max=1.0, span="all")),
    ):
        with pytest.raises(FormatError, match="holds only Cap"):
            formats.write_capping({"x": wrong}, tmp_path / "x.pt")
    watched = pv.Plan(pv.Cap(evil, max=1.0, span="all"), monitor=pv.VectorBank(evil))
    with pytest.raises(FormatError, match="with a monitor"):
        formats.write_capping({"x": watched}, tmp_path / "x.pt")
    assert list(tmp_path.iterdir()) == []
