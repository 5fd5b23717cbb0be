"""Scans on many machines with Ray Data, and scoring inside `datasets.map` (extra `scan`).

The unit of work is a shard of `pvcore.flagging`: an actor reads its rows, scores them and commits
the same file that one machine would write. So a scan may move between one machine and many, and
its own files are the only checkpoint: Ray's is not used, and a finished scan never reaches Ray.
Sources and the output folder must be on a file system that every machine sees.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, fields, replace
from datetime import datetime
from math import ceil
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pvcore import flag_manifest
from pvcore.errors import FlagError
from pvcore.flag_batches import rows_of
from pvcore.flag_dates import moment_for
from pvcore.flag_feed import Feed, Portion
from pvcore.flag_manifest import fingerprint
from pvcore.flag_progress import follow
from pvcore.flag_rows import Form
from pvcore.flag_scan import LAST_PROMPT_TOKEN, RESPONSE_MEAN, Scorer
from pvcore.flag_settings import Settings, asked_of, check_subject, reading_of
from pvcore.flag_shards import (
    Footer,
    Shard,
    folder_of,
    footer_of,
    footers,
    prepare,
    score_columns,
    write_shard,
)
from pvcore.flag_sources import RawRow, Source, Sources, check_columns, resolve
from pvcore.flag_tokens import Sample
from pvcore.flagging import NOT_FINITE, Scan
from pvcore.flags import Flags
from pvcore.model import HookedModel
from pvcore.vectors import PersonaVector, VectorBank

Make = str | PathLike[str] | Callable[[], HookedModel]
_FORM = frozenset(("prompt", "answer", "turn"))
_ELSEWHERE = Footer(fingerprint="", shard=-1, scored=0, rejected=0, tokens=0, digest="", share=0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What every machine needs to know: where the data and the results are, and what to do.

    `model` is a name or folder, or a function without arguments that makes the model there.
    """

    model: Make
    bank: VectorBank
    sources: tuple[Source, ...]
    folder: Path
    settings: Settings = field(default_factory=Settings)
    check_model: bool = True

    def load(self) -> HookedModel:
        """The model on this machine, on its GPU where there is one, checked as `pv.flag` does."""
        if callable(self.model):
            made = self.model()
        else:
            import torch

            place = "cuda" if torch.cuda.is_available() else None
            made = HookedModel.from_pretrained(self.model, device_map=place)
        check_subject(made, self.bank, self.check_model)
        return made

    def asked(self, model: HookedModel, moment: str | None) -> dict[str, Any]:
        return asked_of(model, self.bank, self.sources, self.settings, None, moment)

    def moment(self, model: HookedModel) -> str | None:
        """The moment that was written down when the scan began, or now."""
        return moment_for(model.tokenizer, flag_manifest.asked_before(self.folder))

    def scan(self, model: HookedModel) -> Scan:
        moment = self.moment(model)
        watch = flag_manifest.Watch(self.folder, self.sources)
        return Scan(
            folder=self.folder,
            model=model,
            bank=self.bank,
            sources=self.sources,
            reading=reading_of(model, self.settings.form, moment),
            settings=self.settings,
            replies=None,
            mark=fingerprint(self.asked(model, moment)),
            watch=watch,
        )


class ShardScanner:
    """Scores shards by number, one call for some of them: the actor that Ray Data maps over.

    Shards come in rising order for the most part, and the files are read on from where the last
    one ended. A shard that is on the disk already is not made again, so that a repeated call
    changes nothing.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self._scan: Scan | None = None
        self._wanted, self._next = -1, 0
        self._portions: Iterator[Portion] = iter(())

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, NDArray[np.int64]]:
        """`{"shard": numbers}` to the numbers and counts of what is now on the disk."""
        made = [self._shard(int(number)) for number in batch["shard"]]
        names = ("shard", "scored", "rejected")
        return {name: np.array([getattr(one, name) for one in made]) for name in names}

    def _shard(self, number: int) -> Footer:
        if self._scan is None:
            self._scan = self._job.scan(self._job.load())
        scan = self._scan
        held = footer_of(scan.folder, number)
        if held is not None and held.fingerprint == scan.mark:
            return held
        with ExitStack() as stack:
            own = scan.own_replies(stack)
            (made,) = scan.shards(self._of_shard(scan, number), own)
        assert isinstance(made, Shard), "a portion that is not held is scored"
        write_shard(scan.folder, made)
        return made.footer

    def _of_shard(self, scan: Scan, number: int) -> Iterator[Portion]:
        self._wanted, begun = number, self._next
        self._next = 0  # left half-way, the files are read from their beginning
        if number < begun or begun == 0:
            feed = Feed(
                sources=scan.sources,
                reading=scan.reading,
                shard_rows=scan.settings.shard_rows,
                held=lambda shard: None if shard == self._wanted else _ELSEWHERE,
            )
            self._portions = feed.portions()
        for portion in self._portions:
            if portion.shard != number:
                continue
            if portion.ends:
                self._next = number + 1
            yield portion
            if portion.ends:
                return
        raise FlagError(f"got shard {number}, of which the sources have none; give the same data")


def flag_on_ray(
    model: Make,
    sources: Sources,
    bank: VectorBank | PersonaVector,
    *,
    out: str | PathLike[str],
    actors: int = 2,
    cpus: float | int = 1,
    gpus: float | int = 0,
    address: str | None = None,
    check_model: bool = True,
    progress: bool = False,
    **settings: Any,
) -> Flags:
    """Like `pv.flag`, on Ray Data: locally, or on the cluster at `address`.

    `actors` score at once, each with so many `cpus` and `gpus`; a cluster needs one CPU more.
    Killed actors are replaced, and after a killed driver the same call goes on. `settings` are
    those of `pv.flag` except `replies`; sources are files, which every machine must see.
    """
    wanted = _settings(settings)
    folder = folder_of(out).absolute()
    found = resolve(sources, without=folder)
    check_columns(found, wanted.form)
    if held := next((one.name for one in found if one.path is None), None):
        raise FlagError(f"got the data set {held!r}, which only this process has; wanted files")
    stacked = VectorBank(bank) if isinstance(bank, PersonaVector) else bank
    job = Job(
        model=_anywhere(model),
        bank=stacked,
        sources=tuple(replace(one, path=one.path.absolute()) for one in found if one.path),
        folder=folder,
        settings=wanted,
        check_model=check_model,
    )
    _ray()  # before a folder is made
    prepare(folder)
    with flag_manifest.alone(folder):
        _run(job, actors=actors, cpus=cpus, gpus=gpus, address=address, progress=progress)
    return Flags(folder, sources=job.sources, bank=stacked)


def _settings(given: dict[str, Any]) -> Settings:
    """Settings as `pv.flag` takes them; `FlagError` for one that it does not have."""
    names = {one.name for one in fields(Settings)} - {"form"}
    unknown = sorted(given.keys() - names - _FORM)
    if unknown:
        raise FlagError(
            f"got settings {', '.join(unknown)}; wanted some of {', '.join(sorted(names | _FORM))}"
        )
    form = Form(**{name: one for name, one in given.items() if name in _FORM})
    return Settings(form=form, **{name: one for name, one in given.items() if name in names})


def _anywhere(model: Make) -> Make:
    """A folder by its whole path: workers begin elsewhere, and would take it for a name."""
    known = isinstance(model, str | PathLike) and Path(model).is_dir()
    return str(Path(model).absolute()) if known and not callable(model) else model


def _run(
    job: Job,
    *,
    actors: int,
    cpus: float | int,
    gpus: float | int,
    address: str | None,
    progress: bool,
) -> None:
    ray = _ray()
    watch = flag_manifest.Watch(job.folder, job.sources)
    count = count_shards(job)
    started = not ray.is_initialized()
    if started:
        # Actors hold their CPUs for good. Ray's own tasks need one more, or wait for ever.
        local = {"num_cpus": ceil(actors * cpus) + 1} if address is None else {}
        ray.init(address=address, log_to_driver=False, include_dashboard=False, **local)
    try:
        there = ray.cluster_resources()
        refuse_too_few(there, actors=min(actors, count), cpus=cpus, gpus=gpus)
        # A driver without a GPU leaves the probe of the model to a machine that has one.
        probing = ray.remote(num_cpus=cpus, num_gpus=gpus)(_asked) if gpus else None
        asked = ray.get(probing.remote(job)) if probing is not None else _asked(job)
        watch.refuse_stirred()  # since the rows were counted
        manifest = flag_manifest.begin(job.folder, asked)
        mark = fingerprint(asked)
        # A finished job handed to Ray may wait for ever: it gets only what is left to do.
        left = [shard for shard in range(count) if not _is_held(job.folder, shard, mark)]
        try:
            if left:
                made_now = _map(job, left, min(actors, len(left)), cpus, gpus)
                follow(made_now, job.folder, left, shown=progress)
        finally:
            watch.refuse_changed()  # also in place of what Ray makes of an actor's error
        done = {"status": "complete", "totals": _totals(job.folder, mark, count)}
        flag_manifest.write(job.folder, {**manifest, **done})
    finally:
        if started:
            ray.shutdown()


def _ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise FlagError("got no package ray; install it: pip install 'pvcore[scan]'") from error
    return ray


def _totals(folder: Path, mark: str, count: int) -> dict[str, int]:
    """Of all shards; `FlagError` where some of this very scan are not there."""
    made = [one for one in footers(folder) if one.fingerprint == mark]
    if [footer.shard for footer in made] != list(range(count)):
        raise FlagError(f"got {len(made)} of {count} shards; call again to make the others")
    totals = {"shards": count}
    for name in ("scored", "rejected", "tokens"):
        totals[name] = sum(getattr(footer, name) for footer in made)
    return totals


def refuse_too_few(
    there: Mapping[str, float], *, actors: int, cpus: float | int, gpus: float | int
) -> None:
    """Raises `FlagError` where a cluster has not what the actors and Ray's own tasks take."""
    for what, wanted in (("CPU", actors * cpus + 1), ("GPU", actors * gpus)):
        if there.get(what, 0) < wanted:
            raise FlagError(
                f"got a cluster of {there.get(what, 0):g} {what}s for {actors} actors, which take "
                f"{wanted:g} with Ray's own tasks and would wait for ever; wanted fewer actors, or "
                "machines that are there before the scan begins"
            )


def _asked(job: Job) -> dict[str, Any]:
    model = job.load()
    return job.asked(model, job.moment(model))


def _is_held(folder: Path, shard: int, mark: str) -> bool:
    footer = footer_of(folder, shard)
    return footer is not None and footer.fingerprint == mark


def _map(
    job: Job, shards: Sequence[int], actors: int, cpus: float | int, gpus: float | int
) -> Iterator[int]:
    import ray.data

    # One block for each shard: Ray joins small inputs into one, which one actor would get.
    rows = ray.data.from_items([{"shard": shard} for shard in shards])
    blocks = rows.repartition(len(shards))
    done = blocks.map_batches(
        ShardScanner,
        fn_constructor_args=(job,),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=actors),
        num_cpus=cpus,
        num_gpus=gpus,
    )
    for row in done.iter_rows():
        yield int(row["shard"])


def count_shards(job: Job) -> int:
    """How many shards the sources have; rows are counted without being read."""
    known = job.settings.form.known
    rows = sum(1 for source in job.sources for _ in source.rows(known))
    if not rows:
        raise FlagError("got sources without a row; wanted conversations to score")
    return -(-rows // job.settings.shard_rows)


def _files_of(model: Make) -> tuple[tuple[str, int, int], ...]:
    """Name, size and time of the files of a model's folder; () of any other model."""
    if callable(model) or not Path(model).is_dir():
        return ()
    found = sorted(path for path in Path(model).rglob("*") if path.is_file())
    states = [(path.as_posix(), path.stat()) for path in found]
    return tuple((name, state.st_size, state.st_mtime_ns) for name, state in states)


class RowScorer:
    """Scores the rows of a batch in any format: for `datasets.map(..., batched=True)`; pickles.

    Gives a column for each score of `pv.flag`'s approximate difference, NaN in rows that cannot be
    scored, and `flag_reason`, empty in all others. The model is made where the first batch comes.
    `datasets` keeps results under this object's state: make another one for another model, also
    when it lies in the same folder, whose files' sizes and times the state holds. Beside rows in
    the formats "arrow" and "pandas" it keeps nothing but the scores.
    """

    def __init__(
        self,
        model: Make,
        bank: VectorBank | PersonaVector,
        *,
        form: Form | None = None,
        max_tokens: int | None = None,
        check_model: bool = True,
    ) -> None:
        self._model, self._check_model = model, check_model
        self._bank = VectorBank(bank) if isinstance(bank, PersonaVector) else bank
        self._settings = Settings(form=form or Form(), max_tokens=max_tokens)
        self._loaded: HookedModel | None = None
        self._files = _files_of(model)
        # Every worker goes by the same day, whenever its first batch comes.
        self._day = datetime.now().date().isoformat()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_loaded": None}

    def __call__(self, batch: Any) -> dict[str, list[Any]]:
        rows = rows_of(batch, self._settings.form.known)
        if self._loaded is None:
            job = Job(
                model=self._model,
                bank=self._bank,
                sources=(),
                folder=Path(),
                check_model=self._check_model,
            )
            self._loaded = job.load()
        source = Source(name="batch", kind="rows")
        dated = moment_for(self._loaded.tokenizer) is not None
        reading = reading_of(self._loaded, self._settings.form, self._day if dated else None)
        found, _ = reading.samples([(source, RawRow(at, row, 0.0)) for at, row in enumerate(rows)])
        samples = [one for one in found if isinstance(one, Sample)]
        scorer = Scorer(self._loaded, self._bank, self._settings.tokens_on(self._loaded))
        pairs = scorer(samples)
        mean, last = pairs[:, :, RESPONSE_MEAN], pairs[:, :, LAST_PROMPT_TOKEN]
        scores = np.stack([mean, last, mean - last], axis=-1).transpose(0, 2, 1, 3)
        columns = score_columns(self._bank.traits, self._bank.sites)
        table = np.full((len(rows), len(columns)), np.nan)
        table[[one.row for one in samples]] = scores.reshape(len(samples), len(columns))
        reasons = [""] * len(rows)
        for one in found:
            if not isinstance(one, Sample):
                reasons[one.row] = f"{one.field}: {one.reason}" if one.field else one.reason
            elif not np.isfinite(table[one.row]).all():
                table[one.row] = np.nan
                reasons[one.row] = NOT_FINITE
        by_column = {name: table[:, at].tolist() for at, name in enumerate(columns)}
        return {**by_column, "flag_reason": reasons}
