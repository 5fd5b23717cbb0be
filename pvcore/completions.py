"""Completions: the one door to servers that speak OpenAI's protocol, and to its client.

Calls run side by side, but never more than a given number; what fails in passing is asked again,
but never more often than given; what was answered is kept, so that nothing is paid for twice.
"""

import asyncio
import os
from collections.abc import Awaitable, Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from threading import Event, Thread
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

from pvcore.answers import Answers, Record, key_of
from pvcore.completion_replies import Reply, read_body
from pvcore.errors import CompletionError, CompletionRefused

T = TypeVar("T")
Settings = Mapping[str, object]
Messages = Sequence[Mapping[str, str]]
_POLICY_CODES = ("content_filter", "content_policy_violation")


@runtime_checkable
class Ask(Protocol):
    """Asks a server a prompt, or the messages of a chat, under settings of a chat completion."""

    async def __call__(self, prompt: str | Messages, **settings: object) -> Reply: ...


Job = Callable[[Ask], Awaitable[T]]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Done(Generic[T]):
    index: int
    result: T | None = None
    error: BaseException | None = None


class Completions:
    """Chat completions of one model on one server.

    `base_url` and `api_key` default to what OpenAI's client takes from the environment. At most
    `concurrency` calls are under way at once; each is sent again after 408, 409, 429, 5xx, a
    timeout of `timeout` seconds or a broken connection, `max_retries` times at most, with the
    client's backoff. Answers are kept in the file `cache`, keyed by model, prompt and settings (not
    by server), or in memory. Redirects are not followed: they would carry the key elsewhere.
    """

    def __init__(
        self,
        model: str,
        *,
        base_url: str | None = None,
        api_key: str | None = None,
        concurrency: int = 16,
        max_retries: int = 5,
        timeout: float | int = 60.0,
        cache: str | os.PathLike[str] | None = None,
    ) -> None:
        if concurrency < 1 or max_retries < 0 or not 0 < timeout < float("inf"):
            raise CompletionError(
                f"got concurrency={concurrency}, max_retries={max_retries}, timeout={timeout}; "
                "wanted at least 1, at least 0, and seconds above 0"
            )
        self.model = model
        self._concurrency = concurrency
        self._answers = Answers(cache)
        self._open = _opener(base_url, api_key, max_retries, float(timeout))

    def one(self, job: Job[T]) -> T:
        """The result of one job."""
        ((_, result),) = self.each([job])
        return result

    def each(self, jobs: Sequence[Job[T]]) -> Generator[tuple[int, T], None, None]:
        """Every job's index and result, in the order they are done.

        The calls run in a thread of their own, so this works where an event loop is running. Closed
        early, it starts no other job and waits for those under way: they are paid for. What a job
        raises ends it all in the same way, and is raised here.
        """
        done: SimpleQueue[_Done[T]] = SimpleQueue()
        stopped = Event()
        thread = Thread(target=self._run, args=(jobs, done, stopped), daemon=True)
        thread.start()
        try:
            for _ in jobs:
                outcome = done.get()
                if outcome.error is not None:
                    raise outcome.error
                yield outcome.index, outcome.result  # type: ignore[misc]
        finally:
            stopped.set()
            thread.join()

    def _run(self, jobs: Sequence[Job[T]], done: "SimpleQueue[_Done[T]]", stopped: Event) -> None:
        try:
            asyncio.run(self._run_all(jobs, done, stopped))
        except BaseException as error:
            # Whatever it is, the consumer waits for a word.
            done.put(_Done(index=-1, error=error))

    async def _run_all(
        self, jobs: Sequence[Job[T]], done: "SimpleQueue[_Done[T]]", stopped: Event
    ) -> None:
        async with self._open() as client:
            ask = _Asking(client, self.model, self._answers)
            waiting = enumerate(jobs)  # shared: each worker takes the next
            workers = min(self._concurrency, len(jobs))
            await asyncio.gather(*(_work(waiting, ask, done, stopped) for _ in range(workers)))


async def _work(
    waiting: Iterator[tuple[int, Job[T]]], ask: Ask, done: "SimpleQueue[_Done[T]]", stopped: Event
) -> None:
    while not stopped.is_set() and (following := next(waiting, None)) is not None:
        index, job = following
        try:
            done.put(_Done(index=index, result=await job(ask)))
        except Exception as error:
            stopped.set()
            done.put(_Done(index=index, error=error))


class _Asking:
    """Asks through one client; a question that is kept, or under way already, is not sent."""

    def __init__(self, client: Any, model: str, answers: Answers) -> None:
        self._client = client
        self._model = model
        self._answers = answers
        self._under_way: dict[str, asyncio.Task[Record]] = {}

    async def __call__(self, prompt: str | Messages, **settings: object) -> Reply:
        alone = isinstance(prompt, str)
        question: dict[str, object] = {
            "model": self._model,
            "messages": [{"role": "user", "content": prompt}] if alone else list(prompt),
            **settings,
        }
        key = key_of(question)
        kept = self._answers.get(key)
        if kept is None:
            if key not in self._under_way:
                self._under_way[key] = asyncio.ensure_future(self._paid(key, question))
            try:
                kept = await self._under_way[key]
            finally:
                self._under_way.pop(key, None)
        return _replayed(kept)

    async def _paid(self, key: str, question: Mapping[str, object]) -> Record:
        answer = await _sent(self._client, question)
        self._answers.put(key, answer)
        return answer


async def _sent(client: Any, question: Mapping[str, object]) -> Record:
    """What the server made of a question, as it is kept: a reply, or why there is none."""
    import openai

    try:
        response = await client.chat.completions.with_raw_response.create(**question)
    except openai.APIStatusError as error:
        if error.status_code in (400, 403, 422) and error.code in _POLICY_CODES:
            return {"refused": f"the server declined: {error.message}"}
        raise CompletionError(
            f"the server said {error.status_code}: {error.message}; wanted a completion. "
            + _remedy(error.status_code)
        ) from error
    except openai.APITimeoutError as error:
        raise CompletionError(
            "the server gave no answer in time; wanted a completion. Ask again later, or raise "
            "timeout"
        ) from error
    except openai.APIConnectionError as error:
        raise CompletionError(
            f"the connection broke ({error.__cause__ or error}); wanted a completion. "
            "Check base_url and the server, and ask again: what was answered is kept"
        ) from error
    return read_body(response.text)


def _replayed(kept: Record) -> Reply:
    if "refused" in kept:
        raise CompletionRefused(str(kept["refused"]))
    if "unusable" in kept:
        raise CompletionError(str(kept["unusable"]))
    return Reply.from_record(kept)


def _remedy(status: int) -> str:
    if status in (401, 403):
        return "Check api_key"
    if status in (301, 302, 303, 307, 308, 404):
        return "Check base_url and the name of the model"
    if status == 429 or status >= 500:
        return "Ask again later, or lower concurrency: what was answered is kept"
    return "Check the model's name and what the server supports"


def _opener(
    base_url: str | None, api_key: str | None, max_retries: int, timeout: float
) -> Callable[[], Any]:
    """Makes the client; one for each event loop, since its connections belong to one."""
    try:
        import openai
    except ImportError as error:
        raise CompletionError(
            "got no package openai; wanted OpenAI's client to talk to the server. "
            'Install it: pip install "pvcore[judge]"'
        ) from error

    def opened() -> Any:
        try:
            return openai.AsyncOpenAI(
                base_url=base_url,
                api_key=api_key,
                max_retries=max_retries,
                timeout=timeout,
                http_client=openai.DefaultAsyncHttpxClient(follow_redirects=False, timeout=timeout),
            )
        except openai.OpenAIError as error:
            raise CompletionError(
                f"the client cannot be made: {error}; wanted a key and an address. Give api_key "
                "and base_url, or set OPENAI_API_KEY"
            ) from error

    return opened
