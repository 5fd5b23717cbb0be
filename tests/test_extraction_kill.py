"""An extraction is killed at random points and repeated: the same bytes, and nothing done twice."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from pvcore.vectors import VARIANTS
from tests.extraction_runner import BATCH_SIZE, N_QUESTIONS

ROOT = Path(__file__).parents[1]
N_KILLS = 50


@pytest.fixture
def runner() -> Iterator[subprocess.Popen[str]]:
    path = os.pathsep.join((str(ROOT), str(ROOT / "kernels")))
    with subprocess.Popen(
        [sys.executable, "-m", "tests.extraction_runner"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    ) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()
        process.wait(60)


class Trial:
    """One extraction in folders of its own, run as often as it takes."""

    def __init__(self, runner: subprocess.Popen[str], folder: Path) -> None:
        self.runner, self.folder = runner, folder
        self.work, self.out, self.log = folder / "work", folder / "out", folder / "log"
        self.out.mkdir(parents=True)

    def run(self, last: int = 0) -> bool:
        """Whether it came to its end; it kills itself at point `last`, never at 0."""
        assert self.runner.stdin is not None
        assert self.runner.stdout is not None
        self.runner.stdin.write(f"{self.work}\t{self.out}\t{self.log}\t{last}\n")
        self.runner.stdin.flush()
        return self.runner.stdout.readline() == "ended\n"

    @property
    def points(self) -> int:
        return int((self.out / "points").read_text("utf-8"))

    @property
    def vectors(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in self.out.glob("*.safetensors")}

    @property
    def notes(self) -> list[str]:
        return self.log.read_text("utf-8").splitlines() if self.log.exists() else []

    def kept(self, name: str) -> int:
        """Whole lines of a file of the work folder."""
        path = self.work / name
        lines = path.read_bytes().splitlines() if path.exists() else []
        return sum(line.endswith(b"}") and line.count(b'"pvcore_answer"') == 1 for line in lines)

    def stage(self, n_batches: int, n_judged: int) -> str:
        """What it was doing, by what it kept."""
        if self.kept("replies.jsonl") < n_batches:
            return "rollouts"
        return "judging" if self.kept("judgements.jsonl") < n_judged else "pooling"


@pytest.mark.slow
def test_a_killed_extraction_comes_to_the_same_bytes_and_does_nothing_twice(
    runner: subprocess.Popen[str], tmp_path: Path
) -> None:
    chance = random.Random(0)
    whole = Trial(runner, tmp_path / "whole")
    assert whole.run()
    wanted, n_points = whole.vectors, whole.points
    assert wanted.keys() == {f"{variant}.safetensors" for variant in VARIANTS}
    assert len(set(wanted.values())) == len(VARIANTS)
    assert len(set(whole.notes)) == len(whole.notes)  # no text was judged for two rows
    n_batches = -(-2 * N_QUESTIONS // BATCH_SIZE)
    assert sum(note.startswith("wrote") for note in whole.notes) == n_batches
    assert whole.run()  # once more, with nothing left to do
    assert whole.vectors == wanted
    assert sum(note.startswith("wrote") for note in whole.notes) == n_batches

    n_kills, stages = 0, Counter[str]()
    while n_kills < N_KILLS:
        trial = Trial(runner, tmp_path / str(n_kills))
        ended = False
        while not ended:
            n_notes = len(trial.notes)
            kept = trial.kept("replies.jsonl"), trial.kept("judgements.jsonl")
            ended = trial.run(chance.randint(1, n_points))
            n_kills += not ended
            judged = {note for note in trial.notes[:n_notes] if note.startswith("judged")}
            again = [note for note in trial.notes[n_notes:] if note in judged]
            # Only what was under way when the kill came is done again.
            assert len(again) <= len(judged) - kept[1]
            wrote = [note for note in trial.notes[n_notes:] if note.startswith("wrote")]
            assert all(int(note.split()[1]) >= kept[0] for note in wrote)
            if not ended:
                stages[trial.stage(n_batches, whole.kept("judgements.jsonl"))] += 1
        assert trial.vectors == wanted
        assert not list(trial.work.glob(".*"))  # no half-written file is left behind
        assert trial.kept("judgements.jsonl") == whole.kept("judgements.jsonl")
    assert min(stages[stage] for stage in ("rollouts", "judging", "pooling")) >= 3
