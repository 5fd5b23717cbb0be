"""Replies from a server: what is asked, what is declined, and what is not paid for again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

import pvcore as pv
from pvcore.errors import CompletionError
from pvcore.extraction import extract
from pvcore.replies import Writer
from pvcore.replies_api import ApiWriter
from pvcore.rollouts import Turn
from tests.judge_server import Reply, Server, completion, error
from tests.test_extraction import PROMPTS, QUESTIONS, TRAIT, YesOrNo, fresh_model


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai._base_client, "INITIAL_RETRY_DELAY", 0.0)


def script(prompt: str, before: int) -> Reply:
    return completion(f"I say {prompt}", tokens=[])


@pytest.fixture
def server() -> Iterator[Server]:
    with Server(script).running() as server:
        yield server


def writer(server: Server, **settings: Any) -> ApiWriter:
    how: dict[str, Any] = {"base_url": server.base_url, "api_key": "none", "max_retries": 0}
    return ApiWriter("writer-1", **how | settings)


def turns(n: int, *, copies: int = 1) -> list[Turn]:
    return [
        Turn(positive=True, system_prompt="Be grim.", question=f"Why {at}?", copy=copy)
        for at in range(n)
        for copy in range(copies)
    ]


def test_each_turn_is_asked_as_its_chat_under_a_seed_of_its_own(server: Server) -> None:
    asked = turns(3, copies=2)
    made = writer(server, temperature=0.7, max_new_tokens=20, seed=5)
    assert isinstance(made, Writer)
    assert made.write(asked, batch=0) == [f"I say {turn.question}" for turn in asked]
    sent = server.questions
    assert sorted(str(one["messages"]) for one in sent) == sorted(str(t.chat) for t in asked)
    assert {(one["model"], one["temperature"], one["max_tokens"]) for one in sent} == {
        ("writer-1", 0.7, 20)
    }
    assert len({one["seed"] for one in sent}) == 6
    assert all(0 <= one["seed"] < 2**31 for one in sent)
    writer(server, seed=6).write(asked, batch=0)
    writer(server, seed=5).write(asked, batch=1)
    assert len({one["seed"] for one in server.questions}) == 18


def test_what_was_written_is_kept_when_the_server_fails_later(
    server: Server, tmp_path: Path
) -> None:
    cache = tmp_path / "answers.jsonl"
    server.script = lambda prompt, before: error(500) if "2" in prompt else script(prompt, before)
    with pytest.raises(CompletionError, match="the server said 500"):
        writer(server, cache=cache, concurrency=1).write(turns(4), batch=0)
    server.script = script
    replies = writer(server, cache=cache, concurrency=1).write(turns(4), batch=0)
    assert replies == [f"I say Why {at}?" for at in range(4)]
    assert server.requests == {"Why 0?": 1, "Why 1?": 1, "Why 2?": 2, "Why 3?": 1}


def test_a_declined_turn_has_no_reply_and_drops_its_pair(server: Server) -> None:
    def mixed(prompt: str, before: int) -> Reply:
        if prompt == QUESTIONS[2]:
            return error(400, code="content_filter")
        system = server.questions[-1]["messages"][0]["content"]
        return completion("yes" if system == PROMPTS[0].positive else "no", tokens=[])

    server.script = mixed
    result = extract(
        fresh_model(),
        TRAIT,
        judge=YesOrNo(),
        system_prompts=PROMPTS[:1],
        questions=QUESTIONS[:4],
        writer=writer(server, concurrency=1),
        layers=[0],
    )
    assert result.reasons == {"the writer declined": 2}
    assert result.kept == 6
    assert "server model writer-1" in result.vector.provenance.note
    assert isinstance(result.vector, pv.PersonaVector)
