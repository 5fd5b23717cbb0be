"""A writer of replies behind an OpenAI-compatible server, for text that nothing steers."""

import os
from collections.abc import Sequence
from functools import partial
from hashlib import sha256

from pvcore.completions import Ask, Completions
from pvcore.errors import CompletionRefused
from pvcore.rollouts import Conversation, Turn


class ApiWriter:
    """Writes replies with a chat model on a server, such as vLLM with the model to be extracted on.

    Every reply is asked for with a seed of its own, made of `seed`, its batch and its place, so
    that copies of one turn differ; a server that ignores seeds makes them differ by chance. What
    the server declines has no reply. Answers are kept in the file `cache`. The other arguments are
    those of `Completions`.
    """

    def __init__(
        self,
        model: str,
        *,
        max_new_tokens: int = 64,
        temperature: float | int = 1.0,
        seed: int = 0,
        cache: str | os.PathLike[str] | None = None,
        base_url: str | None = None,
        api_key: str | None = None,
        concurrency: int = 16,
        max_retries: int = 5,
        timeout: float | int = 600.0,
    ) -> None:
        self._seed, self._temperature = seed, float(temperature)
        self._max_new_tokens = max_new_tokens
        self._completions = Completions(
            model,
            base_url=base_url,
            api_key=api_key,
            concurrency=concurrency,
            max_retries=max_retries,
            timeout=timeout,
            cache=cache,
        )

    @property
    def identity(self) -> dict[str, str | int | float]:
        return {
            "writer": f"server model {self._completions.model}",
            "seed": self._seed,
            "temperature": self._temperature,
            "longest reply": self._max_new_tokens,
        }

    def write(self, turns: Sequence[Turn], *, batch: int) -> list[str | None]:
        """The replies; `CompletionError` where the server gives none, with those given kept."""
        jobs = [
            partial(self._reply, turn.chat, self._seed_of(f"{batch}/{place}"))
            for place, turn in enumerate(turns)
        ]
        replies = dict(self._completions.each(jobs))
        return [replies[place] for place in range(len(turns))]

    def _seed_of(self, place: str) -> int:
        key = f"{self._seed}/{place}".encode()
        return int.from_bytes(sha256(key).digest()[:4], "big") >> 1  # servers take 31 bits

    async def _reply(self, chat: Conversation, seed: int, ask: Ask) -> str | None:
        settings = {"temperature": self._temperature, "max_tokens": self._max_new_tokens}
        try:
            return (await ask(chat, seed=seed, **settings)).text
        except CompletionRefused:
            return None
