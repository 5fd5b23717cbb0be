"""Judges: what scores replies from 0 to 100. A judgement that fails is an error, never a number."""

import importlib
import importlib.util
import math
import re
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from numbers import Real
from pathlib import Path
from reprlib import repr as brief
from types import ModuleType
from typing import Protocol, runtime_checkable

from pvcore.errors import JudgeFailure, PvcoreError, TraitError

_METHODS = ("trait", "coherence")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n+")
_WORD = re.compile(r"\w+(?:['\u2019-]\w+)*")


@runtime_checkable
class Judge(Protocol):
    """Scores one answer to one question: a number from 0 to 100, or `JudgeFailure`."""

    def trait(self, trait: str, question: str, answer: str) -> float:
        """How strongly the answer shows the trait: 0 not at all, 100 as strongly as can be."""
        ...

    def coherence(self, question: str, answer: str) -> float:
        """How well the answer holds together, whatever it says: 0 noise, 100 flawless."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """One answer with both its scores, or with neither and the reason why."""

    question: str
    answer: str
    trait_score: float | None
    coherence_score: float | None
    failure: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgements:
    """What a judge made of a list of answers, in their order; a failed row has no score."""

    trait: str
    rows: tuple[Judgement, ...]

    @property
    def n_judged(self) -> int:
        return sum(row.failure is None for row in self.rows)

    @property
    def n_failed(self) -> int:
        return len(self.rows) - self.n_judged

    @property
    def trait_scores(self) -> tuple[float | None, ...]:
        return tuple(row.trait_score for row in self.rows)

    @property
    def coherence_scores(self) -> tuple[float | None, ...]:
        return tuple(row.coherence_score for row in self.rows)

    @property
    def mean_trait_score(self) -> float:
        """Mean over the judged rows; `JudgeFailure` where none was."""
        return self._mean(self.trait_scores)

    @property
    def mean_coherence_score(self) -> float:
        """Mean over the judged rows; `JudgeFailure` where none was."""
        return self._mean(self.coherence_scores)

    def _mean(self, scores: tuple[float | None, ...]) -> float:
        judged = [score for score in scores if score is not None]
        if not judged:
            raise JudgeFailure(
                f"got no judged row among {len(self.rows)} for {self.trait!r}; wanted at least "
                "one to average. Look at the failures of the rows"
            )
        return math.fsum(judged) / len(judged)


def judge_all(
    judge: Judge,
    trait: str,
    pairs: Iterable[tuple[str, str]],
    *,
    max_failed: float = 0.1,
    progress: bool = False,
) -> Judgements:
    """Judge `(question, answer)` pairs for a trait and for coherence.

    A row fails when the judge raises or gives anything but a finite number from 0 to 100. Raises
    `JudgeFailure` as soon as more than the share `max_failed` of all rows has failed. Other errors
    of pvcore (a trait the judge doesn't know) are mistakes in the call and pass through.
    """
    if not 0 <= max_failed <= 1:
        raise JudgeFailure(
            f"got max_failed={max_failed!r}; wanted the share of rows that may fail, from 0 to 1"
        )
    asked = _checked_pairs(pairs)
    rows: list[Judgement] = []
    n_failed = 0
    first_failure = ""
    for index, (question, answer) in enumerate(_shown(asked, trait) if progress else asked):
        try:
            rows.append(_judge_row(judge, trait, question, answer))
        except JudgeFailure as failure:
            rows.append(_failed_row(question, answer, failure))
            n_failed += 1
            first_failure = first_failure or f"row {index}: {failure}"
            if n_failed / len(asked) > max_failed:
                raise JudgeFailure(
                    f"got {n_failed} failed rows among the first {index + 1} of {len(asked)} "
                    f"judged for {trait!r}; wanted no more than a share of {max_failed:g} to "
                    f"fail. The first was {first_failure}. Mend the judge, or raise max_failed"
                ) from failure
    return Judgements(trait=trait, rows=tuple(rows))


class LexiconJudge:
    """Scores a trait by rule: the share of an answer's sentences that hold a word of its lexicon.

    Words are compared whole and without case. Coherence is the share of distinct runs of three
    words: it catches text that loops, and nothing else. An answer without a word scores 0 in both.
    A rule, for a model whose vocabulary is known; no substitute for a reader.
    """

    def __init__(self, lexicons: Mapping[str, Collection[str]]) -> None:
        if not lexicons:
            raise TraitError("got no lexicon; wanted words for at least one trait. Name some")
        self._lexicons = {trait: _lexicon(trait, words) for trait, words in lexicons.items()}

    def trait(self, trait: str, question: str, answer: str) -> float:
        """100 times the share of sentences holding a word of the trait's lexicon."""
        if trait not in self._lexicons:
            raise TraitError(
                f"got trait {trait!r}; this judge has words for {', '.join(self._lexicons)}. "
                "Give LexiconJudge a lexicon for it"
            )
        lexicon = self._lexicons[trait]
        sentences = [words for text in _SENTENCE_END.split(answer) if (words := _words(text))]
        if not sentences:
            return 0.0
        return 100.0 * sum(not lexicon.isdisjoint(words) for words in sentences) / len(sentences)

    def coherence(self, question: str, answer: str) -> float:
        """100 times the share of distinct word trigrams; shorter answers count as one run."""
        words = _words(answer)
        if not words:
            return 0.0
        length = min(3, len(words))
        runs = [tuple(words[at : at + length]) for at in range(len(words) - length + 1)]
        return 100.0 * len(set(runs)) / len(runs)


def load_judge(spec: str) -> Judge:
    """Import a judge by `package.module:name` or `path/to/file.py:name`.

    `name` is a judge, or a class or function that makes one when called without arguments.
    Runs the code of that module; raises `JudgeFailure` for each way this can go wrong.
    """
    source, _, name = spec.rpartition(":")
    if not source or not name.isidentifier():
        raise JudgeFailure(
            f"got judge {spec!r}; wanted 'package.module:name' or 'path/to/file.py:name'. "
            "Name the object after a colon"
        )
    from_file = source.endswith(".py") or "/" in source or "\\" in source
    module = _module_at(spec, Path(source)) if from_file else _module_named(spec, source)
    if not hasattr(module, name):
        names = [found for found, value in vars(module).items() if _offers(module, found, value)]
        raise JudgeFailure(
            f"got judge {spec!r}; {source} has no {name!r}. "
            f"Name what it has: {', '.join(names) or 'it defines nothing that could be a judge'}"
        )
    return _as_judge(spec, getattr(module, name))


def _checked_pairs(pairs: Iterable[tuple[str, str]]) -> tuple[tuple[str, str], ...]:
    asked = tuple(pairs)
    if not asked:
        raise JudgeFailure("got no answers to judge; wanted at least one (question, answer) pair")
    for index, pair in enumerate(asked):
        is_pair = isinstance(pair, Sequence) and not isinstance(pair, str) and len(pair) == 2
        if not is_pair or not all(isinstance(text, str) for text in pair):
            raise JudgeFailure(
                f"row {index}: got {brief(pair)}; wanted a question and an answer, both texts"
            )
    return asked


def _judge_row(judge: Judge, trait: str, question: str, answer: str) -> Judgement:
    return Judgement(
        question=question,
        answer=answer,
        trait_score=_score("trait", partial(judge.trait, trait, question, answer)),
        coherence_score=_score("coherence", partial(judge.coherence, question, answer)),
        failure=None,
    )


def _failed_row(question: str, answer: str, failure: JudgeFailure) -> Judgement:
    return Judgement(
        question=question,
        answer=answer,
        trait_score=None,
        coherence_score=None,
        failure=str(failure),
    )


def _score(what: str, ask: Callable[[], float]) -> float:
    try:
        score = ask()
    except PvcoreError:
        raise
    except Exception as error:
        raise JudgeFailure(f"{what}: the judge raised {type(error).__name__}: {error}") from error
    # NaN compares false with everything, so that the chain refuses it too.
    if isinstance(score, bool) or not isinstance(score, Real) or not 0 <= score <= 100:
        raise JudgeFailure(f"{what}: got {brief(score)}; wanted a finite number from 0 to 100")
    return float(score)


def _shown(pairs: tuple[tuple[str, str], ...], trait: str) -> Iterable[tuple[str, str]]:
    from rich.console import Console
    from rich.progress import track

    return track(pairs, description=f"judging {trait}", console=Console(stderr=True))


def _words(text: str) -> list[str]:
    return _WORD.findall(text.casefold())


def _lexicon(trait: str, words: Collection[str]) -> frozenset[str]:
    if isinstance(words, str) or not words:
        raise TraitError(
            f"lexicon of {trait!r}: got {words!r}; wanted a collection of one or more words. "
            "Put them in a list"
        )
    for word in words:
        if _words(word) != [word.casefold()]:
            raise TraitError(
                f"lexicon of {trait!r}: got {word!r}; wanted one word without spaces or "
                "punctuation. List its words one by one"
            )
    return frozenset(word.casefold() for word in words)


def _module_named(spec: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        # A package the module itself needs is another complaint than a module that isn't there.
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise _import_failure(spec, error) from error
        raise JudgeFailure(
            f"got judge {spec!r}; there is no module {error.name!r}. Install it, put it on "
            "PYTHONPATH, or give a file as 'path/to/file.py:name'"
        ) from error
    except Exception as error:
        raise _import_failure(spec, error) from error


def _module_at(spec: str, path: Path) -> ModuleType:
    if not path.is_file() or path.suffix != ".py":
        raise JudgeFailure(f"got judge {spec!r}; there is no Python file {path}. Check the path")
    name = f"pvcore_judge_{sha256(str(path.resolve()).encode()).hexdigest()[:16]}"
    found = importlib.util.spec_from_file_location(name, path)
    assert found is not None, "a .py file always has a loader"
    assert found.loader is not None, "a .py file always has a loader"
    module = importlib.util.module_from_spec(found)
    # Dataclasses and pickle look a class's module up by name, so it must be registered.
    sys.modules[name] = module
    try:
        found.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise _import_failure(spec, error) from error
    return module


def _import_failure(spec: str, error: Exception) -> JudgeFailure:
    return JudgeFailure(
        f"got judge {spec!r}; importing it raised {type(error).__name__}: {error}. "
        "Mend the module, or install what it needs"
    )


def _offers(module: ModuleType, name: str, value: object) -> bool:
    """Whether to offer a name of the module: it is a judge, or a callable defined there."""
    if name.startswith("_"):
        return False
    return not _lacking(value) or (
        callable(value) and getattr(value, "__module__", None) == module.__name__
    )


def _lacking(found: object) -> list[str]:
    return [method for method in _METHODS if not callable(getattr(found, method, None))]


def _as_judge(spec: str, found: object) -> Judge:
    made = found
    if isinstance(found, type) or (_lacking(found) and callable(found)):
        try:
            made = found()
        except Exception as error:
            raise JudgeFailure(
                f"got judge {spec!r}; calling it without arguments raised "
                f"{type(error).__name__}: {error}. Name something that needs none"
            ) from error
    if lacking := _lacking(made):
        raise JudgeFailure(
            f"got judge {spec!r}, a {type(made).__name__} without {' and '.join(lacking)}; wanted "
            "trait(trait, question, answer) and coherence(question, answer). Define them"
        )
    assert isinstance(made, Judge)
    return made
