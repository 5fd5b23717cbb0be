"""How long the graph engine's caches are, and which one a reply gets."""

from __future__ import annotations

import pytest
import torch

import pvcore as pv
from pvcore import graph
from pvcore.graph import room
from tests.subjects import fresh, prompts


def test_a_cache_is_at_most_half_as_long_again_as_its_reply_needs() -> None:
    rooms = [room(columns) for columns in range(1, 9000)]
    assert rooms == sorted(rooms)
    assert all(columns <= made for columns, made in enumerate(rooms, 1))
    assert all(made <= max(64, 1.5 * columns) for columns, made in enumerate(rooms, 1))
    # Each length is a step to compile: few of them.
    assert [*dict.fromkeys(rooms)][:9] == [64, 96, 128, 192, 256, 384, 512, 768, 1024]
    assert [*dict.fromkeys(rooms)][-4:] == [4096, 6144, 8192, 10240]


def test_one_cache_serves_until_it_is_too_short_or_much_too_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine, made = fresh("qwen2").model._graphs, list[int]()
    cache_of = graph._static_cache

    def noted(hf: object, length: int) -> object:
        made.append(length)
        return cache_of(hf, length)

    monkeypatch.setattr(graph, "_static_cache", noted)
    first = engine.empty_cache(1, 100)
    assert engine.empty_cache(1, 120) is first  # both take 128
    assert engine.empty_cache(1, 60) is first  # twice what it needs
    second = engine.empty_cache(1, 129)
    assert second is not first
    assert engine.empty_cache(1, 65) is second
    assert engine.empty_cache(1, 20) is not second  # three times what it needs
    assert engine.empty_cache(2, 20) is not second
    assert made == [128, 192, 64, 64]


def test_replies_that_share_a_longer_cache_are_those_of_their_own() -> None:
    alone, after = fresh("qwen2"), fresh("qwen2")
    how = pv.Graph(backend="eager")
    settings = {"max_new_tokens": 6, "do_sample": False}
    given = prompts([5, 3])
    after.model.generate_ids(given, engine=how, max_new_tokens=70, do_sample=False)
    long = after.model._graphs._cache_length
    wanted = alone.model.generate_ids(given, engine=how, **settings)
    got = after.model.generate_ids(given, engine=how, **settings)
    assert after.model._graphs._cache_length == long > alone.model._graphs._cache_length
    assert all(map(torch.equal, got, wanted))
    assert all(len(row) == 6 for row in got)
