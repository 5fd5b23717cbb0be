"""Many workers make the files that one process makes, also when they are killed."""

from __future__ import annotations

import importlib.util
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

import pvcore as pv
from pvcore import cluster, flag_manifest
from pvcore.cluster import (
    Job,
    RowScorer,
    ShardScanner,
    count_shards,
    flag_on_ray,
    refuse_too_few,
)
from pvcore.errors import FlagError, SourceError
from pvcore.flag_progress import follow
from pvcore.flag_settings import Settings
from pvcore.flag_shards import footers, prepare
from pvcore.flag_sources import resolve
from tests.families import tokenizer
from tests.flag_data import as_messages, bank, chats, furthest, model, scores, table, write_jsonl

ROOT = Path(__file__).parents[1]
needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="another version set: make test-scan"
)
PATIENCE = 900  # seconds; starting Ray takes ten on a machine that does nothing else
ROWS = [as_messages(chat) for chat in chats(60)]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_jsonl(tmp_path / "a.jsonl", [{"bad": 1}, *ROWS[:31]])
    write_jsonl(tmp_path / "b.jsonl", ROWS[31:])
    return tmp_path


def job(data: Path, out: Path, **settings: Any) -> Job:
    return Job(
        model=model,
        bank=bank(),
        sources=tuple(resolve(str(data / "*.jsonl"))),
        folder=out,
        settings=Settings(shard_rows=7, **settings),
    )


@pytest.mark.parametrize("difference", ["approximate", "exact"])
def test_shards_made_in_any_order_by_pickled_workers_are_those_of_one_process(
    data: Path, tmp_path: Path, difference: str
) -> None:
    settings: dict[str, Any] = {"difference": difference, "max_new_tokens": 3}
    wanted = pv.flag(
        model(), str(data / "*.jsonl"), bank(), out=tmp_path / "one", shard_rows=7, **settings
    )
    work = job(data, tmp_path / "many", **settings)
    prepare(work.folder)
    assert count_shards(work) == 9
    workers = [pickle.loads(pickle.dumps(ShardScanner(work))) for _ in range(2)]
    for numbers in ([5, 6], [0], [8], [2, 1], [3, 4, 7], [5]):
        made = workers[numbers[0] % 2]({"shard": np.array(numbers)})
        assert made["shard"].tolist() == numbers
    made_now = list(footers(work.folder))
    assert [footer.shard for footer in made_now] == list(range(9))
    meter = follow(iter([7, 3]), work.folder, [3, 7, 8], shown=False)
    held = [footer for footer in made_now if footer.shard != 8]
    assert meter.rows == sum(footer.scored for footer in held) > 0
    assert meter.rejected == sum(footer.rejected for footer in held)
    assert meter.tokens == made_now[3].tokens + made_now[7].tokens > 0  # of what was made now
    assert meter.share == 8 / 9
    for path in (tmp_path / "one").glob("*/*.parquet"):
        assert (work.folder / path.parent.name / path.name).exists()
    flags = pv.flag(
        model(), str(data / "*.jsonl"), bank(), out=work.folder, shard_rows=7, **settings
    )
    assert furthest(scores(flags), scores(wanted)) <= 1e-5
    assert list(flags.rejected()) == list(wanted.rejected())
    with pytest.raises(FlagError, match="got shard 9"):
        workers[0]({"shard": [9]})


def test_a_worker_makes_no_shard_of_a_file_that_has_changed(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = job(data, tmp_path / "out")
    prepare(work.folder)
    made = model()
    flag_manifest.begin(work.folder, work.asked(made, work.moment(made)))
    worker = ShardScanner(work)
    worker({"shard": np.array([0])})
    changed = data / "b.jsonl"
    whole = changed.read_bytes()
    changed.write_bytes(whole)  # touched alone
    worker({"shard": np.array([1])})
    changed.write_bytes(whole.replace(b"Say", b"Yas"))
    with pytest.raises(FlagError, match=r"b\.jsonl, which changed while it was scanned"):
        worker({"shard": np.array([5])})
    assert [footer.shard for footer in footers(work.folder)] == [0, 1]
    changed.write_bytes(whole)
    with pytest.raises(FlagError, match="changed while it was scanned"):
        flag_manifest.begin(work.folder, work.asked(made, work.moment(made)))


@needs_ray
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Ray's own, of its own settings
@pytest.mark.parametrize("when", ["counted", "hashed"])
def test_files_that_change_under_ray_are_one_error(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """Between counting and hashing, when rows behind the last would be lost; and after both."""
    more, out = data / "b.jsonl", tmp_path / "out"
    whole = more.read_bytes()
    name = "count_shards" if when == "counted" else "_map"
    plain = getattr(cluster, name)

    def grows(*given: Any) -> Any:
        found = plain(*given)
        more.write_bytes(whole + whole)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(cluster, name, grows)
        with pytest.raises(FlagError, match=r"written to while|changed while it was scanned"):
            flag_on_ray(model, str(data / "*.jsonl"), bank(), out=out, actors=1, shard_rows=20)
    more.write_bytes(whole)
    if when == "counted":
        flags = flag_on_ray(model, str(data / "*.jsonl"), bank(), out=out, actors=1, shard_rows=20)
        assert flags.scored == 60


def test_rows_are_scored_inside_a_map(data: Path, tmp_path: Path) -> None:
    from datasets import Dataset

    wanted = pv.flag(model(), {"d": ROWS[:20]}, bank(), out=tmp_path / "out")
    scorer = RowScorer(model, bank())
    fresh = pickle.loads(pickle.dumps(scorer))
    rows = [{"messages": row["messages"], "tag": at} for at, row in enumerate(ROWS[:20])]
    rows[4]["messages"] = [{"role": "user", "content": "alone"}]
    mapped = Dataset.from_list(rows).map(fresh, batched=True, batch_size=8)
    columns = [name for name in mapped.column_names if "/" in name]
    assert columns == wanted.columns
    found = {("d", row["tag"]): [row[name] for name in columns] for row in mapped}
    lost = found.pop(("d", 4))
    assert all(value is None or value != value for value in lost)
    expected = scores(wanted)
    del expected["d", 4]
    assert furthest(found, expected) <= 1e-5
    reasons = [row["flag_reason"] for row in mapped]
    assert [at for at, reason in enumerate(reasons) if reason] == [4]
    assert "last turn of role 'user'" in reasons[4]


@pytest.mark.parametrize("form", ["numpy", "arrow", "pandas", "torch"])
def test_rows_of_a_formatted_data_set_are_scored_inside_a_map(form: str) -> None:
    from datasets import Dataset

    plain = Dataset.from_list(ROWS[:9])
    scorer = RowScorer(model, bank())
    wanted = scorer(plain[:])
    found = plain.with_format(form).map(scorer, batched=True, batch_size=9).with_format(None)
    assert found["flag_reason"][:] == [""] * 9
    for name in wanted:
        assert found[name][:] == wanted[name]


@pytest.mark.parametrize(
    ("batch", "said"),
    [
        ({"prompt": "abc", "response": "xyz"}, r"got str in column 'prompt'.*batched=True"),
        ({"id": 3, **ROWS[0]}, r"got int in column 'id'.*batched=True"),
        (ROWS[0], r"got messages in column 'messages', as one row has them.*batched=True"),
        (
            {"prompt": ROWS[0]["messages"][:1], "completion": ROWS[0]["messages"][1:]},
            r"got messages in column 'prompt'",
        ),
        ({"prompt": ["a", "b"], "response": ["c"]}, r"\(2 of prompt, 1 of response\)"),
        ([ROWS[0]], "got list as a batch; wanted a mapping of columns"),
    ],
)
def test_one_row_for_a_batch_is_refused(batch: Any, said: str) -> None:
    with pytest.raises(FlagError, match=said):
        RowScorer(model, bank())(batch)


def test_a_row_whose_projection_overflows_says_so() -> None:
    hooked = model()
    with torch.no_grad():  # "z" overflows wherever it comes up
        hooked.hf.get_input_embeddings().weight[tokenizer().convert_tokens_to_ids("z")] = torch.inf
    scorer = RowScorer(lambda: hooked, bank())
    found = scorer({"prompt": ["a"] * 3, "answer": ["yes", "zoo", "no"]})
    assert [bool(reason) for reason in found["flag_reason"]] == [False, True, False]
    assert "infinite or NaN projection" in found["flag_reason"][1]
    column = found["evil/resid_post.2/difference"]
    assert [value == value for value in column] == [True, False, True]


def test_what_one_machine_refuses_is_refused_on_many(data: Path, tmp_path: Path) -> None:
    foreign = pv.VectorBank([replace(one, model_id="another model") for one in bank()])
    rows = {"prompt": ["a"], "answer": ["yes"]}

    def training() -> pv.HookedModel:
        made = model()
        made.hf.train()
        return made

    for make, vectors, error in (
        (model, foreign, "another model"),
        (training, bank(), "training mode"),
    ):
        with pytest.raises(pv.PvcoreError, match=error):
            RowScorer(make, vectors)(rows)
        work = replace(job(data, tmp_path / error.replace(" ", "-")), model=make, bank=vectors)
        prepare(work.folder)
        with pytest.raises(pv.PvcoreError, match=error):
            ShardScanner(work)({"shard": np.array([0])})
    found = RowScorer(model, foreign, check_model=False)(rows)
    assert found["flag_reason"] == [""]
    with pytest.raises(FlagError, match="got settings replies, shards; wanted some of"):
        flag_on_ray(model, data, bank(), out=tmp_path / "out", replies="x", shards=3)


def test_a_cluster_that_is_too_small_is_refused_before_anything_waits() -> None:
    there = {"CPU": 3.0, "memory": 1e9, "GPU": 1.0}
    refuse_too_few(there, actors=2, cpus=1, gpus=0.5)
    for settings, said in (
        ({"actors": 3, "cpus": 1, "gpus": 0}, "3 CPUs for 3 actors, which take 4 with"),
        ({"actors": 2, "cpus": 1.5, "gpus": 0}, "which take 4 with"),
        ({"actors": 2, "cpus": 1, "gpus": 1}, "got a cluster of 1 GPUs for 2 actors"),
    ):
        with pytest.raises(FlagError, match=said):
            refuse_too_few(there, **settings)  # type: ignore[arg-type]
    with pytest.raises(FlagError, match="got a cluster of 0 CPUs"):
        refuse_too_few({}, actors=1, cpus=1, gpus=0)


@needs_ray
@pytest.mark.slow
def test_too_few_cpus_are_an_error_and_no_wait(data: Path, tmp_path: Path) -> None:
    import ray

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        with pytest.raises(FlagError, match="got a cluster of 2 CPUs for 2 actors"):
            flag_on_ray(model, str(data / "*.jsonl"), bank(), out=tmp_path / "out", shard_rows=7)
    finally:
        ray.shutdown()


def test_a_folder_of_a_model_is_found_from_anywhere(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Job] = []

    def run(job: Job, **_: Any) -> None:
        given.append(job)
        raise InterruptedError

    monkeypatch.setattr(cluster, "_run", run)
    monkeypatch.setitem(sys.modules, "ray", ModuleType("ray"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoint").mkdir()
    for make in ("checkpoint", Path("checkpoint"), "owner/name", model):
        with pytest.raises(InterruptedError):
            flag_on_ray(make, str(data / "*.jsonl"), bank(), out="out")
    whole = str(tmp_path / "checkpoint")
    assert [job.model for job in given] == [whole, whole, "owner/name", model]


def test_a_map_knows_the_model_of_a_folder_by_its_files(tmp_path: Path) -> None:
    from datasets.fingerprint import Hasher

    folder = tmp_path / "checkpoint"
    folder.mkdir()
    weights = folder / "model.safetensors"
    weights.write_bytes(b"one")

    def state() -> str:
        return str(Hasher.hash(RowScorer(str(folder), bank())))

    before = state()
    assert state() == before
    weights.write_bytes(b"two")
    os.utime(weights, ns=(1, 1))
    assert state() != before
    assert Hasher.hash(RowScorer("owner/name", bank())) != before


def test_what_only_this_process_has_is_refused(tmp_path: Path) -> None:
    (tmp_path / "d.csv").write_text("prompt,answer\na,b\n")
    with pytest.raises(SourceError, match="got 'q' as a column"):
        flag_on_ray(model, tmp_path / "d.csv", bank(), out=tmp_path, prompt="q", answer="answer")
    with pytest.raises(FlagError, match="which only this process has"):
        flag_on_ray(model, ROWS, bank(), out=tmp_path)


def test_without_ray_the_extra_is_named_before_a_folder_is_made(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(FlagError, match=r"got no package ray; .*'pvcore\[scan\]'"):
        flag_on_ray(model, str(data / "*.jsonl"), bank(), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


RUNNER = """
import sys
from pathlib import Path
from pvcore.cluster import flag_on_ray
from tests.flag_data import bank, model

def slow():
    import time
    from pvcore.flag_scan import Scorer
    plain = Scorer.__call__
    def call(self, samples):
        time.sleep(float(sys.argv[3]) if len(samples) > 1 else 0)
        return plain(self, samples)
    Scorer.__call__ = call
    return model()

for _ in range(2):
    flags = flag_on_ray(slow, sys.argv[1] + "/*.jsonl", bank(), out=sys.argv[2], shard_rows=7)
    print("scored", flags.scored)
"""


def start(data: Path, out: Path, pause: float) -> subprocess.Popen[str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [
            sys.executable,
            "-c",
            RUNNER.replace("sys.argv[3]", repr(str(pause))),
            str(data),
            str(out),
        ],
        # Ray's workers step back for everything else, which on a busy machine means for ever.
        env=os.environ | {"PYTHONPATH": path, "RAY_worker_niceness": "0"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
    )


def output(process: subprocess.Popen[str]) -> str:
    """What a driver printed; one that hangs is killed, and says so."""
    try:
        return process.communicate(timeout=PATIENCE)[0]
    except subprocess.TimeoutExpired:
        process.kill()
        return f"hung: {process.communicate()[0][-500:]}"


def some_shards(out: Path, count: int) -> None:
    deadline = time.monotonic() + PATIENCE
    while len(list(out.glob("scores/part-*.parquet"))) < count:
        assert time.monotonic() < deadline
        time.sleep(0.02)


@needs_ray
@pytest.mark.slow
def test_ray_gives_the_same_scores_and_flags_though_an_actor_is_killed(
    data: Path, tmp_path: Path
) -> None:
    wanted = pv.flag(model(), str(data / "*.jsonl"), bank(), out=tmp_path / "one", shard_rows=7)
    out = tmp_path / "ray"
    with start(data, out, 1.0) as process:
        some_shards(out, 2)
        victim = next(pid for pid, name in children(process.pid) if "MapWorker" in name)
        os.kill(victim, signal.SIGKILL)
        said = output(process)
    # The second call finds a finished scan: nothing is left for Ray to wait for.
    assert said.count("scored 60") == 2, said
    flags = pv.Flags.load(out)
    assert len(table(flags)) == 60
    assert furthest(scores(flags), scores(wanted)) <= 1e-5
    for trait in flags.traits:
        assert [row.row for row in flags.top(trait, 9)] == [r.row for r in wanted.top(trait, 9)]
    assert flags.manifest["totals"] == wanted.manifest["totals"]
    assert list(flags.rejected()) == list(wanted.rejected())


@needs_ray
@pytest.mark.slow
def test_a_killed_driver_loses_and_doubles_nothing(data: Path, tmp_path: Path) -> None:
    wanted = pv.flag(model(), str(data / "*.jsonl"), bank(), out=tmp_path / "one", shard_rows=7)
    out = tmp_path / "driver"
    with start(data, out, 3.0) as process:
        some_shards(out, 3)
        below = [pid for pid, _ in children(process.pid)]
        process.kill()
        process.wait(60)
    for pid in below:  # what a machine that went down would take with it
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    done = len(list(footers(out)))
    assert 3 <= done < 9
    with start(data, out, 0.0) as process:
        said = output(process)
    assert said.count("scored 60") == 2, said
    assert len(table(pv.Flags.load(out))) == 60
    assert furthest(scores(pv.Flags.load(out)), scores(wanted)) <= 1e-5
    assert json.loads((out / "manifest.json").read_text())["status"] == "complete"


def children(pid: int) -> list[tuple[int, str]]:
    """Every process below one, with its title."""
    import psutil

    found = []
    for child in psutil.Process(pid).children(recursive=True):
        try:
            found.append((child.pid, " ".join(child.cmdline())))
        except psutil.NoSuchProcess:
            continue
    return found
