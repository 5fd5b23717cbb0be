"""Judges: what scores replies from 0 to 100. A judgement that fails is an error, never a number."""

import importlib
import importlib.util
import math
import sys
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from numbers import Real
from pathlib import Path
from reprlib import repr as brief
from types import ModuleType
from typing import Protocol, runtime_checkable

from pvcore.errors import JudgeFailure, JudgeRefusal, PvcoreError

_METHODS = ("trait", "coherence")


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
    """One answer with both its scores, or with neither and the reason why.

    `refused`: the judge declined to read the answer. `method`: how the scores came about, in the
    words of the judge; empty where it has none.
    """

    question: str
    answer: str
    trait_score: float | None
    coherence_score: float | None
    failure: str | None
    refused: bool = False
    method: str = ""

    @classmethod
    def failed(
        cls, question: str, answer: str, failure: JudgeFailure, *, method: str = ""
    ) -> "Judgement":
        """A row without scores; a `JudgeRefusal` counts as refused."""
        return cls(
            question=question,
            answer=answer,
            trait_score=None,
            coherence_score=None,
            failure=str(failure),
            refused=isinstance(failure, JudgeRefusal),
            method=method,
        )


@runtime_checkable
class BatchJudge(Judge, Protocol):
    """A judge that scores many answers better together than one by one, as a server does."""

    def judge_many(
        self, trait: str, pairs: Sequence[tuple[str, str]]
    ) -> Iterator[tuple[int, Judgement]]:
        """Every pair once, as its index and its judgement, in the order they are done.

        What cannot be judged is a `Judgement.failed`. A generator is closed when the judging stops
        early: it then asks nothing new and keeps what is under way.
        """
        ...


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
        """Rows without a score, refused ones among them."""
        return len(self.rows) - self.n_judged

    @property
    def n_refused(self) -> int:
        return sum(row.refused for row in self.rows)

    @property
    def counts(self) -> str:
        """What to print beside every figure made from these rows."""
        return (
            f"judged {self.n_judged} of {len(self.rows)}, "
            f"failed {self.n_failed} (refused {self.n_refused})"
        )

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


class JudgingAborted(JudgeFailure):
    """Too many rows failed. `judgements` holds those that were done, in their order."""

    def __init__(self, message: str, judgements: Judgements) -> None:
        super().__init__(message)
        self.judgements = judgements


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
    `JudgingAborted` as soon as more than the share `max_failed` of all rows has failed. Other
    errors of pvcore (a trait the judge doesn't know) are mistakes in the call and pass through.
    """
    if not 0 <= max_failed <= 1:
        raise JudgeFailure(
            f"got max_failed={max_failed!r}; wanted the share of rows that may fail, from 0 to 1"
        )
    asked = _checked_pairs(pairs)
    rows: dict[int, Judgement] = {}
    n_failed = 0
    with closing(judge_each(judge, trait, asked)) as judged:
        for index, row in _shown(judged, trait, len(asked)) if progress else judged:
            rows[index] = row
            n_failed += row.failure is not None
            if n_failed / len(asked) > max_failed:
                raise _aborted(trait, rows, len(asked), max_failed)
    return Judgements(trait=trait, rows=tuple(rows[index] for index in range(len(asked))))


def _aborted(
    trait: str, rows: dict[int, Judgement], n_asked: int, max_failed: float
) -> JudgingAborted:
    done = Judgements(trait=trait, rows=tuple(rows[index] for index in sorted(rows)))
    first, row = next((index, row) for index, row in rows.items() if row.failure is not None)
    return JudgingAborted(
        f"got {done.n_failed} failed rows ({done.n_refused} refused) among the first "
        f"{len(done.rows)} of {n_asked} judged for {trait!r}; wanted no more than a share of "
        f"{max_failed:g} to fail. The first was row {first}: {row.failure}. "
        "Mend the judge, or raise max_failed",
        done,
    )


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


def judge_each(
    judge: Judge, trait: str, asked: Sequence[tuple[str, str]]
) -> Generator[tuple[int, Judgement], None, None]:
    """Every row once, in the order they are done; what the judge says is checked here."""
    if not isinstance(judge, BatchJudge):
        for index, (question, answer) in enumerate(asked):
            yield index, _judge_row(judge, trait, question, answer)
        return
    wanted = set(range(len(asked)))
    with closing(_closeable(judge.judge_many(trait, asked))) as judged:
        for index, row in judged:
            if index not in wanted:
                raise JudgeFailure(
                    f"got row {index!r} from {type(judge).__name__}.judge_many; wanted each of "
                    f"{len(asked)} rows once. Mend the judge"
                )
            wanted.remove(index)
            yield index, _checked_row(row, *asked[index])
    if wanted:
        raise JudgeFailure(
            f"got no row {min(wanted)} from {type(judge).__name__}.judge_many; wanted each of "
            f"{len(asked)} rows once. Mend the judge"
        )


def _closeable(
    rows: Iterator[tuple[int, Judgement]],
) -> Generator[tuple[int, Judgement], None, None]:
    yield from rows  # closes them too, where they can be closed


def _judge_row(judge: Judge, trait: str, question: str, answer: str) -> Judgement:
    method = str(getattr(judge, "method", ""))
    try:
        return Judgement(
            question=question,
            answer=answer,
            trait_score=_score("trait", partial(judge.trait, trait, question, answer)),
            coherence_score=_score("coherence", partial(judge.coherence, question, answer)),
            failure=None,
            method=method,
        )
    except JudgeFailure as failure:
        return Judgement.failed(question, answer, failure, method=method)


def _checked_row(row: Judgement, question: str, answer: str) -> Judgement:
    if row.failure is not None:
        return replace(row, trait_score=None, coherence_score=None)
    try:
        return Judgement(
            question=question,
            answer=answer,
            trait_score=_score("trait", lambda: row.trait_score),
            coherence_score=_score("coherence", lambda: row.coherence_score),
            failure=None,
            method=row.method,
        )
    except JudgeFailure as failure:
        return Judgement.failed(question, answer, failure, method=row.method)


def _score(what: str, ask: Callable[[], float | None]) -> float:
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


def _shown(
    rows: Iterable[tuple[int, Judgement]], trait: str, total: int
) -> Iterable[tuple[int, Judgement]]:
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    return track(rows, description=f"judging {trait}", total=total, console=console)


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
