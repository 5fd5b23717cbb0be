"""Flags: what a finished scan says about data sets and single rows."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from numbers import Integral
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from pvcore import flag_manifest
from pvcore.errors import FlagError
from pvcore.fingerprints import of_tokenizing, of_weights
from pvcore.flag_estimates import Estimate, Running, of_subset
from pvcore.flag_origin import Origin
from pvcore.flag_ranking import highest, resolution
from pvcore.flag_rows import Form, Message
from pvcore.flag_select import Chosen, Combination, JudgeScores, Selection, selected, threshold_of
from pvcore.flag_shards import (
    KEYS,
    SCORE_KINDS,
    footer_of,
    rejected_tables,
    score_columns,
    scores_path,
    tables,
    unanswered_tables,
)
from pvcore.flag_sources import Source, Sources, resolve
from pvcore.flag_text import conversations_of
from pvcore.flag_view import DatasetFlags, FlaggedRow, Scanned
from pvcore.numerals import Number
from pvcore.sites import Site
from pvcore.vectors import VectorBank

if TYPE_CHECKING:
    from pvcore.model import HookedModel

Score = Literal["response_mean", "last_prompt_token", "difference"]


class Flags(Scanned):
    """A finished scan, read from its folder in bounded memory.

    `site` and `score` are what `top` and `filter` look at unless told otherwise: the deepest site
    of the bank, and the projection difference (`filter` by a calibration: the mean over the reply).
    """

    def __init__(
        self,
        folder: str | PathLike[str],
        *,
        sources: Sources | Sequence[Source] | None = None,
        model: "HookedModel | None" = None,
        bank: VectorBank | None = None,
    ) -> None:
        self.folder = Path(folder)
        manifest = flag_manifest.read(self.folder)
        if manifest is None or manifest["status"] != "complete":
            raise FlagError(
                f"got {self.folder}, which holds a scan that is not finished; flag the same data "
                "into it again to finish it"
            )
        self.manifest: dict[str, Any] = manifest
        self._check_shards()
        self.origin = Origin(manifest)
        self._sources = _resolved(sources, self.folder)
        self.origin.check_names(self._sources or ())
        _check_scored_by(manifest["asked"], model, bank)
        self._model, self._bank = model, bank
        self._datasets: dict[str, DatasetFlags] | None = None

    def _check_shards(self) -> None:
        mark = flag_manifest.fingerprint(self.manifest["asked"])
        for shard in range(self._shards):
            footer = footer_of(self.folder, shard)
            if footer is None or footer.fingerprint != mark:
                raise FlagError(
                    f"got {scores_path(self.folder, shard)} missing, cut short or of another scan; "
                    "wanted every shard of this one. Flag the same data again: only what is "
                    "missing is made anew"
                )

    @classmethod
    def load(
        cls,
        folder: str | PathLike[str],
        *,
        sources: Sources | None = None,
        model: "HookedModel | None" = None,
        bank: VectorBank | None = None,
    ) -> "Flags":
        """A scan finished earlier. Text needs the `sources`, coloured tokens the model too.

        A model or bank other than those that scored is refused.
        """
        return cls(folder, sources=sources, model=model, bank=bank)

    def __repr__(self) -> str:
        totals = self.manifest["totals"]
        return (
            f"Flags({str(self.folder)!r}, {totals['scored']} rows scored, {totals['rejected']} "
            f"rejected, {len(self.traits)} vectors at {len(self.sites)} sites)"
        )

    @property
    def traits(self) -> tuple[str, ...]:
        return tuple(self.manifest["asked"]["bank"]["vectors"])

    @property
    def sites(self) -> tuple[Site, ...]:
        return tuple(map(Site.parse, self.manifest["asked"]["bank"]["sites"]))

    @property
    def site(self) -> Site:
        """The deepest one."""
        return max(self.sites)

    @property
    def columns(self) -> list[str]:
        """The score columns of every shard."""
        return score_columns(self.traits, self.sites)

    @property
    def _shards(self) -> int:
        return int(self.manifest["totals"]["shards"])

    @property
    def scored(self) -> int:
        return int(self.manifest["totals"]["scored"])

    @property
    def n_rejected(self) -> int:
        return int(self.manifest["totals"]["rejected"])

    @property
    def form(self) -> Form:
        """How the rows were read."""
        return Form(**self.manifest["asked"]["form"])

    def column(self, trait: str, *, site: Site | None = None, score: str = "difference") -> str:
        """The name of a column; `FlagError` for a trait, site or score that was not scanned."""
        place = self.site if site is None else site
        for what, got, known in (
            ("trait", trait, self.traits),
            ("site", place, self.sites),
            ("score", score, SCORE_KINDS),
        ):
            if got not in known:
                raise FlagError(f"got {what} {got!s}; this scan has {', '.join(map(str, known))}")
        return f"{trait}/{place}/{score}"

    def _check_source(self, source: str | None) -> None:
        names = self.manifest["asked"]["order"]
        if source is not None and source not in names:
            known = ", ".join(map(repr, names[:6])) + (", ..." if len(names) > 6 else "")
            raise FlagError(f"got source {source!r}; this scan has {known}")

    def tables(self, columns: Sequence[str] | None = None) -> Iterator[Any]:
        """The scored rows as pyarrow tables, one shard at a time."""
        return tables(self.folder, self._shards, columns)

    def rejected(self) -> Iterator[dict[str, Any]]:
        """The rows that could not be scored: id, source, row, field and reason."""
        for table in rejected_tables(self.folder, self._shards):
            yield from table.to_pylist()

    def unanswered(self) -> Iterator[dict[str, Any]]:
        """The scored rows that a subset drew and that lack an own reply; told as `rejected`."""
        for table in unanswered_tables(self.folder, self._shards):
            yield from table.to_pylist()

    def values(self, columns: Sequence[str]) -> Iterator[tuple[Any, NDArray[np.float64]]]:
        """The sources of each shard's rows, and its scores `[row, column]` with NaN for none."""
        for table in self.tables(["source", *columns]):
            held = [table[name].to_numpy(zero_copy_only=False) for name in columns]
            rows = np.array(held, dtype=np.float64).T.reshape(table.num_rows, len(columns))
            yield np.asarray(table["source"].to_pylist(), dtype=object), rows

    @property
    def datasets(self) -> dict[str, DatasetFlags]:
        """Every source with its counts, and the mean of every score with its interval."""
        if self._datasets is None:
            self._datasets = _datasets(self)
        return self._datasets

    def top(
        self,
        trait: str,
        n: int = 20,
        *,
        site: Site | None = None,
        score: Score | str = "difference",
        source: str | None = None,
        lowest: bool = False,
    ) -> list[FlaggedRow]:
        """The `n` rows with the highest score (the lowest with `lowest=True`), best first."""
        if not isinstance(n, Integral) or n < 0:
            raise FlagError(f"got {n!r} rows to show; wanted a whole number, 0 or more")
        column = self.column(trait, site=site, score=score)
        self._check_source(source)
        if not n:
            return []
        sign = -1.0 if lowest else 1.0

        def scores() -> Iterator[NDArray[np.float64]]:
            for sources, values in self.values([column]):
                wanted = source is None or sources == source
                yield np.where(wanted, sign * values[:, 0], np.nan)

        places = highest(scores, n, self.resolution(column))
        rows = self._rows_at(sorted(places))
        return [_flagged(rows[place], column) for place in places]

    def _rows_at(self, places: Sequence[int]) -> dict[int, dict[str, Any]]:
        """Rows by their place in the scan; the places in order."""
        found: dict[int, dict[str, Any]] = {}
        seen = 0
        for table in self.tables():
            here = [place for place in places if seen <= place < seen + table.num_rows]
            taken = table.take(np.array(here, dtype=np.int64) - seen).to_pylist()
            found |= dict(zip(here, taken, strict=True))
            seen += table.num_rows
        return found

    def resolution(self, column: str) -> float:
        """What two scores of a column may differ by through the batches that their rows were in."""
        mean = f"{column.rpartition('/')[0]}/response_mean"
        return resolution(values for _, values in self.values([column, mean]))

    def filter(
        self,
        trait: str,
        *,
        threshold: Number | None = None,
        percentile: Number = 95,
        clean: "Flags | None" = None,
        site: Site | None = None,
        score: Score | str | None = None,
        judge: JudgeScores | None = None,
        judge_threshold: Number | None = None,
        combine: Combination | str = "any",
    ) -> Selection:
        """The rows above a threshold: yours, or a percentile of clean data (paper, appendix K).

        Above is what is so by more than equal rows differ in other batches: 1e-5 of a usual score.

        `clean` is the scan of data without the trait; one that was scored otherwise, or has fewer
        than 20 rows, is refused. Without it and without a threshold the percentile is that of the
        vector's own calibration, which holds for the plain model that it was made on: scans under a
        plan refuse it, and other weights are not noticed. A threshold makes both idle. `score` is
        the difference unless told otherwise; of a calibration, which knows no difference, the
        `response_mean`.
        `judge` maps row ids to scores: flagged are rows that both call high (`all`) or either. An
        id that several rows have, or none, is refused.
        """
        if score is None:
            calibrated = threshold is None and clean is None
            score = "response_mean" if calibrated else "difference"
        column = self.column(trait, site=site, score=score)
        vector = self._bank[trait] if self._bank is not None else None
        bound = threshold_of(column, threshold, percentile, clean, vector, self)
        chosen = Chosen(
            column=column,
            threshold=bound,
            judge=judge,
            judge_threshold=judge_threshold,
            combine=combine,
        )
        return selected(chosen, self.tables(["id", "source", "row", column]), self)

    def conversations(self, rows: Sequence[FlaggedRow]) -> list[list[Message]]:
        """The text of rows, read again from the sources, which must be what was scored."""
        keys = [(one.source, one.row) for one in rows]
        return conversations_of(self.sources, self.form, keys, self.origin)

    @property
    def sources(self) -> tuple[Source, ...]:
        """Where the rows came from; `FlagError` where this is not known any more."""
        if self._sources is None:
            raise FlagError(
                "got a scan without its sources, which hold the text; give them: "
                "pv.Flags.load(folder, sources=...)"
            )
        return self._sources

    def report(self, path: str | PathLike[str], *, site: Site | None = None, top: int = 5) -> None:
        """Write an HTML page: distributions, data sets, correlations, and the highest rows.

        Rows are shown with their text where the sources are known, and coloured token by token
        where the model and the bank are.
        """
        from pvcore import report
        from pvcore.flag_report import page

        report.write(page(self, site or self.site, top, self._model, self._bank), Path(path))


def _check_scored_by(
    asked: Mapping[str, Any], model: "HookedModel | None", bank: VectorBank | None
) -> None:
    """Raises `FlagError` for a model or bank other than those that scored."""
    if bank is not None:
        sites = tuple(map(Site.parse, asked["bank"]["sites"]))
        for trait, scored in asked["bank"]["vectors"].items():
            held = bank[trait] if trait in bank.traits and set(sites) <= set(bank.sites) else None
            if held is None or held.at(sites).content_hash != scored:
                raise FlagError(
                    f"got a bank whose {trait} at {', '.join(map(str, sites))} is not the vector "
                    "that this scan was made with; wanted the same bank. Give it, or flag anew"
                )
    if model is None:
        return
    if of_tokenizing(model.tokenizer) != asked["tokenizer"]:
        raise FlagError(
            "got a model with another tokenizer than the one that made the tokens of this scan; "
            "wanted the same. Give it, or flag anew"
        )
    if of_weights(model.hf) != asked["model"]["weights"]:
        named = asked["model"]["id"] or "a model without a name"
        raise FlagError(
            f"got a model other than the one that scored, {named} in {asked['model']['dtype']}; "
            "wanted the same weights in the same type. Give it, or flag anew"
        )


def _resolved(sources: Any, folder: Path) -> tuple[Source, ...] | None:
    if sources is None:
        return None
    are_known = isinstance(sources, list | tuple) and all(isinstance(s, Source) for s in sources)
    return tuple(sources) if are_known else tuple(resolve(sources, without=folder))


def _flagged(row: dict[str, Any], column: str) -> FlaggedRow:
    scores = {
        name: float("nan") if value is None else float(value)
        for name, value in row.items()
        if name not in KEYS
    }
    named = {name: row[name] for name in KEYS}
    return FlaggedRow(**named, score=scores[column], scores=scores)


def _datasets(flags: Flags) -> dict[str, DatasetFlags]:
    names: list[str] = list(flags.manifest["asked"]["order"])
    columns = flags.columns
    sampled = flags.manifest["asked"]["difference"]["kind"] == "subset"
    width = len(columns) + (len(columns) // len(SCORE_KINDS) if sampled else 0)
    running = {name: Running(width) for name in names}
    tokens = {name: np.zeros(2, dtype=np.int64) for name in names}
    counts = ["n_prompt_tokens", "n_response_tokens"]
    for (sources, values), table in zip(
        flags.values(columns), flags.tables(["source", *counts]), strict=True
    ):
        with_own = np.hstack([values, _own(values)]) if sampled else values
        lengths = np.array([table[name].to_numpy() for name in counts], dtype=np.int64)
        for name in dict.fromkeys(sources.tolist()):
            mine = sources == name
            running[name].add(with_own[mine])
            tokens[name] += lengths[:, mine].sum(axis=1)
    rejected, unanswered = (
        Counter(row["source"] for row in rows) for rows in (flags.rejected(), flags.unanswered())
    )
    return {
        name: DatasetFlags(
            name=name,
            scored=running[name].rows,
            rejected=rejected[name],
            prompt_tokens=int(tokens[name][0]),
            response_tokens=int(tokens[name][1]),
            unanswered=unanswered[name],
            estimates=_estimates(columns, running[name].estimates()),
        )
        for name in names
    }


def _own(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Projections of own replies, one column for each three of the scores; NaN where none is."""
    size = len(SCORE_KINDS)
    mean, difference = map(SCORE_KINDS.index, ("response_mean", "difference"))
    return values[:, mean::size] - values[:, difference::size]


def _estimates(columns: Sequence[str], found: Sequence[Estimate]) -> dict[str, Estimate]:
    """By column; differences by the own replies that stand behind the columns, where some do."""
    by_column = dict(zip(columns, found, strict=False))
    differences = [name for name in columns if name.endswith("/difference")]
    for name, own in zip(differences, found[len(columns) :], strict=False):
        response = by_column[f"{name.removesuffix('difference')}response_mean"]
        by_column[name] = of_subset(response, own, by_column[name])
    return by_column
