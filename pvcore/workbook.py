"""The work folder of one extraction: what was written, judged and pooled, to be taken up again.

    run.json              what decides the result; another run is refused by name of what differs
    replies.jsonl         one line for each batch of replies
    judgements.jsonl      one line for each judged reply
    pooled.safetensors    sums over the first batches of the pooling pass

JSON lines are appended by one write each that reaches the disk; a line that a kill cut short is
passed over. The other files are replaced whole. So a run that is killed at any point loses what was
under way, and nothing that was done.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from reprlib import repr as brief

from pvcore.answers import Answers, Record, key_of
from pvcore.errors import WorkError
from pvcore.files import write_whole
from pvcore.judge import Judge, Judgement, judge_each

FORMAT = 1
_RUN, _POOLED = "run.json", "pooled.safetensors"
Settings = Mapping[str, str | int | float]


class Workbook:
    """What a run did so far; in memory where no folder is given.

    `settings` are all that decides the result. Raises `WorkError` for the folder of a run with
    other settings, saying which, and for a folder that holds something else.
    """

    def __init__(self, folder: str | os.PathLike[str] | None, settings: Settings) -> None:
        self._folder = None if folder is None else Path(folder)
        if self._folder is not None:
            _open(self._folder, {"format": FORMAT, **settings})
        self._replies = Answers(self._path("replies.jsonl"))
        self._judgements = Answers(self._path("judgements.jsonl"))

    @contextmanager
    def held(self) -> Iterator[None]:
        """Nobody else's while inside: `WorkError` where another process is at work in the folder.

        The hold ends with the process, however that ends. What an earlier one left half written is
        swept away.
        """
        if self._folder is None:
            yield
            return
        with _writing(self._folder):
            file = os.open(self._folder / _RUN, os.O_RDONLY)
        try:
            _lock(file, self._folder)
            for draft in self._folder.glob(".*.tmp"):
                draft.unlink(missing_ok=True)
            yield
        finally:
            os.close(file)

    @property
    def on_disk(self) -> bool:
        return self._folder is not None

    def _path(self, name: str) -> Path | None:
        return None if self._folder is None else self._folder / name

    def replies(self, batch: int, n: int) -> list[str | None] | None:
        """The `n` replies of a batch, if it was written."""
        kept = self._replies.get(key_of({"batch": batch}))
        if kept is None:
            return None
        texts = kept.get("replies")
        fits = isinstance(texts, list) and all(isinstance(one, str | None) for one in texts)
        if not isinstance(texts, list) or not fits or len(texts) != n:
            raise WorkError(
                f"{self._path('replies.jsonl')}: got {brief(texts)} for batch {batch}; wanted {n} "
                "replies. The file was changed: start again in an empty folder"
            )
        return texts

    def keep_replies(self, batch: int, replies: Sequence[str | None]) -> None:
        self._replies.put(key_of({"batch": batch}), {"replies": list(replies)})

    def judge(self, judge: Judge) -> "KeptJudge":
        """The judge, asked only for what it was not asked for before."""
        return KeptJudge(judge, self._judgements)

    @property
    def pooled(self) -> bytes | None:
        """The newest sums of the pooling pass."""
        path = self._path(_POOLED)
        if path is None or not path.exists():
            return None
        return path.read_bytes()

    def keep_pooled(self, content: bytes) -> None:
        path = self._path(_POOLED)
        if path is not None:
            with _writing(path):
                write_whole(path, content)


class KeptJudge:
    """A judge whose scores are kept as they come, one by one; kept ones are not asked for again.

    What failed is asked again, until `settle` says that the judging came to its end.
    """

    def __init__(self, judge: Judge, kept: Answers) -> None:
        self._judge, self._kept = judge, kept

    def trait(self, trait: str, question: str, answer: str) -> float:
        return self._judge.trait(trait, question, answer)

    def coherence(self, question: str, answer: str) -> float:
        return self._judge.coherence(question, answer)

    def judge_many(
        self, trait: str, pairs: Sequence[tuple[str, str]]
    ) -> Iterator[tuple[int, Judgement]]:
        """Kept judgements first, then the judge's own, each kept before it is handed on."""
        missing = []
        for index, pair in enumerate(pairs):
            kept = self._kept.get(_key(trait, index, pair))
            if kept is None:
                missing.append(index)
            else:
                yield index, _judgement(pair, kept)
        if not missing:
            return
        asked = tuple(pairs[index] for index in missing)
        with closing(judge_each(self._judge, trait, asked)) as rest:
            for place, row in rest:
                index = missing[place]
                if row.failure is None:
                    self._kept.put(_key(trait, index, pairs[index]), _record(row))
                yield index, row

    def settle(self, trait: str, rows: Sequence[Judgement]) -> None:
        """Keep the failures too: judging ended with them, and a rerun must come out the same."""
        for index, row in enumerate(rows):
            key = _key(trait, index, (row.question, row.answer))
            if self._kept.get(key) is None:
                self._kept.put(key, _record(row))


def _key(trait: str, index: int, pair: tuple[str, str]) -> str:
    return key_of({"trait": trait, "row": index, "question": pair[0], "answer": pair[1]})


def _record(row: Judgement) -> Record:
    names = ("trait_score", "coherence_score", "failure", "refused", "method")
    return {name: getattr(row, name) for name in names}


def _judgement(pair: tuple[str, str], kept: Record) -> Judgement:
    try:
        return Judgement(question=pair[0], answer=pair[1], **kept)  # type: ignore[arg-type]
    except TypeError as error:
        raise WorkError(
            f"got a kept judgement {brief(dict(kept))}; wanted one as pvcore wrote it ({error}). "
            "The file was changed: start again in an empty folder"
        ) from None


def _lock(file: int, folder: Path) -> None:
    try:
        import fcntl
    except ImportError:  # Windows has none: there two runs in one folder are the user's to avoid
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise WorkError(
            f"{folder}: got a folder that another process is at work in; wanted one of one's own. "
            "Wait for it, or name another"
        ) from None


def _open(folder: Path, settings: Settings) -> None:
    """Make the folder a run's own, or check that it is."""
    path = folder / _RUN
    with _writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with _writing(folder), _alone(folder):
        if not path.exists():
            # Hidden ones are what a kill left of a file half written.
            others = sorted(one.name for one in folder.iterdir() if not one.name.startswith("."))
            if others:
                raise WorkError(
                    f"{folder}: got a folder with {', '.join(others)[:80]} in it; wanted an empty "
                    "one, or that of an earlier run. Name another"
                )
            text = json.dumps({"pvcore_extraction": settings}, indent=1, sort_keys=True)
            write_whole(path, f"{text}\n".encode())
            return
        content = path.read_bytes()
    earlier = _settings(path, content)
    changed = [
        f"{name} was {earlier.get(name, 'not there')!r} and is {settings.get(name, 'not there')!r}"
        for name in sorted(earlier.keys() | settings.keys())
        if earlier.get(name) != settings.get(name)
    ]
    if changed:
        raise WorkError(
            f"{folder}: got the work of another run: {'; '.join(changed)}. Name another folder, or "
            "run as before"
        )


def _settings(path: Path, content: bytes) -> Settings:
    try:
        settings = json.loads(content)["pvcore_extraction"]
        return dict(settings)
    except (ValueError, KeyError, TypeError):
        raise WorkError(
            f"{path}: got no record of a run; wanted the file that pvcore wrote. Name another "
            "folder"
        ) from None


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process at a time: of two that begin in an empty folder, the second finds the first."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    file = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # not every file system of a network can lock a folder
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
    finally:
        os.close(file)


@contextmanager
def _writing(place: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise WorkError(
            f"{place}: got a place that cannot be written ({error.strerror}); wanted a folder to "
            "keep the work in, with room. Name another"
        ) from error
