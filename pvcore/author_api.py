"""An author behind an OpenAI-compatible server."""

import os
from functools import partial

from pvcore.completions import Ask, Completions
from pvcore.errors import CompletionError


class ApiAuthor:
    """Writes texts with a chat model on a server; what `Trait.from_description` takes as author.

    At `temperature` above 0 a text is drawn once and then kept in the file `cache`, where one is
    given. The other arguments are those of `Completions`.
    """

    def __init__(
        self,
        model: str,
        *,
        temperature: float | int = 1.0,
        max_tokens: int = 16_000,
        cache: str | os.PathLike[str] | None = None,
        base_url: str | None = None,
        api_key: str | None = None,
        max_retries: int = 5,
        timeout: float | int = 600.0,
    ) -> None:
        self._settings = {"temperature": temperature, "max_tokens": max_tokens}
        self._completions = Completions(
            model,
            base_url=base_url,
            api_key=api_key,
            concurrency=1,
            max_retries=max_retries,
            timeout=timeout,
            cache=cache,
        )

    def __call__(self, prompt: str, /) -> str:
        """The text the model writes; `CompletionError` where the server gives none."""
        text = self._completions.one(partial(_text, prompt, self._settings))
        if not text.strip():
            raise CompletionError("got an empty text; wanted one to the prompt. Ask another model")
        return text


async def _text(prompt: str, settings: dict[str, float | int], ask: Ask) -> str:
    return (await ask(prompt, **settings)).text
