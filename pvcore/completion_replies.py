"""Replies of a chat completion, read strictly: a server may say anything."""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from reprlib import repr as brief
from typing import Any

from pvcore.errors import CompletionError

_SLACK = 1e-6  # by how much a log-probability rounded by a server may exceed 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """The first choice of a completion.

    `tokens` are those of the text and `first` the likeliest candidates for the first of them, with
    log-probabilities; both empty where the server gave none.
    """

    text: str
    finish: str
    tokens: tuple[str, ...] = ()
    first: tuple[tuple[str, float], ...] = ()

    def candidates(self) -> Iterator[tuple[str, float]]:
        """The candidates for the first token with their probabilities."""
        return ((token, math.exp(min(logprob, 0.0))) for token, logprob in self.first)

    def record(self) -> dict[str, object]:
        return {
            "text": self.text,
            "finish": self.finish,
            "tokens": list(self.tokens),
            "first": [list(candidate) for candidate in self.first],
        }

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> "Reply":
        """Read what `record` gave; raises `CompletionError` where it was tampered with."""
        try:
            return cls(
                text=record["text"],
                finish=record["finish"],
                tokens=tuple(record["tokens"]),
                first=tuple((str(token), float(logprob)) for token, logprob in record["first"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise CompletionError(
                f"got a kept answer that cannot be read ({error!r}); wanted one as pvcore wrote "
                "it. Remove its line from the cache"
            ) from error


class _Unusable(Exception):
    """A completion that arrived, and says nothing that can be used."""


def read_body(body: str) -> dict[str, object]:
    """What to keep of a response: a `Reply` as a record, or `refused` or `unusable` and why.

    Raises `CompletionError` for what is no completion at all: it was not paid for, or was lost on
    the way, so that asking again makes sense.
    """
    try:
        content = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise CompletionError(
            f"the server's answer is not JSON ({error}): {brief(body)}; wanted a completion. "
            "Check base_url, and ask again"
        ) from error
    if not isinstance(content, dict) or not isinstance(content.get("choices"), list):
        raise CompletionError(
            f"got {brief(content)} from the server; wanted a completion with choices. "
            "Check base_url"
        )
    try:
        return _read_choice(content["choices"])
    except _Unusable as error:
        return {"unusable": f"{error}; wanted a completion of one text. Check the server"}


def _read_choice(choices: list[Any]) -> dict[str, object]:
    if not choices:
        raise _Unusable("got a completion without choices")
    choice = _object("choices[0]", choices[0])
    message = _object("message", choice.get("message"))
    if refusal := message.get("refusal"):
        return {"refused": f"the model declined: {brief(refusal)}"}
    if choice.get("finish_reason") == "content_filter":
        return {"refused": "the server's content filter cut the reply"}
    text = message.get("content")
    if not isinstance(text, str):
        raise _Unusable(f"got a message whose content is {brief(text)}")
    tokens, first = _read_logprobs(choice.get("logprobs"))
    finish = str(choice.get("finish_reason"))
    return Reply(text=text, finish=finish, tokens=tokens, first=first).record()


def _read_logprobs(logprobs: object) -> tuple[tuple[str, ...], tuple[tuple[str, float], ...]]:
    if logprobs is None:
        return (), ()
    content = _object("logprobs", logprobs).get("content")
    if not content:
        return (), ()
    if not isinstance(content, list):
        raise _Unusable(f"got logprobs.content {brief(content)}")
    entries = [_object("logprobs.content", entry) for entry in content]
    candidates = entries[0].get("top_logprobs")
    if not isinstance(candidates, list):
        raise _Unusable(f"got top_logprobs {brief(candidates)}")
    tokens = tuple(_token(entry) for entry in entries)
    return tokens, tuple(_candidate(_object("top_logprobs", one)) for one in candidates)


def _candidate(entry: Mapping[str, Any]) -> tuple[str, float]:
    logprob: Any = entry.get("logprob")
    # NaN compares false with everything, so that it is refused too.
    if not isinstance(logprob, int | float) or isinstance(logprob, bool) or not logprob <= _SLACK:
        raise _Unusable(f"got the log-probability {brief(logprob)} for {_token(entry)!r}")
    # Python's integers know no bounds and floats do: what is below them all is impossible too.
    return _token(entry), float(max(logprob, -1e300))


def _token(entry: Mapping[str, Any]) -> str:
    token = entry.get("token")
    if not isinstance(token, str):
        raise _Unusable(f"got {brief(token)} for a token")
    return token


def _object(what: str, value: object) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise _Unusable(f"got {brief(value)} for {what}")
    return value
