"""A judging process is killed at random points and resumed: nothing kept is paid for twice."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pvcore.answers import Answers, key_of
from tests.judge_runner import CONCURRENCY, N_PAIRS
from tests.judge_server import Reply, Server, completion

ROOT = Path(__file__).parents[1]


def script(prompt: str, before: int) -> Reply:
    """A score that depends on the prompt, so that a mixed-up resume would show."""
    number = 10 + sum(map(ord, prompt)) % 80
    return completion(str(number), top=[(str(number), math.log(0.6)), ("10", math.log(0.3))])


@pytest.fixture
def server() -> Iterator[Server]:
    with Server(script).running() as server:
        yield server


@pytest.fixture
def runner(server: Server) -> Iterator[subprocess.Popen[str]]:
    path = os.pathsep.join((str(ROOT), str(ROOT / "kernels")))
    with subprocess.Popen(
        [sys.executable, "-m", "tests.judge_runner", server.base_url],
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


class Killer:
    """Kills the process under way at the `n`-th request: before its reply, or soon after it."""

    def __init__(self, server: Server) -> None:
        self.pid: int | None = None
        self.n_left = 0
        self.delay: float | None = None
        self.lock = threading.Lock()
        self.n_kills = 0
        self.server = server
        server.script, server.after = self.on_request, self.on_reply

    def on_request(self, prompt: str, before: int) -> Reply:
        with self.lock:
            self.n_left -= 1
            if self.n_left == 0 and self.delay is None:
                self.kill()
        return script(prompt, before)

    def on_reply(self, prompt: str) -> None:
        with self.lock:
            due = self.n_left <= 0 and self.delay is not None
        if due:
            time.sleep(self.delay or 0.0)
            with self.lock:
                self.kill()

    def kill(self) -> None:
        if self.pid is not None:
            os.kill(self.pid, signal.SIGKILL)
            self.pid, self.n_kills = None, self.n_kills + 1


def run(
    runner: subprocess.Popen[str], killer: Killer, cache: Path, result: Path
) -> list[object] | None:
    """One process until it ends or is killed; its result, if it came to one."""
    assert runner.stdin is not None
    assert runner.stdout is not None
    with killer.lock:  # no request is looked at before its process is known
        runner.stdin.write(f"{cache}\t{result}\n")
        runner.stdin.flush()
        killer.pid = int(runner.stdout.readline())
    assert runner.stdout.readline() == "ended\n"
    with killer.lock:
        killer.pid = None
    return json.loads(result.read_text("utf-8")) if result.exists() else None


def kept(cache: Path) -> set[str]:
    """The prompts whose answers are in the file."""
    if not cache.exists():
        return set()
    lines = [line for line in cache.read_text("utf-8").splitlines() if line.endswith("}")]
    return {json.loads(line)["pvcore_answer"] for line in lines}


@pytest.mark.slow
def test_a_killed_run_is_resumed_without_paying_twice(
    server: Server, runner: subprocess.Popen[str], tmp_path: Path
) -> None:
    chance = random.Random(0)
    killer = Killer(server)
    whole = run(runner, killer, tmp_path / "whole", tmp_path / "whole.json")
    assert whole is not None
    assert whole[2] == f"judged {N_PAIRS} of {N_PAIRS}, failed 0 (refused 0)"
    assert server.n_requests == 2 * N_PAIRS

    for trial in range(7):
        cache, result = tmp_path / f"{trial}.jsonl", tmp_path / f"{trial}.json"
        server.requests.clear()
        server.sent.clear()
        server.questions.clear()
        kills_before, outcome, n_runs = killer.n_kills, None, 0
        while outcome is None:
            n_runs += 1
            assert n_runs < 40
            killer.n_left = chance.randint(1, 8)
            killer.delay = chance.choice([None, 0.0, 0.0005, 0.001, 0.002])
            known, n_asked = kept(cache), len(server.questions)
            outcome = run(runner, killer, cache, result)
            asked = {key_of(question) for question in server.questions[n_asked:]}
            assert not asked & known
            unkept = {key_of(question) for question in server.questions[n_asked:]} - kept(cache)
            assert len(unkept) <= CONCURRENCY
        assert outcome == whole
        assert len(Answers(cache)) == 2 * N_PAIRS
        kills = killer.n_kills - kills_before
        assert server.n_requests - 2 * N_PAIRS <= kills * CONCURRENCY
    assert killer.n_kills >= 50
