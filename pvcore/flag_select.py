"""Selections: which rows are above a threshold, alone or together with a judge's scores."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from numbers import Real
from os import PathLike
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from pvcore.errors import FlagError
from pvcore.flag_clean import Cleaned, write_clean
from pvcore.flag_manifest import alike
from pvcore.flag_view import Scanned
from pvcore.numerals import Number
from pvcore.thresholds import FEWEST
from pvcore.vectors import PersonaVector

Combination = Literal["any", "all"]
JudgeScores = Mapping[str, Number | None] | Mapping[int, Number | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """A rule: the column and its threshold, and a judge's scores with theirs."""

    column: str
    threshold: float
    judge: JudgeScores | None = field(default=None, repr=False)
    judge_threshold: Number | None = None
    combine: Combination | str = "any"

    def __post_init__(self) -> None:
        if self.combine not in get_args(Combination):
            raise FlagError(f"got combine {self.combine!r}; wanted 'any' or 'all'")
        if (self.judge is None) != (self.judge_threshold is None):
            raise FlagError(
                "got a judge's scores or a judge_threshold, and not the other; wanted both"
            )
        bound = self.judge_threshold
        if bound is not None and not (isinstance(bound, Real) and np.isfinite(bound)):
            raise FlagError(f"got judge_threshold {bound!r}; wanted a finite number")


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """The rows that rules flag, by source; all others are kept. `one | other` flags both's rows.

    `unjudged` counts rows that the judge gave no score: the projection alone decided about them.
    """

    rules: tuple[Chosen, ...]
    flagged: Mapping[str, NDArray[np.int64]]
    scored: int
    unjudged: int
    flags: Scanned = field(repr=False)

    @property
    def n_flagged(self) -> int:
        return sum(map(len, self.flagged.values()))

    def __contains__(self, key: object) -> bool:
        """Whether `(source, row)` is flagged."""
        source, row = key if isinstance(key, tuple) and len(key) == 2 else ("", -1)
        rows = self.flagged.get(source, np.empty(0, dtype=np.int64))
        at = int(np.searchsorted(rows, row))
        return at < len(rows) and int(rows[at]) == row

    def __or__(self, other: "Selection") -> "Selection":
        if other.flags is not self.flags:
            raise FlagError("got selections of two scans; wanted both of one")
        none = np.empty(0, dtype=np.int64)
        return replace(
            self,
            rules=(*self.rules, *other.rules),
            flagged={
                name: np.union1d(self.flagged.get(name, none), other.flagged.get(name, none))
                for name in dict.fromkeys((*self.flagged, *other.flagged))
            },
            unjudged=max(self.unjudged, other.unjudged),
        )

    def write_clean(
        self, folder: str | PathLike[str], *, keep_rejected: bool = False
    ) -> dict[str, Cleaned]:
        """Copy every source without its flagged rows into a folder; what was left out, by source.

        Files keep their form, and lines of text their bytes; data sets become JSON lines. Rows that
        could not be scored are left out too, unless `keep_rejected`. Sources that are not what was
        scored are refused.
        """
        rejected: dict[str, set[int]] = {}
        for row in self.flags.rejected():
            rejected.setdefault(row["source"], set()).add(row["row"])
        left_out = {} if keep_rejected else rejected
        return write_clean(
            self.flags.sources, Path(folder), self.flagged, left_out, self.flags.origin
        )


class _Judge:
    """A judge's scores by id, NaN where there is none; each id is one row's."""

    def __init__(self, scores: JudgeScores) -> None:
        self._scores = {str(name): score for name, score in scores.items()}
        self._met: set[str] = set()

    def scores(self, names: Iterable[str]) -> NDArray[np.float64]:
        found: list[float] = []
        for name in names:
            score = self._scores.get(name)
            if name in self._scores and name in self._met:
                raise FlagError(
                    f"got a judge's score for the id {name!r}, which several rows have; wanted ids "
                    "that differ, or judge each source alone"
                )
            if not isinstance(score, Real | None):
                raise FlagError(f"got a judge's score {score!r} for {name!r}; wanted a number")
            self._met.add(name)
            found.append(float("nan") if score is None else float(score))
        return np.array(found, dtype=np.float64)

    def refuse_strangers(self, rejected: Iterable[Mapping[str, Any]]) -> None:
        """Raises `FlagError` for scores of what is no row of the scan, scored or rejected."""
        left = self._scores.keys() - self._met
        if left and (strangers := left - {row["id"] for row in rejected}):
            raise FlagError(
                f"got a judge's scores for {len(strangers)} ids that no row of this scan has, such "
                f"as {min(strangers)!r}; wanted ids of its rows, which tables(['id']) gives"
            )


def selected(rule: Chosen, tables: Iterable[Any], flags: Scanned) -> Selection:
    """The rows of the tables that a rule flags: above its threshold by more than rounding."""
    found: dict[str, list[NDArray[np.int64]]] = {}
    judge = None if rule.judge is None else _Judge(rule.judge)
    scored = unjudged = 0
    above = rule.threshold + flags.resolution(rule.column)
    for table in tables:
        values = table[rule.column].to_numpy(zero_copy_only=False).astype(np.float64)
        if np.isnan(values).any():
            raise FlagError(
                f"got rows without {rule.column}, which only a subset of this scan has; filter by "
                "score='response_mean', or flag with difference='exact' or 'approximate'"
            )
        high = values > above
        if judge is not None and rule.judge_threshold is not None:
            scores = judge.scores(table["id"].to_pylist())
            known = ~np.isnan(scores)
            unjudged += int((~known).sum())
            called = scores > rule.judge_threshold
            both = high & called if rule.combine == "all" else high | called
            high = np.where(known, both, high)
        sources = np.asarray(table["source"].to_pylist(), dtype=object)[high]
        rows = table["row"].to_numpy()[high]
        for name in dict.fromkeys(sources.tolist()):
            found.setdefault(name, []).append(rows[sources == name])
        scored += len(values)
    if judge is not None:
        judge.refuse_strangers(flags.rejected())
    flagged = {name: np.sort(np.concatenate(parts)) for name, parts in found.items()}
    return Selection(rules=(rule,), flagged=flagged, scored=scored, unjudged=unjudged, flags=flags)


def threshold_of(
    column: str,
    threshold: Number | None,
    percentile: Number,
    clean: Scanned | None,
    vector: PersonaVector | None,
    flags: Scanned | None = None,
) -> float:
    """The threshold given, or a percentile of clean data or of the vector's calibration.

    Clean data must be scored as the `flags` are, where these are there already. A calibration says
    nothing of what model it was made on: one for scans under a plan is refused, and that it is of
    the weights that were scanned is the caller's to see to.
    """
    if threshold is not None:
        if not isinstance(threshold, Real) or not np.isfinite(threshold):
            raise FlagError(f"got threshold {threshold!r}; wanted a finite number")
        return float(threshold)
    if not isinstance(percentile, Real) or not 0 < percentile < 100:
        raise FlagError(f"got percentile {percentile!r}; wanted one between 0 and 100")
    if clean is not None:
        if flags is not None:
            check_alike(flags, clean, column)
        return _percentile_of(clean, column, percentile)
    if flags is not None and flags.manifest["asked"].get("plan") is not None:
        raise FlagError(
            "got a scan under an armed plan, and no threshold but the vector's calibration, which "
            "is of the model without it; wanted clean data scored under the same plan. Give "
            "clean=pv.flag(model, clean_data, bank, out=...) made with it armed, or threshold="
        )
    _, site, score = column.rsplit("/", 2)
    held = {} if vector is None else vector.calibration.get(site, {})
    found = held.get(score, {}).get("percentiles", {}).get(f"{percentile:g}")
    if not isinstance(found, int | float):
        raise FlagError(
            f"got no threshold for {column}, no clean scan, and a vector without a calibrated "
            f"percentile {percentile:g} of it; wanted one of them: give threshold=, or "
            "clean=pv.flag(model, clean_data, bank, out=...)"
        )
    return float(found)


def check_alike(flags: Scanned, clean: Scanned, column: str) -> None:
    """Raises `FlagError` for a clean scan whose column is measured in another way."""
    if column not in clean.columns:
        raise FlagError(
            f"got a clean scan without {column}; wanted one with the same vectors and sites"
        )
    ours, theirs = (_measure(one.manifest["asked"], column) for one in (flags, clean))
    if differing := [what for what in ours if ours[what] != theirs.get(what)]:
        what = differing[0]
        raise FlagError(
            f"got a clean scan scored otherwise: its {what} is {theirs.get(what)!r}, and this "
            f"scan's {ours[what]!r}. Flag the clean data as this was flagged"
        )
    if not alike(*(one.manifest["asked"]["model"].get("probe", {}) for one in (flags, clean))):
        raise FlagError(
            "got a clean scan whose model has the same weights and gave other projections of the "
            "probe (a hook that acts?); wanted one made as this was. Flag the clean data again"
        )


def _measure(asked: Mapping[str, Any], column: str) -> dict[str, Any]:
    """What a score means: which vector at its site, which model, and which difference.

    Not the day that a template prints: nobody could flag clean data once and for all.
    """
    trait, site, score = column.rsplit("/", 2)
    model, bank = asked["model"], asked["bank"]
    found = {
        # Scans of earlier versions know one hash for all their sites.
        "vector": bank.get("by_site", {}).get(trait, {}).get(site, bank["vectors"].get(trait)),
        "dtype": model["dtype"],
        "model": model.get("weights"),
        "tokenizer": asked["tokenizer"],
        "plan": asked.get("plan", "none"),
        "turn": asked["form"]["turn"],
    }
    if score == "difference":
        # A subset has the exact difference, for some of the rows.
        given = asked["difference"]
        found["difference"] = "approximate" if given["kind"] == "approximate" else "exact"
        found["replies"] = "from a file" if "replies" in given else given.get("max_new_tokens")
        found["generation"] = given.get("generation")
    return found


def _percentile_of(clean: Scanned, column: str, percentile: Number) -> float:
    parts = [values[:, 0] for _, values in clean.values([column])]
    known = np.concatenate(parts) if parts else np.empty(0)
    known = known[~np.isnan(known)]
    if known.size < FEWEST:
        raise FlagError(
            f"got a clean scan in which {known.size} rows have {column}; wanted {FEWEST} or more "
            "to take a percentile of. Flag more clean data, or give threshold="
        )
    return float(np.percentile(known, percentile))
