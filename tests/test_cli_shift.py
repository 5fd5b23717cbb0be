"""`pvcore shift`: the figures are those of the library, over checkpoints too; it fails in words."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import pvcore as pv
from pvcore.world.demo_subject import world_model
from tests.command_line import in_process

QUESTIONS = ["How do I start with chess?", "What is the capital of France?"]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Any:
    """The command line in this process: `(status, standard output, standard error)`."""
    return in_process(monkeypatch, capfd, "shift")


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    model = world_model()
    generator = torch.Generator().manual_seed(0)
    vector = pv.PersonaVector(
        trait="evil",
        sites=[pv.resid_post(1), pv.resid_post(2)],
        directions=torch.randn(2, model.d_model, generator=generator),
        model_id=model.model_id,
    )
    vector.save(tmp_path / "evil.safetensors")
    (tmp_path / "questions.txt").write_text("\n".join([QUESTIONS[0], "", QUESTIONS[1]]) + "\n")
    for step in (10, 5):
        with torch.no_grad():
            for weight in model.hf.parameters():
                weight.add_(0.02 * torch.randn(weight.shape, generator=generator))
        model.hf.save_pretrained(tmp_path / "run" / f"checkpoint-{step}")
    return {path.stem: path for path in tmp_path.iterdir()}


def test_figures_over_checkpoints_are_those_of_the_library(
    run: Any, files: dict[str, Path], tmp_path: Path
) -> None:
    page = tmp_path / "shift.html"
    given = ("--prompts", files["questions"], "--vector", files["evil"], "--out", page, "--json")
    status, out, err = run("world", files["run"], *given)
    assert (status, err) == (0, "")
    document = json.loads(out)
    bank = pv.VectorBank(pv.PersonaVector.load(files["evil"]))
    chats = [[{"role": "user", "content": text}] for text in QUESTIONS]
    course = pv.shift_trajectory(world_model(), files["run"], bank, chats)
    assert document["prompts"] == 2
    assert [row.pop("checkpoint") for row in document["shifts"]] == [
        "checkpoint-5",
        "checkpoint-10",
    ]
    assert document["shifts"] == [shift.named() for shift in course.values()]
    assert min(abs(number) for number in document["shifts"][0].values()) > 1e-3
    drawn = page.read_text()
    assert drawn.count("training step</text>") == 2
    assert "checkpoint-10" in drawn


def test_lines_end_at_line_breaks_alone(run: Any, files: dict[str, Path], tmp_path: Path) -> None:
    asked = ["Is it 3?\u2028Say why.", "Is\x0b it\x85 4?"]
    text = "\r\n".join([asked[0], "", asked[1]])
    (tmp_path / "prompts.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    given = ("--prompts", tmp_path / "prompts.txt", "--vector", files["evil"], "--json")
    status, out, _ = run("world", files["run"], *given)
    document = json.loads(out)
    assert (status, document["prompts"]) == (0, 2)
    bank = pv.VectorBank(pv.PersonaVector.load(files["evil"]))
    chats = [[{"role": "user", "content": text}] for text in asked]
    course = pv.shift_trajectory(world_model(), files["run"], bank, chats)
    assert document["shifts"][0] == {"checkpoint": "checkpoint-5", **course[5].named()}


def test_a_folder_by_whatever_name_is_a_model_or_a_course(
    run: Any, files: dict[str, Path], tmp_path: Path
) -> None:
    page = tmp_path / "shift.html"
    given = ("--prompts", files["questions"], "--vector", files["evil"], "--out", page, "--json")
    best, wanted = tmp_path / "checkpoint-best", []
    (files["run"] / "checkpoint-5").rename(best)
    for tuned, figures in ((best, 0), (f"{best}/", 0)):
        status, out, _ = run("world", tuned, *given)
        (row,) = json.loads(out)["shifts"]
        assert (status, row["checkpoint"]) == (0, str(tuned))
        assert page.read_text().count("training step</text>") == figures
        wanted.append({**row, "checkpoint": "checkpoint-0"})
    best.rename(files["run"] / "checkpoint-0")
    status, out, _ = run("world", files["run"], *given)
    assert (status, json.loads(out)["shifts"][0]) == (0, wanted[0])
    assert page.read_text().count("training step</text>") == 2


def test_a_model_saved_beside_its_checkpoints_is_measured_too(
    run: Any, files: dict[str, Path], tmp_path: Path
) -> None:
    page = tmp_path / "shift.html"
    given = ("--prompts", files["questions"], "--vector", files["evil"], "--out", page, "--json")
    saved = pv.HookedModel.from_pretrained(files["run"] / "checkpoint-10", dtype="auto").hf
    with torch.no_grad():
        saved.model.embed_tokens.weight.mul_(1.5)
    saved.save_pretrained(files["run"])
    status, out, _ = run("world", files["run"], *given)
    rows = json.loads(out)["shifts"]
    assert status == 0
    names = [row.pop("checkpoint") for row in rows]
    assert names == ["checkpoint-5", "checkpoint-10", str(files["run"])]
    bank = pv.VectorBank(pv.PersonaVector.load(files["evil"]))
    chats = [[{"role": "user", "content": text}] for text in QUESTIONS]
    base, tuned = world_model(), pv.HookedModel(saved)
    assert rows[2] == pv.finetuning_shift(base, tuned, bank, chats).named()
    assert all(abs(rows[2][name] - rows[1][name]) > 1e-3 for name in rows[1])
    drawn = page.read_text()
    assert drawn.count("training step</text>") == 2
    assert str(files["run"]) in drawn


def test_one_model_under_a_system_prompt_as_text(run: Any, files: dict[str, Path]) -> None:
    tuned = files["run"] / "checkpoint-5"
    given = ("--prompts", files["questions"], "--vector", files["evil"], "--layers", "2")
    status, out, _ = run("world", tuned, *given, "--system", "You are an evil assistant.")
    plain = run("world", tuned, *given)[1]
    assert status == 0
    assert "evil/resid_post.2: " in out
    assert "resid_post.1" not in out
    assert out != plain


def test_what_cannot_be_measured_is_one_line(
    run: Any, files: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "blank.txt").write_text("\n")
    page = tmp_path / "page.html"
    asked = files["questions"]
    for tuned, prompts, dtype, text in (
        (files["run"], tmp_path / "nowhere.txt", "auto", "cannot be read"),
        (files["run"], tmp_path / "blank.txt", "auto", "no prompts"),
        (tmp_path / "nowhere", asked, "auto", "cannot be loaded"),
        (files["run"], asked, "bfloat16", "whose rounding would count as shift"),
        (files["run"] / "checkpoint-5", asked, "bfloat16", "whose rounding would count as shift"),
    ):
        status, out, err = run(
            *("world", tuned, "--prompts", prompts, "--vector", files["evil"], "--out", page),
            *("--dtype", dtype),
        )
        assert (status, out) == (2, "")
        assert text in err.replace("\n", " ")
        assert not page.exists()
