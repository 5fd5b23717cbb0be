"""How long the static caches are that a test makes."""

from typing import Any

import pytest
from transformers import StaticCache


def lengths_made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The length of every static cache from now on, as it is made."""
    lengths: list[int] = []
    made = StaticCache.__init__

    def noted(self: StaticCache, *args: Any, **given: Any) -> None:
        lengths.append(given["max_cache_len"])
        made(self, *args, **given)

    monkeypatch.setattr(StaticCache, "__init__", noted)
    return lengths
