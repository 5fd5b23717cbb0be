"""`pvcore flag`: the library's figures on the command line, and its errors in one line."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import pvcore as pv
from pvcore import cli_flag, world
from pvcore.world.demo_subject import world_model
from tests.command_line import in_process
from tests.flag_data import table, write_csv, write_jsonl


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
    status, out, _ = run(*words, "--keep-rejected")
    (copied,) = json.loads(out)["clean"]
    assert (status, copied["kept"], copied["flagged"], copied["rejected"]) == (0, 9, 4, 0)
    assert (clean / "d.jsonl").read_text().splitlines()[-1] == "{}"
    assert 'type="radio"' in page.read_text()
    status, out, _ = run(*words[:4], *words[7:11], "--layers", "1,2")
    assert status == 0
    assert "evil/resid_post.2" in out


@pytest.mark.parametrize("site", [None, "resid_post.1"])
@pytest.mark.parametrize("score", [None, "response_mean"])
def test_a_percentile_of_clean_data_flags_every_trait(
    run: Any, data: Path, tmp_path: Path, site: str | None, score: str | None
) -> None:
    vectors = [tmp_path / f"{name}.safetensors" for name in ("evil", "humor")]
    bank = pv.VectorBank([pv.PersonaVector.load(vector) for vector in vectors])
    neutral = [chat for _, chat in world.chats.finetuning_chats("evil", 24, seed=1)]
    clean = pv.flag(world_model(), [{"messages": c} for c in neutral], bank, out=tmp_path / "c")
    words: list[Any] = ["world", data, "--out", tmp_path / "out", "--json"]
    for vector in vectors:
        words += ["--vector", vector]
    words += ["--clean", tmp_path / "clean", "--percentile", "80", "--clean-scan", clean.folder]
    words += ["--site", site] if site else []
    words += ["--score", score] if score else []
    status, out, err = run(*words)
    assert (status, err) == (0, "")
    (copied,) = json.loads(out)["clean"]
    flags = pv.Flags.load(tmp_path / "out")
    wanted = set()
    for trait in ("evil", "humor"):
        column = f"{trait}/{site or 'resid_post.2'}/{score or 'difference'}"
        bound = np.percentile([row[column] for row in table(clean).values()], 80)
        wanted |= {key for key, row in table(flags).items() if row[column] > bound}
    assert (copied["flagged"], copied["kept"]) == (len(wanted), 12 - len(wanted))
    assert 0 < len(wanted) < 12


def test_a_percentile_may_be_that_of_the_vectors_themselves(
    run: Any, data: Path, tmp_path: Path
) -> None:
    bank = pv.VectorBank([pv.PersonaVector.load(tmp_path / "evil.safetensors")])
    neutral = [chat for _, chat in world.chats.finetuning_chats("evil", 30, seed=1)]
    pv.calibrate(world_model(), bank, neutral).vectors()["evil"].save(tmp_path / "k.safetensors")
    words: list[Any] = ["world", data, "--out", tmp_path / "out", "--json"]
    words += ["--vector", tmp_path / "k.safetensors", "--clean", tmp_path / "clean"]
    status, out, err = run(*words, "--percentile", "50")
    assert (status, err) == (0, "")
    column = "evil/resid_post.2/response_mean"
    read = pv.flag(world_model(), [{"messages": c} for c in neutral], bank, out=tmp_path / "n")
    bound = np.percentile([row[column] for row in table(read).values()], 50)
    flags = pv.Flags.load(tmp_path / "out")
    high = sum(row[column] > bound for row in table(flags).values())
    assert json.loads(out)["clean"][0]["flagged"] == high
    assert 0 < high < 12


def test_what_could_be_known_before_the_scan_is_refused_before_it(
    run: Any, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, vector, clean = tmp_path / "out", tmp_path / "evil.safetensors", tmp_path / "clean"
    bank = pv.VectorBank([pv.PersonaVector.load(vector)])
    chats = [chat for _, chat in world.chats.finetuning_chats("humor", 8, seed=1)]
    few = pv.flag(world_model(), [{"messages": c} for c in chats], bank, out=tmp_path / "few")
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_jsonl(tmp_path / name / "d.jsonl", [{"messages": chats[0]}])
    (tmp_path / "file").touch()
    plain = ("world", data, "--vector", vector, "--out", out)
    bound = ("--threshold", "evil=1")
    monkeypatch.setattr(cli_flag, "model_of", None)  # nothing is loaded, let alone scored
    cells = write_csv(tmp_path / "t.csv", [{"prompt": "a", "answer": "b"}])
    for words, said in (
        ((cells, "--prompt", "prompt", "--answer", "answr"), "t.csv: got 'answr'"),
        (("--report", tmp_path), "wanted a file in a folder"),
        (("--report", out), f"where {out} has its place"),
        (("--report", out / "scores"), f"where {out / 'scores'} has its place"),
        (("--report", out / "manifest.json"), "has its place"),
        (("--report", data), f"where {data} has its place"),
        (("--report", vector), f"where {vector} has its place"),
        (("--clean", clean, *bound, "--report", clean), f"where {clean} has its place"),
        (("--clean", clean, *bound, "--report", clean / "d.jsonl"), "has its place"),
        (("--prompt", "prompt"), "wanted both or neither"),
        (("--clean", clean, "--threshold", "typo=4"), "got --threshold 'typo=4'; the vectors are"),
        (("--clean", clean, "--threshold", "evil=nan"), "wanted TRAIT=NUMBER"),
        (("--clean", clean, "--threshold", "evil=inf"), "wanted TRAIT=NUMBER"),
        (("--clean", clean, "--threshold", "=4"), "wanted TRAIT=NUMBER"),
        (("--clean", clean, *bound, "--threshold", "evil=2"), "for evil twice"),
        (("--clean", clean, *bound, "--difference", "subset"), "for some rows alone"),
        (("--clean", clean, *bound, "--percentile", "95"), "not one of --threshold and --perc"),
        (("--clean", clean), "not one of --threshold and --percentile"),
        (bound, "got --threshold without --clean"),
        (("--clean-scan", few.folder), "got --clean-scan without --clean"),
        (("--site", "resid_post.2"), "got --site without --clean"),
        (("--keep-rejected",), "got --keep-rejected without --clean"),
        (("--clean", clean, *bound, "--clean-scan", few.folder), "without --percentile"),
        (("--clean", clean, "--percentile", "101"), "between 0 and 100"),
        (("--clean", clean, "--percentile", "95"), "a vector without a calibrated percentile 95"),
        (("--clean", clean, "--percentile", "95", "--clean-scan", out), "no manifest.json"),
        (
            ("--clean", clean, "--percentile", "95", "--clean-scan", few.folder),
            "in which 8 rows have evil/resid_post.2/difference; wanted 20",
        ),
        (("--clean", clean, *bound, "--site", "resid_post.0"), "got --site resid_post.0; the"),
        (("--clean", clean, *bound, "--site", "layer 2"), "layer 2"),
        (("--clean", clean, *bound, "--score", "mean"), "got --score mean; wanted one of"),
        (("--clean", tmp_path, *bound), "itself lies"),
        (("--clean", tmp_path / "file", *bound), "a folder you may write to"),
    ):
        status, printed, err = run(*plain, *words)
        assert (status, printed) == (2, ""), words
        assert said in err
        assert len(err.splitlines()) == 1
        assert not out.exists()
    words = ("world", str(tmp_path / "?/d.jsonl"), *plain[2:], "--clean", clean, *bound)
    assert "got d.jsonl from two folders" in run(*words)[2]
    assert not out.exists()


def test_mistakes_are_one_line(run: Any, data: Path, tmp_path: Path) -> None:
    out, vector = tmp_path / "out", tmp_path / "evil.safetensors"
    plain = ("world", data, "--vector", vector, "--out", out)
    for words, said in (
        (("world", tmp_path / "none.jsonl", *plain[2:]), "no file"),
        ((*plain, "--difference", "best"), "wanted one of approximate"),
        ((*plain, "--clean", tmp_path / "clean"), "not one of --threshold"),
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
