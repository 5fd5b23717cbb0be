"""A judge behind an OpenAI-compatible server: the score its first token's probabilities say."""

import copy
import os
from collections.abc import Iterable, Iterator, Sequence
from functools import partial

from pvcore import fingerprints
from pvcore.completion_replies import Reply
from pvcore.completions import Ask, Completions
from pvcore.errors import CompletionError, CompletionRefused, JudgeFailure, JudgeRefusal
from pvcore.grading import Rubrics, number_of, weighted_score
from pvcore.judge import Judgement
from pvcore.traits import Trait

# Greedy, with the most candidates the protocol gives. Four tokens, where the paper's code takes
# one: of "8/10" or of an 85 in two tokens, the first alone would be taken for an 8.
_SETTINGS: dict[str, object] = {
    "temperature": 0,
    "seed": 0,
    "max_tokens": 4,
    "logprobs": True,
    "top_logprobs": 20,
}
_PROBE = "Reply with the number 87 and nothing else."


class ApiJudge:
    """Scores answers with a chat model on a server, as the paper does (arXiv 2507.21509, A.1).

    The score is the mean of the whole numbers 0 to 100 among the 20 likeliest first tokens,
    weighted by their probabilities, and a failure when those sum to less than 0.25. The model must
    write such numbers as one token each: where its candidates leave that open, it is asked once to
    write one. `traits` are those that don't ship with pvcore. Answers are kept in the file `cache`:
    a run that was stopped, however hard, asks only for what it has no answer to. The other
    arguments are those of `Completions`.
    """

    method = "logprob-weighted"

    def __init__(
        self,
        model: str,
        *,
        traits: Iterable[Trait] = (),
        cache: str | os.PathLike[str] | None = None,
        base_url: str | None = None,
        api_key: str | None = None,
        concurrency: int = 16,
        max_retries: int = 5,
        timeout: float | int = 60.0,
    ) -> None:
        self._rubrics = Rubrics(traits)
        self._server = base_url or os.environ.get("OPENAI_BASE_URL", "")
        self._completions = Completions(
            model,
            base_url=base_url,
            api_key=api_key,
            concurrency=concurrency,
            max_retries=max_retries,
            timeout=timeout,
            cache=cache,
        )

    def __repr__(self) -> str:
        return f"ApiJudge({self._completions.model!r})"

    @property
    def identity(self) -> str:
        """What decides its scores: the model it asks, and a hash of the server and the rubrics."""
        decides = [self._server, self._rubrics.texts]
        return f"{self._completions.model} {fingerprints.of_text(decides)}"

    def including(self, trait: Trait) -> "ApiJudge":
        """This judge with the trait's own rubric; `TraitError` where it was given another."""
        judge = copy.copy(self)
        judge._rubrics = self._rubrics.including(trait)
        return judge

    def trait(self, trait: str, question: str, answer: str) -> float:
        """The score for a trait; `JudgeFailure` where there is none."""
        prompt = self._rubrics.trait(trait, question, answer)
        return self._completions.one(partial(_score, "trait", prompt))

    def coherence(self, question: str, answer: str) -> float:
        """The score for coherence; `JudgeFailure` where there is none."""
        prompt = self._rubrics.coherence(question, answer)
        return self._completions.one(partial(_score, "coherence", prompt))

    def judge_many(
        self, trait: str, pairs: Sequence[tuple[str, str]]
    ) -> Iterator[tuple[int, Judgement]]:
        """Judge pairs side by side, each for the trait and then for coherence."""
        jobs = [
            partial(
                _judgement,
                question,
                answer,
                self._rubrics.trait(trait, question, answer),
                self._rubrics.coherence(question, answer),
            )
            for question, answer in pairs
        ]
        return self._completions.each(jobs)


async def _judgement(
    question: str, answer: str, trait_prompt: str, coherence_prompt: str, ask: Ask
) -> Judgement:
    try:
        return Judgement(
            question=question,
            answer=answer,
            trait_score=await _score("trait", trait_prompt, ask),
            coherence_score=await _score("coherence", coherence_prompt, ask),
            failure=None,
            method=ApiJudge.method,
        )
    except JudgeFailure as failure:
        return Judgement.failed(question, answer, failure, method=ApiJudge.method)


async def _score(what: str, prompt: str, ask: Ask) -> float:
    try:
        reply = await ask(prompt, **_SETTINGS)
        weights = _weights(reply)
        if not _keeps_numbers_whole(reply):
            await _check_numbers_are_whole(ask)
        return weighted_score(weights)
    except CompletionRefused as error:
        raise JudgeRefusal(f"{what}: {error}") from error
    except (CompletionError, JudgeFailure) as error:
        raise JudgeFailure(f"{what}: {error}") from error


def _weights(reply: Reply) -> dict[int, float]:
    """The probabilities of the numbers among the candidates for the first token."""
    if not reply.tokens or not reply.first:
        raise JudgeFailure(
            "got a reply without log-probabilities; wanted those of 20 candidates. "
            "Choose a server and a model that give them"
        )
    text, first = reply.text.strip(), reply.tokens[0].strip()
    if not text.startswith(first) or (number_of(first) is not None and text != first):
        raise JudgeFailure(
            f"got the reply {reply.text!r} with the first token {reply.tokens[0]!r}; wanted one "
            "whole number from 0 to 100 in one token, and nothing else. Ask a model that follows "
            "the rubric and does not split numbers, or judge with LocalJudge"
        )
    weights: dict[int, float] = {}
    listed = set()
    for token, probability in reply.candidates():
        if token in listed:
            raise JudgeFailure(
                f"got the candidate {token!r} twice; wanted each once. Check the server"
            )
        listed.add(token)
        if (number := number_of(token)) is not None:
            weights[number] = weights.get(number, 0.0) + probability
    return weights


def _keeps_numbers_whole(reply: Reply) -> bool:
    """Whether a number of two digits is among the candidates: it is then one token."""
    return any((number_of(token) or 0) > 9 for token, _ in reply.first)


async def _check_numbers_are_whole(ask: Ask) -> None:
    # Where every candidate has one digit, an 8 could as well be the beginning of an 85.
    reply = await ask(_PROBE, **_SETTINGS)
    if not _keeps_numbers_whole(reply):
        raise JudgeFailure(
            f"got only digits as candidates, and {reply.tokens!r} when asked to write 87; wanted a "
            "model that writes numbers up to 100 as one token. Choose another, or judge with "
            "LocalJudge, which adds up the digits"
        )
