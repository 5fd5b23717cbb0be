"""Replies: who writes those that a vector is extracted from. A model here, or a list there is.

`pvcore.replies_api` has a writer behind an OpenAI-compatible server.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import sha256
from typing import Any, Protocol, runtime_checkable

import torch

from pvcore.errors import ExtractionError
from pvcore.fingerprints import of_text
from pvcore.graph import Engine, Graph
from pvcore.model import HookedModel
from pvcore.plain_generation import plain_settings
from pvcore.request_checks import check_real, check_whole
from pvcore.rollouts import Conversation, Rollout, Turn

Identity = Mapping[str, str | int | float]


@runtime_checkable
class Writer(Protocol):
    """Writes one reply to each turn, a batch of them at a time; None for one it declines."""

    @property
    def identity(self) -> Identity:
        """What decides the replies beside the turns: a run is taken up again only by its equal."""
        ...

    def write(self, turns: Sequence[Turn], *, batch: int) -> Sequence[str | None]:
        """The replies to batch number `batch`, the same each time it is asked for."""
        ...


class ModelWriter:
    """Plain samples of a model: what its own generation config says of sampling is switched off.

    Every batch is seeded by `seed` and its number, so that one machine repeats it; the random state
    outside is left as it was. Temperature 0 means greedy. `engine` is that of `generate`.
    """

    def __init__(
        self,
        model: HookedModel,
        *,
        max_new_tokens: int,
        temperature: float | int = 1.0,
        seed: int = 0,
        engine: Engine | Graph | str = "eager",
    ) -> None:
        check_whole(ExtractionError, 1, max_new_tokens=max_new_tokens)
        check_real(ExtractionError, 0, temperature=temperature)
        check_whole(ExtractionError, seed=seed)
        self._model, self._seed, self._engine = model, seed, engine
        self._max_new_tokens, self._temperature = max_new_tokens, temperature

    @property
    def identity(self) -> Identity:
        return {
            "writer": "the model itself",
            "seed": self._seed,
            "temperature": float(self._temperature),
            "longest reply": self._max_new_tokens,
            "engine": str(self._engine),
        }

    def write(self, turns: Sequence[Turn], *, batch: int) -> list[str | None]:
        return [*self.sampled([turn.chat for turn in turns], batch=batch)]

    def sampled(self, chats: Sequence[Conversation], *, batch: int) -> list[str]:
        """The replies to any chats, as batch number `batch`."""
        settings = plain_settings(self._model.hf, self._temperature, self._max_new_tokens)
        with _seeded(f"{self._seed}/{batch}"):
            return self._model.generate(chats, engine=self._engine, **settings)


class GivenReplies:
    """Replies that were written elsewhere: those of rollouts, found by system prompt and question.

    Where one turn was answered several times, its copies take the answers in their order. Raises
    `ExtractionError` for a turn that has no answer left.
    """

    def __init__(self, rollouts: Iterable[Rollout]) -> None:
        self._answers: dict[tuple[str, str], list[str]] = defaultdict(list)
        for one in rollouts:
            self._answers[one.system_prompt, one.question].append(one.answer)

    @property
    def identity(self) -> Identity:
        held = sorted([*place, *answers] for place, answers in self._answers.items())
        return {"writer": "given replies", "replies": of_text(held)}

    def write(self, turns: Sequence[Turn], *, batch: int) -> list[str | None]:
        return [self._answer(turn) for turn in turns]

    def _answer(self, turn: Turn) -> str:
        answers = self._answers.get((turn.system_prompt, turn.question), [])
        if turn.copy >= len(answers):
            raise ExtractionError(
                f"got {len(answers)} given replies to {turn.question!r} under "
                f"{turn.system_prompt!r}; wanted {turn.copy + 1}. Give the prompts and questions "
                "that were answered, and no more rollouts than there are"
            )
        return answers[turn.copy]


def sample_replies(
    model: HookedModel,
    chats: Sequence[Conversation],
    *,
    max_new_tokens: int,
    temperature: float | int = 1.0,
    batch_size: int = 64,
    seed: int = 0,
    progress: bool = False,
) -> list[str]:
    """Plain samples of a model, as `ModelWriter` writes them, to any chats.

    Every batch is seeded by `seed` and its place, so the same call gives the same replies on one
    machine.
    """
    writer = ModelWriter(model, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
    replies: list[str] = []
    for batch, chosen in enumerate(batches(chats, batch_size, "sampling" if progress else "")):
        replies += writer.sampled(chosen, batch=batch)
    return replies


def batches(things: Sequence[Any], batch_size: int, what: str = "") -> Iterator[Sequence[Any]]:
    """Batches in order, the last one may be smaller; a bar is shown under the name `what`."""
    if batch_size < 1:
        raise ExtractionError(f"got batch_size={batch_size}; wanted at least 1")
    firsts = range(0, len(things), batch_size)
    for first in shown(firsts, what) if what else firsts:
        yield things[first : first + batch_size]


def shown(steps: Sequence[int], what: str) -> Iterable[int]:
    """The steps, with a bar on standard error."""
    # Imported here, because rich draws random numbers when it is imported.
    from rich.console import Console
    from rich.progress import track

    return track(steps, description=what, console=Console(stderr=True))


@contextmanager
def _seeded(key: str) -> Iterator[None]:
    # Seeding reaches every CUDA device, so the state of each is put back.
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    with torch.random.fork_rng(devices=list(devices)):
        torch.manual_seed(int.from_bytes(sha256(key.encode()).digest()[:7], "big"))
        yield
