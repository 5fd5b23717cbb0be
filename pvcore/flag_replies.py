"""Own replies: what the model itself answers to the prompts of training data.

The exact projection difference compares each reply with the model's own greedy one (arXiv
2507.21509, section 6). Replies are generated in batches and kept on the disk batch by batch, or
looked up in a file that another engine wrote.
"""

import hashlib
import json
import os
import sqlite3
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch

from pvcore.blocks import length_borders
from pvcore.chats import Encoded
from pvcore.errors import FlagError, SourceError
from pvcore.files import sync_folder
from pvcore.flag_blanks import is_given, is_missing
from pvcore.flag_rows import IDS, RowDefect, is_unicode
from pvcore.flag_scan import without_autocast
from pvcore.flag_shards import REPLIES
from pvcore.flag_sources import Source, decode
from pvcore.flag_tokens import Reading, Rejected, Sample, encode_many
from pvcore.model import HookedModel
from pvcore.numerals import Number
from pvcore.plain_generation import plain_settings

OTHER_HEAD = "the template puts other text before it than before the row's, such as a thought"
REPLY_NAMES = ("reply", "response", "completion", "answer", "output")


@runtime_checkable
class OwnReplies(Protocol):
    """Where the model's own replies come from."""

    def __call__(self, shard: int, samples: Sequence[Sample]) -> list[str | None]:
        """The reply to each sample's prompt; None where there is none."""
        ...

    def meet(self, rows: Iterable[tuple[str, str, int]]) -> None:
        """Every row of a portion as `(id, source, row)`, also those that nobody asks about."""
        ...


def in_subset(source: str, row: int, share: Number, seed: int) -> bool:
    """Whether a row, known by its number, belongs to the random subset of its source."""
    name = f"{seed}\0{source}\0{row}".encode()
    return int.from_bytes(hashlib.sha256(name).digest()[:8], "big") < share * 2**64


def head_of(tokenizer: Any, one: Sample | Encoded) -> list[int]:
    """What the template writes between prompt and reply, such as an empty thought; ids.

    A space is none: where it belongs to the reply's first token it comes and goes with that.
    """
    if one.reply is None or one.reply[0] == one.prompt_length:
        return []
    ids = [int(token) for token in one.ids[one.prompt_length : one.reply[0]]]
    return ids if _text(tokenizer, ids) else []


def _text(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(ids)).strip()


def answers(
    reading: Reading, samples: Sequence[Sample], chosen: Sequence[int], texts: Sequence[str | None]
) -> tuple[dict[int, Sample], dict[int, Rejected]]:
    """The chosen samples with the model's own reply in the place of theirs.

    Rejected are those without one, and those whose two replies would not stand behind the same
    head: one of them then goes on from a thought that the other lacks.
    """
    tokenizer = reading.tokenizer
    chats = [
        [*samples[at].messages[:-1], {"role": "assistant", "content": text or ""}]
        for at, text in zip(chosen, texts, strict=True)
    ]
    found: dict[int, Sample] = {}
    failed: dict[int, Rejected] = {}
    encoded = encode_many(tokenizer, chats, reading.max_length)
    for at, text, one in zip(chosen, texts, encoded, strict=True):
        sample = samples[at]
        if isinstance(one, Exception) or not one.reply or one.reply[0] == one.reply[1]:
            empty = "is not there" if text is None else "is empty"
            why = str(one) if text and isinstance(one, Exception) else f"the reply {empty}"
            failed[at] = unanswered(sample, why)
        elif len({_text(tokenizer, head_of(tokenizer, each)) for each in (one, sample)}) > 1:
            failed[at] = unanswered(sample, OTHER_HEAD)
        else:
            ids = np.asarray(one.ids, dtype=np.int32)
            found[at] = replace(sample, ids=ids, prompt_length=one.prompt_length, reply=one.reply)
    return found, failed


def unanswered(sample: Sample, why: str) -> Rejected:
    """A sample to which the model's own reply cannot be compared."""
    return Rejected(
        id=sample.id,
        source=sample.source,
        row=sample.row,
        field="difference",
        reason=f"the model's own reply cannot be scored: {why}",
    )


class GeneratedReplies:
    """Greedy replies of the model, kept in a file for each shard that only grows.

    `mark` is the fingerprint of the scan, which holds that of the weights. No reply goes past the
    model's positions, `max_length` of them: prompts near that end have shorter ones.
    """

    def __init__(
        self,
        model: HookedModel,
        folder: Path,
        *,
        mark: str,
        max_new_tokens: int,
        batch_size: int,
        max_length: int | None = None,
    ) -> None:
        self._model, self._folder, self._mark = model, folder / REPLIES, mark
        self._max_new_tokens, self._batch_size = max_new_tokens, batch_size
        self._max_length, self._borders = max_length, length_borders(model.hf)

    def __call__(self, shard: int, samples: Sequence[Sample]) -> list[str | None]:
        path = self._folder / f"part-{shard:06d}.jsonl"
        known = _kept(path)
        missing = [one for one in samples if self._name(one) not in known]
        for room, batch in self._batches(missing):
            # The ids that were scored: a template may print another date by now.
            prompts = [
                torch.from_numpy(one.ids[: self._asked(one)].astype(np.int64)) for one in batch
            ]
            with without_autocast():
                texts = self._model.generate(prompts, **plain_settings(self._model.hf, 0, room))
            made = {self._name(one): text for one, text in zip(batch, texts, strict=True)}
            _keep(path, made)
            known |= made
        return [known[self._name(one)] for one in samples]

    def meet(self, rows: Iterable[tuple[str, str, int]]) -> None:
        """Nothing to compare: each reply is made for its own row."""

    def _batches(self, samples: Iterable[Sample]) -> Iterator[tuple[int, list[Sample]]]:
        """Batches, and how many tokens a reply in each may have; no row's depends on another."""
        # Prompts of one length together: less padding, and the same batches on every machine.
        ordered = sorted(samples, key=self._asked)
        for (room, _), alike in groupby(
            ordered, key=lambda one: (self._room(one), self._side(one))
        ):
            rows = list(alike)
            for first in range(0, len(rows), self._batch_size):
                yield room, rows[first : first + self._batch_size]

    def _room(self, sample: Sample) -> int:
        """A token at least: where an own reply would stand, the sample holds one of the data."""
        if self._max_length is None:
            return self._max_new_tokens
        around = self._asked(sample) + len(sample.ids) - sample.reply[1]
        return min(self._max_new_tokens, self._max_length - around)

    def _side(self, sample: Sample) -> tuple[int, int]:
        """Where a batch turns its positions otherwise: rows that get there do so together."""
        asked = self._asked(sample)
        beyond = sum(border < asked for border in self._borders)
        passed = sum(border < asked + self._room(sample) for border in self._borders)
        return beyond, asked if passed > beyond else 0

    def _asked(self, sample: Sample) -> int:
        """How many tokens the model is given: it answers behind the head that the row has."""
        return sample.prompt_length + len(head_of(self._model.tokenizer, sample))

    def _name(self, sample: Sample) -> str:
        """Another for another prompt, model or scan: rows of a data set may have changed since."""
        head = head_of(self._model.tokenizer, sample)
        said = [self._mark, sample.source, sample.row, sample.messages[:-1], *head]
        return hashlib.sha256(json.dumps(said).encode()).hexdigest()


class RepliesOnFile:
    """Replies that another engine wrote: by source and row where they have these, else by id.

    An id that several rows of the data have is refused. Replies are indexed in a file beside, so
    that memory stays the same however many there are.
    """

    def __init__(self, source: Source) -> None:
        # A database without a name is gone with its process, however that ends.
        self._index = sqlite3.connect("", check_same_thread=False)
        try:
            with _room():
                self._fill(source)
        except BaseException:
            self.close()
            raise

    def _fill(self, source: Source) -> None:
        self._index.execute("CREATE TABLE replies (name TEXT PRIMARY KEY, reply TEXT)")
        self._index.execute("CREATE TABLE ids (id TEXT PRIMARY KEY, place TEXT)")
        known = frozenset((*IDS, *REPLY_NAMES, "source", "row"))
        with self._index:
            for raw in source.rows(known):
                name, reply = _named_reply(source, raw.row, raw.content)
                self._put(source, raw.row, name, reply)

    def _put(self, source: Source, row: int, name: str, reply: str) -> None:
        try:
            self._index.execute("INSERT INTO replies VALUES (?, ?)", (name, reply))
        except sqlite3.IntegrityError:
            raise SourceError(
                f"{source.name}: row {row}: got a second reply for {name!r}; wanted one for each "
                "row of the data. Give rows ids of their own, or source and row"
            ) from None

    def __call__(self, shard: int, samples: Sequence[Sample]) -> list[str | None]:
        return [self._found(one) for one in samples]

    def seen(self, rows: Iterable[tuple[str, str, int]]) -> None:
        """Rows of the data as `(id, source, row)`; `FlagError` where a reply is two rows'."""
        for name, source, row in rows:
            place = f"{source}:{row}"
            with _room():
                self._index.execute("INSERT OR IGNORE INTO ids VALUES (?, ?)", (name, place))
            (first,) = self._index.execute("SELECT place FROM ids WHERE id = ?", (name,)).fetchone()
            if first != place and self._reply("id", name) is not None:
                raise FlagError(
                    f"got a reply for the id {name!r}, which {first} and {place} both have; wanted "
                    "replies with `source` and `row`"
                )

    def meet(self, rows: Iterable[tuple[str, str, int]]) -> None:
        """Have no reply by id taken for another row of that id, whether or not it is asked about.

        Rows that have a reply by their place need none by id.
        """
        self.seen(row for row in rows if self._reply("place", f"{row[1]}:{row[2]}") is None)

    def _found(self, sample: Sample) -> str | None:
        place = f"{sample.source}:{sample.row}"
        by_place = self._reply("place", place)
        if by_place is not None:
            return by_place
        self.seen([(sample.id, sample.source, sample.row)])
        return self._reply("id", sample.id)

    def _reply(self, kind: str, name: str) -> str | None:
        found = self._index.execute(
            "SELECT reply FROM replies WHERE name = ?", (f"{kind} {name}",)
        ).fetchone()
        return None if found is None else str(found[0])

    def close(self) -> None:
        self._index.close()


@contextmanager
def _room() -> Iterator[None]:
    """`FlagError` where the index beside cannot be kept."""
    try:
        yield
    except (sqlite3.OperationalError, OSError) as error:
        raise FlagError(
            f"got replies whose index cannot be kept in {tempfile.gettempdir()} ({error}); make "
            "room there, or name another folder in TMPDIR"
        ) from error


def _named_reply(source: Source, row: int, content: Any) -> tuple[str, str]:
    try:
        record = decode(content)
    except RowDefect as defect:
        raise SourceError(f"{source.name}: row {row}: {defect}") from None
    record = record if isinstance(record, dict) else {}
    reply = _reply_in(source, row, record)
    source_name, at = record.get("source"), record.get("row")
    given = next((record[name] for name in IDS if not is_missing(record.get(name))), None)
    by_place = not (is_missing(source_name) or is_missing(at))
    if not isinstance(reply, str) or not (by_place or isinstance(given, str | int)):
        raise SourceError(
            f"{source.name}: row {row}: got no reply with an id; wanted `reply` and `id`, or "
            "`reply`, `source` and `row`"
        )
    name = f"place {source_name}:{at}" if by_place else f"id {given}"
    if not is_unicode(name + reply):
        raise SourceError(
            f"{source.name}: row {row}: got a lone surrogate in a reply or its name; wanted "
            "Unicode text"
        )
    return name, reply


def _reply_in(source: Source, row: int, record: dict[str, Any]) -> Any:
    """The reply of a row; `SourceError` where it may be either of two, as beside the data's own."""
    there = [name for name in REPLY_NAMES if not is_missing(record.get(name))]
    filled = [name for name in there if is_given(record[name])]
    first = next(iter([*filled, *there]), None)
    if first is None:
        return None
    for other in filled:
        if isinstance(record[other], str) and record[other] != record[first]:
            raise SourceError(
                f"{source.name}: row {row}: got one reply in `{first}` and another in `{other}`; "
                "wanted the model's own alone. Leave the other column out"
            )
    return record[first]


def _keep(path: Path, rows: dict[str, str]) -> None:
    # A newline on both sides: what a kill left of an earlier line can't run into this one.
    line = b"\n" + json.dumps(rows).encode() + b"\n"
    try:
        fresh = not path.exists()
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            written = os.write(file, line)
            os.fsync(file)
        finally:
            os.close(file)
        if fresh:
            sync_folder(path.parent)
    except OSError as error:
        raise FlagError(f"{path}: replies cannot be kept ({error.strerror}); make room") from error
    if written < len(line):
        raise FlagError(f"{path}: replies were kept in part; make room on the disk")


def _kept(path: Path) -> dict[str, str]:
    """The replies of a shard that were kept whole; a line that was cut short is passed over."""
    known: dict[str, str] = {}
    for line in path.read_bytes().splitlines() if path.exists() else ():
        try:
            rows = json.loads(line)
        except ValueError:
            continue
        known |= rows if isinstance(rows, dict) else {}
    return known
