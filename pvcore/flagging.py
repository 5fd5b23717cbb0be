"""Flagging training data: projections of every conversation, exactly once, however often it stops.

Projection difference of a reply (arXiv 2507.21509, section 6 and appendix I): its mean projection
minus that of the model's own greedy reply (`exact`), or minus the projection at the last prompt
token, which the same forward gives (`approximate`), or the first for a random share of the rows
and with it an estimate for each source (`subset`).
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pvcore import flag_manifest
from pvcore.errors import FlagError
from pvcore.flag_dates import moment_for
from pvcore.flag_feed import Feed, Portion, ahead
from pvcore.flag_manifest import fingerprint
from pvcore.flag_progress import Meter, bar
from pvcore.flag_replies import (
    GeneratedReplies,
    OwnReplies,
    RepliesOnFile,
    answers,
    in_subset,
    unanswered,
)
from pvcore.flag_rows import Form, Turn
from pvcore.flag_scan import LAST_PROMPT_TOKEN, RESPONSE_MEAN, Scorer
from pvcore.flag_settings import (
    Difference,
    Settings,
    asked_of,
    check_subject,
    reading_of,
    replies_source,
)
from pvcore.flag_shards import (
    Footer,
    Shard,
    folder_of,
    footer_of,
    footers,
    names,
    prepare,
    score_columns,
    write_shard,
)
from pvcore.flag_sources import Source, Sources, check_columns, resolve
from pvcore.flag_tokens import Reading, Rejected, Sample, Scored
from pvcore.flags import Flags
from pvcore.model import HookedModel
from pvcore.numerals import Number
from pvcore.vectors import PersonaVector, VectorBank

# Shards read ahead, and shards that wait to be written: two each keep everybody at work.
DEPTH = 2
NOT_FINITE = "got an infinite or NaN projection; load the model in bfloat16 or float32"


def flag(
    model: HookedModel,
    sources: Sources,
    bank: VectorBank | PersonaVector,
    *,
    out: str | PathLike[str],
    difference: Difference | str = "approximate",
    replies: str | PathLike[str] | None = None,
    share: Number = 0.05,
    max_new_tokens: int = 256,
    prompt: str = "",
    answer: str = "",
    turn: Turn | str = "last",
    seed: int = 0,
    shard_rows: int = 2048,
    max_tokens: int | None = None,
    check_model: bool = True,
    progress: bool = False,
) -> Flags:
    """Score every conversation of the sources on every vector at every site of the bank.

    `sources`: files (JSON lines, CSV, Parquet), globs, data sets, a mapping of names to these, or a
    list. Rows hold `messages`, ShareGPT's `conversations`, or two columns, also of your own names
    (`prompt=`, `answer=`); `turn` says which reply counts. A row that cannot be scored goes to
    `out/rejected` with the reason, one of a subset without an own reply to `out/unanswered`. Called
    again after a stop it goes on; called otherwise it refuses and says what changed. `exact` and
    `subset` take own replies from the file `replies`. All forwards are those under an armed plan.
    """
    settings = Settings(
        difference=difference,
        share=share,
        seed=seed,
        max_new_tokens=max_new_tokens,
        form=Form(prompt=prompt, answer=answer, turn=turn),
        shard_rows=shard_rows,
        max_tokens=max_tokens,
    )
    stacked = VectorBank(bank) if isinstance(bank, PersonaVector) else bank
    check_subject(model, stacked, check_model)
    return _flags(model, sources, stacked, folder_of(out), settings, replies, progress)


def _flags(
    model: HookedModel,
    given_sources: Sources,
    bank: VectorBank,
    folder: Path,
    settings: Settings,
    replies: str | PathLike[str] | None,
    progress: bool,
) -> Flags:
    sources = resolve(given_sources, without=folder)
    check_columns(sources, settings.form)
    given = replies_source(replies, settings)
    reading_of(model, settings.form)  # refuses what cannot be read, before a folder is made
    prepare(folder)
    with flag_manifest.alone(folder):
        moment = moment_for(model.tokenizer, flag_manifest.asked_before(folder))
        reading = reading_of(model, settings.form, moment)
        watch = flag_manifest.Watch(folder, sources, given)
        asked = asked_of(model, bank, sources, settings, given, moment)
        manifest = flag_manifest.begin(folder, asked)
        if not _is_done(folder, manifest, sources):
            totals = manifest.get("totals") if manifest["status"] == "complete" else None
            scan = Scan(
                most=None if totals is None else totals["shards"],
                folder=folder,
                model=model,
                bank=bank,
                sources=sources,
                reading=reading,
                settings=settings,
                replies=given,
                mark=fingerprint(asked),
                watch=watch,
            )
            flag_manifest.finish(folder, manifest, scan.run(progress))
    return Flags(folder, sources=sources, model=model, bank=bank)


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What is left of a portion once it is scored: `scores` are `[sample, column]`."""

    samples: Sequence[Scored]
    scores: NDArray[Any]
    rejected: Sequence[Rejected]
    unanswered: Sequence[Rejected]
    tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Scan:
    """One run over all the sources; of `most` so many shards, where they were finished once."""

    folder: Path
    model: HookedModel
    bank: VectorBank
    sources: Sequence[Source]
    reading: Reading
    settings: Settings
    replies: Source | None
    mark: str
    watch: flag_manifest.Watch
    most: int | None = None

    def run(self, progress: bool) -> dict[str, Any]:
        """Score and write every shard that is not there yet; what the manifest says of all."""
        meter, shards = Meter(), 0
        with ExitStack() as stack:
            own = self.own_replies(stack)
            feed = Feed(
                sources=self.sources,
                reading=self.reading,
                shard_rows=self.settings.shard_rows,
                held=self._held,
                begins=partial(flag_manifest.note_beginning, self.folder),
            )
            show = stack.enter_context(bar(shown=progress))
            writer = stack.enter_context(ThreadPoolExecutor(1, "pvcore-flag-writer"))
            portions = stack.enter_context(closing(ahead(feed.portions(), DEPTH)))
            for footer, fresh in _written(self.shards(portions, own), self.folder, writer):
                meter.add(footer, fresh=fresh)
                shards += 1
                show(meter)
        self.watch.refuse_changed()
        self._refuse_more_than(shards)
        if not meter.rows + meter.rejected:
            raise FlagError("got sources without a row; wanted conversations to score")
        totals = {
            "shards": shards,
            "scored": meter.rows,
            "rejected": meter.rejected,
            "tokens": sum(footer.tokens for footer in footers(self.folder)),
        }
        return {"totals": totals, "data_sets": feed.tallies()}

    def _held(self, shard: int) -> Footer | None:
        found = footer_of(self.folder, shard)
        return found if found is not None and found.fingerprint == self.mark else None

    def own_replies(self, stack: ExitStack) -> OwnReplies | None:
        """Where the model's own replies come from; None where the difference needs none."""
        if self.settings.difference == "approximate":
            return None
        if self.replies is not None:
            on_file = RepliesOnFile(self.replies)
            stack.callback(on_file.close)
            on_file.meet(names(self.folder))
            return on_file
        return GeneratedReplies(
            self.model,
            self.folder,
            mark=self.mark,
            max_new_tokens=self.settings.max_new_tokens,
            batch_size=self.settings.reply_batch,
            max_length=self.reading.max_length,
        )

    def shards(
        self, portions: Iterator[Portion], own: OwnReplies | None = None
    ) -> Iterator[Shard | Footer]:
        """Every portion as a scored shard; as its footer alone where it was scored before."""
        scorer = Scorer(self.model, self.bank, self.settings.tokens_on(self.model))
        parts: list[Part] = []
        for portion in portions:
            if self.most is not None and portion.shard >= self.most:
                raise FlagError(
                    f"got more rows than the {self.most} shards of {self.folder}, which is "
                    "finished; wanted the same data. Give another out"
                )
            if portion.held is not None:
                yield portion.held
                continue
            parts.append(self._part(portion, scorer, own))
            if portion.ends:
                # A kill may come before the end: what is on the disk must hold without it.
                self.watch.refuse_changed()
                yield self._joined(portion, parts)
                parts = []

    def _part(self, portion: Portion, scorer: Scorer, own: OwnReplies | None) -> Part:
        samples = list(portion.samples)
        if own is not None:
            asked = [(one.id, one.source, one.row) for one in samples]
            own.meet([*asked, *((one.id, one.source, one.row) for one in portion.rejected)])
        scores, replied = self._scored(portion.shard, samples, scorer, own)
        # Without an own reply a row of a subset keeps what it says itself: only a share of the rows
        # is asked for one at all, and which rows those are must not decide what is kept.
        keeps = self.settings.difference == "subset"
        samples, scores, more = _sound(samples, scores, {} if keeps else replied, self.bank)
        lost = {(one.source, one.row) for one in more}
        unanswered = [replied[at] for at in sorted(replied)] if keeps else []
        return Part(
            samples=[one.scored for one in samples],
            scores=scores.transpose(0, 2, 1, 3).reshape(len(samples), self._width),
            rejected=[*portion.rejected, *more],
            unanswered=[one for one in unanswered if (one.source, one.row) not in lost],
            tokens=sum(len(one.ids) for one in samples),
        )

    @property
    def _width(self) -> int:
        return len(score_columns(self.bank.traits, self.bank.sites))

    def _joined(self, last: Portion, parts: Sequence[Part]) -> Shard:
        samples = [one for part in parts for one in part.samples]
        rejected = sorted((one for part in parts for one in part.rejected), key=self._place)
        unanswered = [one for part in parts for one in part.unanswered]
        columns = score_columns(self.bank.traits, self.bank.sites)
        footer = Footer(
            fingerprint=self.mark,
            shard=last.shard,
            scored=len(samples),
            rejected=len(rejected),
            tokens=sum(part.tokens for part in parts),
            digest=last.digest,
            share=last.share if last.share == last.share else -1.0,
            unanswered=len(unanswered),
        )
        return Shard(
            footer=footer,
            samples=samples,
            rejected=rejected,
            columns=columns,
            scores=np.concatenate([part.scores for part in parts]),
            unanswered=unanswered,
        )

    def _place(self, row: Rejected) -> tuple[int, int]:
        names = [source.name for source in self.sources]
        return names.index(row.source), row.row

    def _scored(
        self, shard: int, samples: Sequence[Sample], scorer: Scorer, own: OwnReplies | None
    ) -> tuple[NDArray[Any], dict[int, Rejected]]:
        """`[sample, site, n_vec, 3]`, and the samples whose own reply cannot be scored."""
        if own is None:
            pairs = scorer(samples)
            mean, last = pairs[:, :, RESPONSE_MEAN], pairs[:, :, LAST_PROMPT_TOKEN]
            return np.stack([mean, last, mean - last], axis=-1), {}
        share = self.settings.share if self.settings.difference == "subset" else 1.0
        chosen = [
            at
            for at, one in enumerate(samples)
            if in_subset(one.source, one.row, share, self.settings.seed)
        ]
        texts = own(shard, [samples[at] for at in chosen])
        answered, failed = answers(self.reading, samples, chosen, texts)
        pairs = scorer([*samples, *answered.values()])
        mean, last = pairs[:, :, RESPONSE_MEAN], pairs[:, :, LAST_PROMPT_TOKEN]
        difference = np.full_like(mean[: len(samples)], np.nan)
        places = list(answered)
        difference[places] = mean[places] - mean[len(samples) :]
        lost = [at for at in places if not np.isfinite(difference[at]).all()]
        failed |= {at: unanswered(samples[at], NOT_FINITE) for at in lost}
        difference[lost] = np.nan
        count = len(samples)
        return np.stack([mean[:count], last[:count], difference], axis=-1), failed

    def _refuse_more_than(self, shards: int) -> None:
        beyond = [footer.shard for footer in footers(self.folder) if footer.shard >= shards]
        if beyond:
            raise FlagError(
                f"got sources of {shards} shards, and {self.folder} holds shard {beyond[0]}: the "
                "data has become less. Give the same data, or another out"
            )


def _sound(
    samples: Sequence[Sample],
    scores: NDArray[Any],
    failed: dict[int, Rejected],
    bank: VectorBank,
) -> tuple[list[Sample], NDArray[Any], list[Rejected]]:
    """The samples whose scores are numbers, and the others as rejected rows."""
    overflown = ~np.isfinite(scores[..., :2]).all(axis=(2, 3))  # [sample, site]
    rejected = dict(failed)
    for at in np.flatnonzero(overflown.any(axis=1)).tolist():
        sample = samples[at]
        rejected[at] = Rejected(
            id=sample.id,
            source=sample.source,
            row=sample.row,
            field=str(bank.sites[int(overflown[at].argmax())]),
            reason=NOT_FINITE,
        )
    kept = [at for at in range(len(samples)) if at not in rejected]
    return [samples[at] for at in kept], scores[kept], [rejected[at] for at in sorted(rejected)]


def _written(
    shards: Iterator[Shard | Footer], folder: Path, writer: ThreadPoolExecutor
) -> Iterator[tuple[Footer, bool]]:
    """Each shard's footer once it is on the disk, and whether it was written now."""
    waiting: list[tuple[Footer, Future[None] | None]] = []
    for shard in shards:
        if isinstance(shard, Shard):
            waiting.append((shard.footer, writer.submit(write_shard, folder, shard)))
        else:
            waiting.append((shard, None))
        while len(waiting) > DEPTH:
            yield _settled(waiting.pop(0))
    while waiting:
        yield _settled(waiting.pop(0))


def _settled(entry: tuple[Footer, Future[None] | None]) -> tuple[Footer, bool]:
    footer, future = entry
    if future is not None:
        future.result()
    return footer, future is not None


def _is_done(folder: Path, manifest: dict[str, Any], sources: Sequence[Source]) -> bool:
    """Whether nothing is left to do. Rows of data sets are compared again, whatever is done."""
    if manifest["status"] != "complete" or any(source.path is None for source in sources):
        return False
    mark = fingerprint(manifest["asked"])
    held = (footer_of(folder, shard) for shard in range(manifest["totals"]["shards"]))
    return all(footer is not None and footer.fingerprint == mark for footer in held)
