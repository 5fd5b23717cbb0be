"""Everything a judge server may do wrong: no score is invented, requests stay bounded, and a later
run asks only for what it has no answer to."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from pvcore.judge import Judgements, judge_all
from pvcore.judge_api import ApiJudge
from tests.judge_scenarios import DIGITS, MAX_RETRIES, SCENARIOS
from tests.judge_server import Reply, Server, completion, error

GOOD = completion("70")
TIMEOUT = 0.25


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client backs off as it does, in no time."""
    monkeypatch.setattr(openai._base_client, "INITIAL_RETRY_DELAY", 0.0)


class Play:
    """The trait of the answer `bad` gets what the scenario sends; all else is answered well."""

    def __init__(self) -> None:
        self.bad: list[Reply] = [GOOD]
        self.probe = completion("87")

    def __call__(self, prompt: str, before: int) -> Reply:
        if "write the number" in prompt or "the number 87" in prompt:
            return self.probe
        if "hold together" in prompt:
            return completion("90")
        return self.bad[min(before, len(self.bad) - 1)] if "<bad>" in prompt else GOOD


@pytest.fixture
def play() -> Play:
    return Play()


@pytest.fixture
def server(play: Play) -> Iterator[Server]:
    with Server(play).running() as server:
        yield server


PAIRS = [("why?", "good"), ("why?", "<bad>"), ("how?", "well")]


def judged(server: Server, cache: Path, timeout: float = 30.0) -> Judgements:
    judge = ApiJudge(
        "judge-1",
        base_url=server.base_url,
        api_key="none",
        max_retries=MAX_RETRIES,
        timeout=timeout,
        cache=cache,
    )
    return judge_all(judge, "evil", PAIRS, max_failed=0.5)


def of_bad(server: Server) -> int:
    return sum(n for prompt, n in server.requests.items() if "<bad>" in prompt)


def test_there_are_enough_scenarios() -> None:
    assert len(SCENARIOS) >= 100


def test_without_a_fault_the_row_is_judged(server: Server, tmp_path: Path) -> None:
    result = judged(server, tmp_path / "cache")
    assert result.counts == "judged 3 of 3, failed 0 (refused 0)"
    # 0.9 on the number and 0.05 on 10, as the server says.
    assert result.trait_scores == pytest.approx([(0.9 * 70 + 0.05 * 10) / 0.95] * 3)
    assert result.coherence_scores == pytest.approx([(0.9 * 90 + 0.05 * 10) / 0.95] * 3)
    assert server.n_requests == 6


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_fault_is_a_failure_and_never_a_score(
    name: str, server: Server, play: Play, tmp_path: Path
) -> None:
    scenario = SCENARIOS[name]
    play.bad = [scenario.reply]
    play.probe = scenario.probe or play.probe
    if name == "digits, and a probe refused":
        play.probe = error(400, code="content_filter")
    timeout = TIMEOUT if scenario.reply.end == "hang" else 30.0
    result = judged(server, tmp_path / "cache", timeout)
    row = result.rows[1]
    assert (row.trait_score, row.coherence_score) == (None, None)
    assert row.failure is not None
    assert scenario.says in row.failure
    assert row.failure.startswith("trait: ")
    assert row.refused == (scenario.kind == "refused")
    assert result.n_failed == 1
    assert result.n_refused == (scenario.kind == "refused")
    assert [r.failure for r in (result.rows[0], result.rows[2])] == [None, None]
    assert of_bad(server) == scenario.n_requests

    # The server recovers. Only what was lost is asked for again, and now has a score.
    play.bad = [GOOD]
    before = server.n_requests
    again = judged(server, tmp_path / "cache")
    if scenario.kind == "lost":
        assert again.counts == "judged 3 of 3, failed 0 (refused 0)"
        assert server.n_requests == before + 2  # the trait, and the coherence that waited for it
    else:
        assert again == result
        assert server.n_requests == before


@pytest.mark.parametrize(
    "name", [name for name, scenario in SCENARIOS.items() if scenario.n_requests > 1]
)
def test_what_passes_is_asked_again_at_once(
    name: str, server: Server, play: Play, tmp_path: Path
) -> None:
    play.bad = [SCENARIOS[name].reply, GOOD]
    timeout = TIMEOUT if SCENARIOS[name].reply.end == "hang" else 30.0
    result = judged(server, tmp_path / "cache", timeout)
    assert result.n_failed == 0
    assert result.trait_scores[1] == result.trait_scores[0]
    assert of_bad(server) == 2 + 1  # and once for coherence


def test_digits_count_once_the_model_has_shown_that_it_keeps_numbers_whole(
    server: Server, play: Play, tmp_path: Path
) -> None:
    play.bad = [DIGITS]
    result = judged(server, tmp_path / "cache")
    assert result.trait_scores[1] == pytest.approx((0.3 * 8 + 0.05 * 5) / 0.95)
    assert sum("87" in prompt for prompt in server.requests) == 1
    before = server.n_requests
    assert judged(server, tmp_path / "cache") == result
    assert server.n_requests == before
