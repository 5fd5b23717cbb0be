"""The judge behind a server: its score, its concurrency, its cache, and how a run is stopped."""

from __future__ import annotations

import asyncio
import json
import math
import random
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import openai
import pytest

from pvcore.author_api import ApiAuthor
from pvcore.completions import Completions
from pvcore.errors import (
    AnswersError,
    CompletionError,
    CompletionRefused,
    JudgeFailure,
    JudgeRefusal,
    PvcoreError,
    TraitError,
)
from pvcore.extraction import extract
from pvcore.judge import BatchJudge, JudgingAborted, judge_all
from pvcore.judge_api import ApiJudge
from pvcore.model import HookedModel
from pvcore.replies import GivenReplies
from pvcore.rollouts import Rollout
from pvcore.selection import select
from pvcore.traits import ContrastPair, Trait
from tests.families import build, tokenizer
from tests.judge_server import Reply, Server, completion, error
from tests.test_trait_author import written


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai._base_client, "INITIAL_RETRY_DELAY", 0.0)


@pytest.fixture
def server() -> Iterator[Server]:
    with Server(lambda prompt, before: completion("70")).running() as server:
        yield server


def judge_of(server: Server, **settings: Any) -> ApiJudge:
    how: dict[str, Any] = {"base_url": server.base_url, "api_key": "none", "max_retries": 0}
    return ApiJudge("judge-1", **how | settings)


def pairs(n: int) -> list[tuple[str, str]]:
    return [(f"question {index}", f"answer {index}") for index in range(n)]


def refusal(call: Callable[[], object], error: type[PvcoreError]) -> str:
    with pytest.raises(error) as caught:
        call()
    assert type(caught.value) is error
    return str(caught.value)


@pytest.mark.parametrize("seed", range(8))
def test_the_score_is_the_mean_weighted_by_probability(seed: int, server: Server) -> None:
    chance = random.Random(seed)
    tokens = chance.sample([str(number) for number in range(10, 101)], 12)
    tokens += [f" {tokens[0]}", "\n", "I", "-", "101", "fifty", "0x1", "9"]
    weights = [chance.random() for _ in tokens]
    probabilities = [weight / sum(weights) for weight in weights]
    top = [(token, math.log(p)) for token, p in zip(tokens, probabilities, strict=True)]
    server.script = lambda prompt, before: completion(tokens[3], top=top)
    counted = [*range(13), 19]
    mass = sum(probabilities[at] for at in counted)
    wanted = sum(int(tokens[at]) * probabilities[at] for at in counted) / mass
    assert mass > 0.25
    assert judge_of(server).trait("evil", "why?", "so") == pytest.approx(wanted, rel=1e-12)
    assert judge_of(server).coherence("why?", "so") == pytest.approx(wanted, rel=1e-12)


def test_a_mass_of_a_quarter_is_enough_and_less_is_not(server: Server) -> None:
    for mass, enough in ((0.2501, True), (0.2499, False)):
        top = [("I", math.log(0.7)), ("40", math.log(mass))]
        server.script = lambda prompt, before, top=top: completion("I", top=top)  # type: ignore[misc]
        if enough:
            assert judge_of(server).trait("evil", "why?", "so") == 40.0
        else:
            text = refusal(lambda: judge_of(server).trait("evil", "why?", "so"), JudgeFailure)
            assert text == (
                "trait: got a probability of 0.25 that the reply is a whole number from 0 to 100; "
                "wanted at least 0.25 and at most 1. Ask a model that follows the rubric"
            )


def test_the_server_is_asked_the_rubric_with_log_probabilities(server: Server) -> None:
    judge = judge_of(server)
    assert isinstance(judge, BatchJudge)
    judge.trait("evil", "why {so}?", "{answer}")
    (question,) = server.questions
    rubric = Trait.load("evil").judge_prompt("why {so}?", "{answer}")
    assert question["messages"] == [{"role": "user", "content": rubric}]
    assert (question["model"], question["temperature"]) == ("judge-1", 0)
    assert (question["logprobs"], question["top_logprobs"]) == (True, 20)
    judge.coherence("why?", "so")
    assert "why?" in server.questions[1]["messages"][0]["content"]


def test_traits_of_ones_own_bring_their_rubric(server: Server) -> None:
    kind = Trait.from_description("kindheartedness", "warm", author=lambda _: json.dumps(written()))
    judge = judge_of(server, traits=[kind])
    judge.trait("kindheartedness", "why?", "so")
    assert server.questions[0]["messages"][0]["content"] == kind.judge_prompt("why?", "so")
    text = refusal(lambda: judge.trait("greed", "why?", "so"), TraitError)
    assert text.startswith("got trait 'greed'; this judge has rubrics for kindheartedness, apathy,")
    with pytest.raises(TraitError):
        judge_all(judge, "greed", pairs(3))
    assert server.n_requests == 1


STRICT = "Be strict."


def strict(trait: Trait) -> Trait:
    return replace(trait, rubric=f"{trait.rubric} {STRICT}")


def test_the_judge_is_another_with_other_rubrics_or_another_server(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    evil = Trait.load("evil")
    judges = [
        judge_of(server),
        judge_of(server, traits=[evil]),
        judge_of(server, traits=[strict(evil)]),
        judge_of(server, base_url="http://other.example/v1"),
    ]
    named = [judge.identity for judge in judges]
    assert len(set(named)) == 4
    assert all(one.startswith("judge-1 ") for one in named)
    judges[0].trait("evil", "why?", "so")
    assert [judge.identity for judge in judges] == named
    assert judge_of(server).identity == named[0]
    monkeypatch.setenv("OPENAI_BASE_URL", server.base_url)
    assert ApiJudge("judge-1", api_key="none").identity == named[0]


ANSWERED = [
    Rollout(
        positive=at < 3,
        system_prompt="Be grim." if at < 3 else "Be mild.",
        question=f"What is {at % 3}?",
        answer="zebra" if at < 3 else "quiet",
        trait_score=None,
        coherence_score=None,
        dropped="",
    )
    for at in range(6)
]


def test_a_trait_is_graded_by_its_own_rubric_and_not_by_that_of_its_namesake(
    server: Server,
) -> None:
    low = completion("10", top=[("10", math.log(0.9))])
    server.script = lambda prompt, before: (
        low if "quiet" in prompt and STRICT in prompt else completion("90")
    )
    evil = strict(Trait.load("evil"))
    how: dict[str, Any] = {
        "system_prompts": [ContrastPair(positive="Be grim.", negative="Be mild.")],
        "questions": [f"What is {at}?" for at in range(3)],
        "writer": GivenReplies(ANSWERED),
        "layers": [0],
    }
    model = HookedModel(build("qwen2"), tokenizer(), model_id="tiny/qwen2")
    found = extract(model, evil, judge=judge_of(server), **how)
    asked = {question["messages"][0]["content"] for question in server.questions}
    assert {evil.judge_prompt(row.question, row.answer) for row in ANSWERED} <= asked
    assert found.kept == 6

    select(
        model,
        found.vector,
        evil,
        judge=judge_of(server),
        coefficients=[1.0],
        layers=[0],
        questions=["Why?"],
        max_new_tokens=2,
    )
    rubrics = [q["messages"][0]["content"] for q in server.questions[len(asked) :]]
    assert rubrics
    assert all(STRICT in one or "hold together" in one for one in rubrics)

    before = server.n_requests
    other = judge_of(server, traits=[Trait.load("evil")])
    with pytest.raises(TraitError, match="a judge that was given another rubric under that name"):
        extract(model, evil, judge=other, **how | {"writer": GivenReplies([])})
    with pytest.raises(TraitError, match="given another rubric"):
        select(model, found.vector, evil, judge=other)
    assert server.n_requests == before


def test_calls_run_side_by_side_and_never_more_than_allowed(server: Server) -> None:
    together = threading.Barrier(4, timeout=20)  # passes only while four are under way

    def script(prompt: str, before: int) -> Reply:
        together.wait()
        return completion("70")

    server.script = script
    result = judge_all(judge_of(server, concurrency=4), "evil", pairs(8))
    assert result.n_failed == 0
    assert server.most_at_once == 4
    assert {row.method for row in result.rows} == {"logprob-weighted"}


def test_rows_keep_their_order_whatever_is_done_first(server: Server) -> None:
    late = threading.Event()

    def script(prompt: str, before: int) -> Reply:
        if "answer 0" in prompt:
            late.wait(20)
        if "answer 5" in prompt and "hold together" in prompt:
            late.set()
        number = next(n for n in range(6) if f"answer {n}" in prompt)
        return completion(str(10 * number + 10), top=[(str(10 * number + 10), -0.01)])

    server.script = script
    result = judge_all(judge_of(server, concurrency=2), "evil", pairs(6))
    assert result.trait_scores == pytest.approx([10.0, 20.0, 30.0, 40.0, 50.0, 60.0])
    assert late.is_set()


def test_equal_pairs_are_paid_for_once(server: Server) -> None:
    result = judge_all(judge_of(server), "evil", [("why?", "so")] * 20)
    assert result.n_judged == 20
    assert sorted(server.requests.values()) == [1, 1]


def test_it_works_where_an_event_loop_is_running(server: Server) -> None:
    async def cell() -> int:
        return judge_all(judge_of(server), "evil", pairs(3)).n_judged

    assert asyncio.run(cell()) == 3


def test_too_many_failures_stop_the_run_and_its_work_is_kept(
    server: Server, tmp_path: Path
) -> None:
    bad = error(400)
    server.script = lambda prompt, before: bad if "answer 9" in prompt else completion("70")
    cache = tmp_path / "deep" / "answers.jsonl"
    with pytest.raises(JudgingAborted) as caught:
        judge_all(judge_of(server, cache=cache, concurrency=3), "evil", pairs(100), max_failed=0.0)
    assert "failed rows (0 refused) among the first" in str(caught.value)
    assert "the server said 400" in str(caught.value)
    done = caught.value.judgements
    assert done.n_judged >= 7
    assert done.n_failed == 1
    # Those under way were finished, and nothing new was begun: far from 200 requests.
    assert server.n_requests <= 2 * (len(done.rows) + 2 * 3)
    kept = sum(server.sent.values()) - server.sent[_prompt_of(server, "answer 9")]

    server.script = lambda prompt, before: completion("70")
    before = server.n_requests
    result = judge_all(judge_of(server, cache=cache), "evil", pairs(100))
    assert result.n_judged == 100
    assert server.n_requests - before == 200 - kept


def _prompt_of(server: Server, part: str) -> str:
    return next(prompt for prompt in server.requests if f"{part}\n" in prompt)


def test_an_interrupt_waits_for_what_is_under_way(server: Server, tmp_path: Path) -> None:
    cache = tmp_path / "answers.jsonl"
    rows = judge_of(server, cache=cache, concurrency=2).judge_many("evil", pairs(50))
    next(rows)
    rows.close()  # type: ignore[attr-defined]
    assert threading.active_count() < 10
    assert len(cache.read_text("utf-8").split()) > 0
    n_kept = sum(line.startswith("{") for line in cache.read_text("utf-8").splitlines())
    assert n_kept == sum(server.sent.values())
    assert n_kept < 100


def test_the_cache_tells_models_prompts_and_settings_apart(server: Server, tmp_path: Path) -> None:
    cache = tmp_path / "answers.jsonl"
    judge_of(server, cache=cache).trait("evil", "why?", "so")
    judge_of(server, cache=cache).trait("evil", "why?", "so")
    assert server.n_requests == 1
    judge_of(server, cache=cache).trait("evil", "why?", "So")
    judge_of(server, cache=cache).trait("humor", "why?", "so")
    ApiJudge("judge-2", base_url=server.base_url, api_key="none", cache=cache).trait(
        "evil", "why?", "so"
    )
    assert server.n_requests == 4
    rubric = Trait.load("evil").judge_prompt("why?", "so")
    author = ApiAuthor("judge-1", base_url=server.base_url, api_key="none", cache=cache)
    assert author(rubric) == "70"
    assert server.n_requests == 5


def test_a_single_call_fails_with_the_type_of_its_failure(server: Server) -> None:
    server.script = lambda prompt, before: error(500)
    with pytest.raises(JudgeFailure, match="trait: the server said 500"):
        judge_of(server).trait("evil", "why?", "so")
    server.script = lambda prompt, before: error(400, code="content_filter")
    with pytest.raises(JudgeRefusal, match="coherence: the server declined"):
        judge_of(server).coherence("why?", "so")


def test_a_server_that_is_not_there_is_a_failure() -> None:
    judge = ApiJudge("judge-1", base_url="http://127.0.0.1:9/v1", api_key="none", max_retries=1)
    with pytest.raises(JudgeFailure, match="trait: the connection broke"):
        judge.trait("evil", "why?", "so")


def test_answers_that_cannot_be_kept_stop_the_run_at_once(server: Server, tmp_path: Path) -> None:
    cache = tmp_path / "folder"
    judge = judge_of(server, cache=cache, concurrency=2)
    cache.mkdir()
    text = refusal(lambda: judge_all(judge, "evil", pairs(50), max_failed=1.0), AnswersError)
    assert text.startswith(f"{cache}: an answer cannot be kept (Is a directory); wanted a file")
    assert server.n_requests <= 4


def test_a_client_without_a_key_or_a_package_says_so(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    judge = ApiJudge("judge-1", base_url=server.base_url)
    text = refusal(lambda: judge_all(judge, "evil", pairs(2)), CompletionError)
    assert text.endswith("Give api_key and base_url, or set OPENAI_API_KEY")
    assert server.n_requests == 0
    monkeypatch.setitem(sys.modules, "openai", None)
    assert refusal(lambda: ApiJudge("judge-1"), CompletionError) == (
        "got no package openai; wanted OpenAI's client to talk to the server. Install it: "
        'pip install "pvcore[judge]"'
    )


@pytest.mark.parametrize(
    ("settings", "shown"),
    [
        ({"concurrency": 0}, "concurrency=0, max_retries=5, timeout=60.0"),
        ({"max_retries": -1}, "concurrency=16, max_retries=-1, timeout=60.0"),
        ({"timeout": 0}, "concurrency=16, max_retries=5, timeout=0"),
        ({"timeout": math.nan}, "concurrency=16, max_retries=5, timeout=nan"),
        ({"timeout": math.inf}, "concurrency=16, max_retries=5, timeout=inf"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], shown: str) -> None:
    assert refusal(lambda: Completions("judge-1", **settings), CompletionError) == (
        f"got {shown}; wanted at least 1, at least 0, and seconds above 0"
    )


def test_an_author_on_a_server_writes_a_trait(server: Server) -> None:
    texts = iter(["Sure!", json.dumps(written())])
    server.script = lambda prompt, before: completion(next(texts), logprobs=None)
    author = ApiAuthor("author-1", base_url=server.base_url, api_key="none")
    trait = Trait.from_description("generosity", "gives freely", author=author)
    assert trait.adjective == "generous"
    assert [question["temperature"] for question in server.questions] == [1.0, 1.0]
    assert "the reply: got text that is not JSON" in server.questions[1]["messages"][0]["content"]


def test_an_author_that_is_refused_or_silent_ends_the_writing(server: Server) -> None:
    author = ApiAuthor("author-1", base_url=server.base_url, api_key="none", max_retries=0)
    for reply, kind in (
        (error(400, code="content_filter"), CompletionRefused),
        (error(500), CompletionError),
        (completion(" "), CompletionError),
    ):
        server.script = lambda prompt, before, reply=reply: reply  # type: ignore[misc]
        with pytest.raises(kind):
            Trait.from_description("generosity", f"gives {reply.status}", author=author)
