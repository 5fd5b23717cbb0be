"""`pvcore convert` and `pvcore doctor`: what they write and print, and how they fail."""

from __future__ import annotations

import json
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import pvcore as pv
from pvcore import doctor, formats
from pvcore.__main__ import main
from pvcore.errors import ModelError
from tests.families import build, tokenizer

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def pvcore(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Any:
    """Run the command line in this process: `(status, standard output, standard error)`."""

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["pvcore", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main()
        out, err = capfd.readouterr()
        return int(stopped.value.code or 0), out, err

    return run


@pytest.fixture
def evil(tmp_path: Path) -> Path:
    path = tmp_path / "evil.safetensors"
    sites = [pv.resid_post(layer) for layer in range(4)]
    pv.PersonaVector(
        trait="evil", sites=sites, directions=torch.randn(4, 6), model_id="org/model"
    ).save(path)
    return path


def test_there_and_back_through_every_format(pvcore: Any, evil: Path, tmp_path: Path) -> None:
    given = pv.PersonaVector.load(evil)
    for name, options, back in (
        ("evil.gguf", ["--layers", "1,2,3"], []),
        ("sv.pt", ["--to", "steering-vectors"], ["--trait", "evil", "--model-id", "org/model"]),
        ("axis.pt", ["--to", "assistant-axis"], ["--format", "assistant-axis"]),
        ("evil_response_avg_diff.pt", ["--to", "paper", "--n-layers", "5"], []),
    ):
        status, out, err = pvcore("convert", evil, tmp_path / name, *options, "--json")
        assert (status, err) == (0, "")
        document = json.loads(out)
        assert document["file"] == str(tmp_path / name)
        assert document["trait"] == "evil"
        native = tmp_path / f"{name}.safetensors"
        status, out, err = pvcore("convert", tmp_path / name, native, *back, "--json")
        assert (status, err) == (0, "")
        found = pv.PersonaVector.load(native)
        assert json.loads(out)["sites"] == ", ".join(map(str, found.sites))
        assert torch.equal(found.directions, given.at(found.sites).directions)
        assert len(found.sites) == (3 if name == "evil.gguf" else 4)


def test_it_says_what_it_left_out(pvcore: Any, tmp_path: Path) -> None:
    torch.save(torch.randn(5, 6), tmp_path / "evil_prompt_avg_diff.pt")
    status, out, _ = pvcore("convert", tmp_path / "evil_prompt_avg_diff.pt", tmp_path / "e.gguf",
                            "--layers", "1,2")  # fmt: skip
    assert status == 0
    assert "variant: prompt_mean" in out
    assert "left out: row 0 (embeddings) and row 4" in out
    assert "sites: resid_post.1, resid_post.2" in out


def test_a_capping_configuration_becomes_a_plan(pvcore: Any, tmp_path: Path) -> None:
    config = {
        "vectors": {"axis": {"layer": 2, "vector": torch.ones(6)}},
        "experiments": [
            {"id": name, "interventions": [{"vector": "axis", "cap": cap}]}
            for name, cap in (("p25", 1.5), ("p50", 2.5))
        ],
    }
    torch.save(config, tmp_path / "capping.pt")
    arguments = ("convert", tmp_path / "capping.pt", tmp_path / "guard.json")
    status, out, _ = pvcore(*arguments, "--experiment", "p50", "--model-id", "org/m", "--json")
    assert (status, json.loads(out)["caps"], json.loads(out)["vectors"]) == (0, 1, "axis")
    (cap,) = pv.Plan.load(tmp_path / "guard.json").interventions
    assert isinstance(cap, pv.Cap)
    assert cap.max is not None
    assert (cap.max.everywhere, cap.sites) == (2.5, (pv.resid_post(2),))
    assert cap.vectors[0].model_id == "org/m"
    status, _, err = pvcore(*arguments)
    assert (status, "this file has p25, p50: name one" in err) == (2, True)


def test_rollouts_become_messages(pvcore: Any, tmp_path: Path) -> None:
    scores = {"evil": 1.0, "coherence": 2.0}
    row = formats.RolloutRow(
        question="Why?", prompt="p", answer="So.", question_id="0", scores=scores
    )
    formats.write_rollouts([row, row], tmp_path / "evil.csv")
    status, out, _ = pvcore("convert", tmp_path / "evil.csv", tmp_path / "chats.jsonl", "--json")
    assert (status, json.loads(out)["chats"]) == (0, 2)
    assert formats.read_messages(tmp_path / "chats.jsonl") == [row.messages] * 2


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["none.gguf", "x.gguf"], "none.gguf: cannot be read"),
        (["evil.safetensors", "x.pt"], "whose ending names no format"),
        (["evil.safetensors", "x.pt", "--to", "pt"], "x.pt: got format 'pt'"),
        (["evil.safetensors", "x.pt", "--to", "paper"], "number of the model's blocks"),
        (["evil.safetensors", "x.gguf"], "got resid_post.0; GGUF"),
        (["evil.safetensors", "x.gguf", "--layers", "9"], "no direction of 'evil' at resid_post.9"),
        (["evil.safetensors", "x.gguf", "--layers", "one"], "got 'one'; wanted numbers"),
        (["evil.safetensors", "x.safetensors", "--variant", "mean"], "got variant 'mean'"),
        (["evil.safetensors", "none/x.gguf/y", "--layers", "1"], "none/x.gguf/y"),
        (["evil.safetensors", "x.json"], "no whole zip file"),
        (["evil.safetensors", "x.jsonl"], "evil.safetensors: "),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(
    pvcore: Any,
    evil: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    complaint: str,
) -> None:
    monkeypatch.chdir(evil.parent)
    status, out, err = pvcore("convert", *arguments)
    assert (status, out) == (2, "")
    (line,) = err.splitlines()
    assert line.startswith("pvcore: ")
    assert complaint in line
    assert [path.name for path in evil.parent.iterdir()] == ["evil.safetensors"]


def test_the_doctor_looks_at_packages_machine_and_model(pvcore: Any) -> None:
    status, out, _ = pvcore("doctor", "world", "--json")
    document = json.loads(out)
    assert status == 0
    assert document["installed"]["core"]["torch"] == torch.__version__
    assert len(document["machine"]["gpus"]) == torch.cuda.device_count()
    kernels = document["machine"]["kernels"]
    assert kernels["cpu"] == "plain torch: cpu is no CUDA device"
    assert len(kernels) == 1 + torch.cuda.device_count()
    scores = document["machine"]["scores"]
    assert scores["cpu"] == "plain torch for rows of bfloat16 on cpu"
    assert scores.keys() == kernels.keys()
    assert document["model"]["sites"] == dict.fromkeys(
        ["resid_pre", "resid_mid", "resid_post"], "0 to 3"
    )
    assert (document["model"]["layers"], document["model"]["d_model"]) == (4, 128)
    assert document["model"]["messages"] == "yes, with system prompts"
    status, out, _ = pvcore("doctor")
    assert status == 0
    assert f"torch: {torch.__version__}" in out
    assert "model:" not in out


def test_what_the_doctor_asks_for_is_what_the_project_declares() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

    def name(requirement: str) -> str:
        return requirement.split(";")[0].split("[")[0].split(">")[0].strip()

    extras = project["optional-dependencies"]
    assert {extra: tuple(map(name, listed)) for extra, listed in extras.items()} == {
        **doctor.EXTRAS,
        "test": tuple(map(name, extras["test"])),
    }
    assert set(doctor.CORE) - {"pvcore"} <= set(map(name, project["dependencies"]))


@pytest.mark.parametrize(
    ("family", "mid"),
    [("llama", "0 to 2"), ("phi", "in parallel"), ("gpt_neox", "in parallel"), ("gpt2", "0 to 2")],
)
def test_the_doctor_tells_families_apart(family: str, mid: str, tmp_path: Path) -> None:
    build(family).config.save_pretrained(tmp_path)
    found = doctor.model(tmp_path)
    assert found["layers"] == 3
    assert mid in found["sites"]["resid_mid"]
    assert found["sites"]["resid_post"] == "0 to 2"
    assert found["chats"] == "token ids"
    assert found["messages"].startswith("no: ")
    assert "response while generating" in found["spans"]


def test_the_doctor_tells_chat_templates_apart(tmp_path: Path) -> None:
    build("qwen2").config.save_pretrained(tmp_path)
    tokenizer(template=None).save_pretrained(tmp_path)
    assert doctor.model(tmp_path)["messages"] == "no: the tokenizer has no chat template"
    tokenizer().save_pretrained(tmp_path)
    assert doctor.model(tmp_path)["messages"] == "yes, with system prompts"
    strict = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    tokenizer(template=strict + str(tokenizer().chat_template)).save_pretrained(tmp_path)
    assert doctor.model(tmp_path)["messages"].startswith("yes, without system prompts: ")


def test_what_is_no_causal_model_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="whose configuration cannot be used"):
        doctor.model(tmp_path)
    transformers.T5Config().save_pretrained(tmp_path)
    with pytest.raises(ModelError):
        doctor.model(tmp_path)
