"""What a judge server may do wrong: what it sends, how often it is asked, and whether it was paid.

`lost`: nothing arrived that could be kept, so a later run asks again. `paid`: a completion arrived,
so a later run doesn't. `refused`: a refusal, kept like what was paid for.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any, Literal

from tests.judge_server import Reply, body, completion, error

MAX_RETRIES = 2
_AGAIN = MAX_RETRIES + 1
_HTML = {"Content-Type": "text/html"}
_GOOD = completion().body


@dataclass(frozen=True, kw_only=True)
class Scenario:
    reply: Reply
    says: str
    n_requests: int = 1
    kind: Literal["lost", "paid", "refused"] = "paid"
    probe: Reply | None = None


def lost(reply: Reply, says: str, n_requests: int = 1) -> Scenario:
    return Scenario(reply=reply, says=says, n_requests=n_requests, kind="lost")


def refused(reply: Reply, says: str) -> Scenario:
    return Scenario(reply=reply, says=says, kind="refused")


def paid(reply: Reply, says: str, probe: Reply | None = None) -> Scenario:
    return Scenario(reply=reply, says=says, probe=probe)


def said(text: str, *tokens: str, says: str = "wanted one whole number") -> Scenario:
    """The model is sure of its first token, whatever it goes on to say."""
    top = [(tokens[0], math.log(0.97)), ("50", math.log(0.01))]
    return paid(completion(text, tokens=tokens, top=top), says)


def prose(text: str, *tokens: str) -> Scenario:
    return said(text, *tokens, says="got a probability of 0.01 that the reply is a whole number")


def candidates(*top: tuple[Any, Any], says: str) -> Scenario:
    return paid(completion("50", tokens=["50"], top=top), says)


def sent(content: bytes, says: str, **headers: str) -> Scenario:
    return lost(Reply(body=content, headers=headers or _HTML), says)


DIGITS = completion(
    "0", tokens=["0"], top=[("0", math.log(0.6)), ("8", math.log(0.3)), ("5", math.log(0.05))]
)
SPLIT_PROBE = completion("87", tokens=["8", "7"], top=[("8", -0.01), ("9", -5.0)])

SCENARIOS: dict[str, Scenario] = {
    "429": lost(error(429), "the server said 429", _AGAIN),
    "429 with a wait": lost(
        error(429, **{"retry-after-ms": "0.01"}), "the server said 429", _AGAIN
    ),
    "429 with an endless wait": lost(error(429, **{"retry-after": "86400"}), "said 429"),
    "500": lost(error(500), "the server said 500", _AGAIN),
    "502": lost(error(502), "the server said 502", _AGAIN),
    "503": lost(error(503), "the server said 503", _AGAIN),
    "504": lost(error(504), "the server said 504", _AGAIN),
    "529": lost(error(529), "the server said 529", _AGAIN),
    "500 in HTML": lost(Reply(status=500, body=b"<h1>Oh</h1>", headers=_HTML), "500", _AGAIN),
    "408": lost(error(408), "the server said 408", _AGAIN),
    "409": lost(error(409), "the server said 409", _AGAIN),
    "400": lost(error(400), "the server said 400"),
    "400 that insists": lost(error(400, **{"x-should-retry": "true"}), "said 400", _AGAIN),
    "401": lost(error(401), "Check api_key"),
    "403": lost(error(403), "Check api_key"),
    "404": lost(error(404), "Check base_url and the name of the model"),
    "413": lost(error(413), "the server said 413"),
    "422": lost(error(422), "the server said 422"),
    "redirect": lost(error(307, Location="/v1/chat/completions"), "the server said 307"),
    "hang": lost(Reply(end="hang"), "no answer in time", _AGAIN),
    "hung up": lost(Reply(end="none"), "the connection broke", _AGAIN),
    "cut in the head": lost(Reply(end="half_head"), "the connection broke", _AGAIN),
    "cut in the body": lost(Reply(body=_GOOD, end="cut"), "the connection broke", _AGAIN),
    "cut in a chunk": lost(Reply(body=_GOOD, end="chunk_cut"), "the connection broke", _AGAIN),
    "broken gzip": lost(
        Reply(body=_GOOD, headers={"Content-Encoding": "gzip"}), "the connection broke", _AGAIN
    ),
    "policy of the server": refused(error(400, code="content_filter"), "the server declined"),
    "policy of the service": refused(
        error(403, code="content_policy_violation"), "the server declined"
    ),
    "refusal of the model": refused(
        completion(message={"role": "assistant", "content": None, "refusal": "I can't."}),
        "the model declined",
    ),
    "refusal beside a score": refused(
        completion(message={"role": "assistant", "content": "50", "refusal": "I can't."}),
        "the model declined",
    ),
    "filtered": refused(completion("50", finish="content_filter"), "content filter"),
    "prose": prose("I think it is", "I", " think", " it", " is"),
    "a refusal in prose": prose("I'm sorry", "I", "'m", " sorry"),
    "number in prose": prose("Score: 85", "Score", ":", " ", "85"),
    "JSON in the text": prose('{"score": 8', '{"', "score", '":', " 8"),
    "a word": prose("eighty", "eight", "y"),
    "NaN": prose("NaN", "NaN"),
    "null": prose("null", "null"),
    "infinity": prose("∞", "∞"),
    "minus one": prose("-1", "-", "1"),
    "minus one in one token": prose("-1", "-1"),
    "plus": prose("+50", "+", "50"),
    "101": prose("101", "101"),
    "1000": prose("1000", "1000"),
    "leading zeros": prose("007", "007"),
    "a fraction in one token": prose("8.5", "8.5"),
    "underscored": prose("1_0", "1_0"),
    "Arabic digits": prose("\u0665\u0660", "\u0665\u0660"),
    "8/10": said("8/10", "8", "/", "10"),
    "85 in two tokens": said("85", "8", "5"),
    "8.5": said("8.5", "8", ".", "5"),
    "80%": said("80%", "80", "%"),
    "80.": said("80.", "80", "."),
    "two numbers": said("50 60", "50", " ", "60"),
    "a range": said("70-80", "70", "-", "80"),
    "1e2": said("1e2", "1", "e", "2"),
    "a number and prose": said("80\n\nThe", "80", "\n\n", "The"),
    "1,000": said("1,000", "1", ",", "000"),
    "thousand in two tokens": said("1000", "100", "0"),
    "another text than its tokens": said("50", "20"),
    "empty text": said("", "20"),
    "digits of a splitting tokenizer": paid(DIGITS, "when asked to write 87", probe=SPLIT_PROBE),
    "digits, and a probe in prose": paid(
        DIGITS, "when asked to write 87", probe=completion("Sure", top=[("Sure", -0.1)])
    ),
    "digits, and a probe refused": refused(DIGITS, "the server declined"),
    "no JSON": sent(b"<html>Sign in</html>", "is not JSON"),
    "truncated JSON": sent(_GOOD[:-20], "is not JSON", **{"Content-Type": "application/json"}),
    "empty body": sent(b"", "is not JSON"),
    "a stream": sent(b"data: " + _GOOD + b"\n\n", "JSON", **{"Content-Type": "text/event-stream"}),
    "bytes": sent(b"\xff\xfe\x00\x80", "is not JSON"),
    "deep JSON": sent(b"[" * 100_000, "is not JSON"),
    "a JSON list": sent(b"[]", "wanted a completion with choices"),
    "a JSON number": sent(b"85", "wanted a completion with choices"),
    "a JSON null": sent(b"null", "wanted a completion with choices"),
    "an error with 200": sent(b'{"error": {"message": "busy"}}', "with choices"),
    "choices of null": sent(body(choices=None), "wanted a completion with choices"),
    "no choices": paid(Reply(body=body(choices=[])), "without choices"),
    "a choice of null": paid(Reply(body=body(choices=[None])), "got None for choices[0]"),
    "no message": paid(completion(message=None), "got None for message"),
    "content of null": paid(completion(message={"content": None}), "whose content is None"),
    "content in parts": paid(completion(message={"content": [{"text": "50"}]}), "whose content"),
    "content as a number": paid(completion(message={"content": 50}), "whose content is 50"),
    "no log-probabilities": paid(completion(logprobs=None), "without log-probabilities"),
    "log-probabilities of nothing": paid(completion(logprobs={"content": []}), "without log-"),
    "log-probabilities as a list": paid(completion(logprobs=[1]), "got [1] for logprobs"),
    "no candidates": candidates(says="without log-probabilities"),
    "candidates of null": paid(
        completion(logprobs={"content": [{"token": "50", "logprob": -0.1}]}),
        "got top_logprobs None",
    ),
    "candidates as numbers": paid(
        completion(logprobs={"content": [{"token": "50", "top_logprobs": [50]}]}), "got 50 for top"
    ),
    "a log-probability of NaN": candidates(("50", math.nan), says="log-probability nan"),
    "a log-probability of infinity": candidates(("50", math.inf), says="log-probability inf"),
    "a log-probability above 0": candidates(("50", 0.5), says="log-probability 0.5"),
    "a log-probability as text": candidates(("50", "-0.1"), says="log-probability '-0.1'"),
    "a log-probability of null": candidates(("50", None), says="log-probability None"),
    "a log-probability of true": candidates(("50", True), says="log-probability True"),
    "a log-probability of false": candidates(("50", False), says="log-probability False"),
    "impossible numbers": candidates(("50", -math.inf), says="probability of 0 that"),
    "endlessly small": candidates(("50", -(10**400)), says="probability of 0 that"),
    "a token of null": candidates((None, -0.1), says="got None for a token"),
    "a token as a number": candidates((50, -0.1), says="got 50 for a token"),
    "too little mass": candidates(
        ("50", math.log(0.2)),
        ("80", math.log(0.0499)),
        ("I", -0.3),
        says="probability of 0.25 that",
    ),
    "mass above one": candidates(("50", 0.0), (" 50", 0.0), says="probability of 2 that"),
    "a candidate twice": candidates(
        ("50", -1.0), ("50", -1.0), says="got the candidate '50' twice"
    ),
    "no numbers": candidates(("fifty", -0.1), ("Fifty", -3.0), says="probability of 0 that"),
    "numbers out of range": candidates(("101", -0.1), ("-5", -4.0), says="probability of 0 that"),
}
assert json.loads(_GOOD)["choices"], "what is cut short above is a good completion"
