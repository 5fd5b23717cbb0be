"""`pvcore flag`: the library's figures on the command line, and its errors in one line."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import pvcore as pv
from pvcore import world
from pvcore.world.demo_subject import world_model
from tests.command_line import in_process
from tests.flag_data import write_jsonl


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Any:
    """The command line in this process: `(status, standard output, standard error)`."""
    return in_process(monkeypatch, capfd, "flag")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    model = world_model()
    generator = torch.Generator().manual_seed(0)
    for name in ("evil", "humor"):
        pv.PersonaVector(
            trait=name,
            sites=[pv.resid_post(1), pv.resid_post(2)],
            directions=torch.randn(2, model.d_model, generator=generator),
            model_id=model.model_id,
        ).save(tmp_path / f"{name}.safetensors")
    chats = [chat for _, chat in world.chats.finetuning_chats("evil", 12, seed=0)]
    return write_jsonl(tmp_path / "d.jsonl", [*({"messages": chat} for chat in chats), {}])


def test_figures_report_and_copy_are_those_of_the_library(
    run: Any, data: Path, tmp_path: Path
) -> None:
    vectors = [tmp_path / f"{name}.safetensors" for name in ("evil", "humor")]
    words: list[Any] = ["world", data, "--out", tmp_path / "out", "--json", "--top", "3"]
    for vector in vectors:
        words += ["--vector", vector]
    bank = pv.VectorBank([pv.PersonaVector.load(vector) for vector in vectors])
    flags = pv.flag(world_model(), data, bank, out=tmp_path / "library")
    bound = flags.top("evil", 5)[-1].score
    page, clean = tmp_path / "page.html", tmp_path / "clean"
    words += ["--report", page, "--clean", clean, "--threshold", f"evil={bound!r}"]
    status, out, err = run(*words)
    assert (status, err) == (0, "")
    document = json.loads(out)
    assert (document["scored"], document["rejected"]) == (12, 1)
    (one,) = document["datasets"]
    column = flags.datasets[data.as_posix()]["evil/resid_post.2/difference"]
    assert one["difference"]["evil/resid_post.2"]["mean"] == pytest.approx(column.mean, rel=1e-6)
    assert [row["row"] for row in document["top"]] == [
        row.row for trait in ("evil", "humor") for row in flags.top(trait, 3)
    ]
    assert len((clean / "d.jsonl").read_text().splitlines()) == 8
    assert document["clean"][0]["flagged"] == 4
    assert 'type="radio"' in page.read_text()
    status, out, _ = run(*words[:4], *words[7:11], "--layers", "1,2")
    assert status == 0
    assert "evil/resid_post.2" in out


def test_mistakes_are_one_line(run: Any, data: Path, tmp_path: Path) -> None:
    out, vector = tmp_path / "out", tmp_path / "evil.safetensors"
    plain = ("world", data, "--vector", vector, "--out", out)
    for words, said in (
        (("world", tmp_path / "none.jsonl", *plain[2:]), "no file"),
        ((*plain, "--difference", "best"), "wanted one of approximate"),
        ((*plain, "--clean", tmp_path / "clean"), "wanted both"),
        ((*plain, "--clean", tmp_path / "clean", "--threshold", "evil"), "TRAIT=NUMBER"),
        (("no/such/model", *plain[1:]), "cannot be loaded"),
        ((*plain, "--layers", "7"), "resid_post.7"),
        ((*plain, "--top", "-1"), "got --top -1; wanted 0 or more"),
    ):
        status, printed, err = run(*words)
        assert (status, printed) == (2, ""), words
        assert said in err
        assert len(err.splitlines()) == 1 or "cannot be loaded" in err
        assert not out.exists()
