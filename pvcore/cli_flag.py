"""`pvcore flag`: score training data on persona vectors, row by row, however often it stops."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from math import isfinite
from operator import or_
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from pvcore.cli_models import model_of, vectors_at
from pvcore.cli_options import AsJson, Device, Dtype, Layers, Model, VectorFiles
from pvcore.cli_output import print_document, require_places, split_list
from pvcore.errors import PvcoreError

if TYPE_CHECKING:
    from pvcore.flag_sources import Source
    from pvcore.flags import Flags
    from pvcore.vectors import VectorBank


Sources = Annotated[
    list[str], Argument(help="Files or globs: .jsonl, .csv, .parquet, the first two also with .gz.")
]
Folder = Annotated[Path, Option(help="Folder for the scores; a scan that stopped goes on there.")]
Difference = Annotated[
    str, Option(help="approximate (one pass), exact (own replies) or subset (own, for a share).")
]
Share = Annotated[float, Option(help="Share of the rows a subset takes.")]
Replies = Annotated[Path | None, Option(help="File of own replies, with id or source and row.")]
Prompt = Annotated[str, Option(help="Column of the prompt; default: the field's usual names.")]
Answer = Annotated[str, Option(help="Column of the reply.")]
Turn = Annotated[str, Option(help="Which reply counts: last or first.")]
NewTokens = Annotated[int, Option(help="Longest own reply, in tokens.")]
ShardRows = Annotated[int, Option(help="Rows of one file of results.")]
MaxTokens = Annotated[int | None, Option(help="Tokens of one batch, padding counted.")]
Seed = Annotated[int, Option(help="Seed of the subset.")]
Top = Annotated[int, Option(help="Print so many of the highest rows of each trait.")]
Report = Annotated[Path | None, Option(help="Write an HTML page there.")]
Clean = Annotated[Path | None, Option(help="Folder for copies without the flagged rows.")]
KeepRejected = Annotated[
    bool, Option("--keep-rejected", help="For --clean: keep rows that cannot be scored.")
]
Threshold = Annotated[
    list[str] | None, Option("--threshold", help="For --clean: TRAIT=NUMBER; may be repeated.")
]
Percentile = Annotated[
    float | None,
    Option(help="For --clean: flag rows above that of clean data, or of the vectors' calibration."),
]
CleanScan = Annotated[
    Path | None, Option(help="For --percentile: folder of a finished scan of clean data.")
]
Site_ = Annotated[str | None, Option("--site", help="For --clean: as in resid_post.19; deepest.")]
Score = Annotated[str | None, Option(help="For --clean: difference or response_mean.")]


def flag(
    model: Model,
    sources: Sources,
    vector: VectorFiles,
    out: Folder,
    layers: Layers = None,
    difference: Difference = "approximate",
    share: Share = 0.05,
    replies: Replies = None,
    prompt: Prompt = "",
    answer: Answer = "",
    turn: Turn = "last",
    max_new_tokens: NewTokens = 256,
    shard_rows: ShardRows = 2048,
    max_tokens: MaxTokens = None,
    seed: Seed = 0,
    top: Top = 5,
    report: Report = None,
    clean: Clean = None,
    keep_rejected: KeepRejected = False,
    threshold: Threshold = None,
    percentile: Percentile = None,
    clean_scan: CleanScan = None,
    site: Site_ = None,
    score: Score = None,
    dtype: Dtype = "auto",
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Score conversations on persona vectors: means by source, the highest rows, a cleaned copy."""
    _run(dict(locals()))


_PASSED = ("difference", "share", "replies", "prompt", "answer", "turn", "max_new_tokens")
_RULE = ("threshold", "percentile", "clean_scan", "site", "score", "keep_rejected")


def _run(options: dict[str, Any]) -> None:
    """Everything that can be refused is, before the first row is scored."""
    from pvcore.flag_rows import Form
    from pvcore.flag_sources import check_columns, resolve
    from pvcore.vectors import VectorBank

    report, top = options["report"], options["top"]
    if top < 0:
        raise PvcoreError(f"got --top {top}; wanted 0 or more")
    sources = resolve(options["sources"], without=options["out"])
    _check_report(options, sources)
    check_columns(sources, Form(**{name: options[name] for name in ("prompt", "answer", "turn")}))
    bank = VectorBank(vectors_at(options["vector"]), layers=split_list(options["layers"], int))
    rules = _rules(options, bank, sources)
    found = _scanned(options, bank)
    document = _document(found, top)
    if report is not None:
        found.report(report)
        document["report"] = str(report)
    if rules:
        document["clean"] = _cleaned(found, rules, options["clean"], options["keep_rejected"])
    print_document(document, options["as_json"])


def _check_report(options: dict[str, Any], sources: "list[Source]") -> None:
    """Refuse a page in the place of what the scan reads or writes."""
    from pvcore import flag_manifest
    from pvcore.flag_clean import check_places
    from pvcore.flag_shards import FOLDERS

    report, out, clean = options["report"], options["out"], options["clean"]
    require_places(report)
    if report is None:
        return
    taken = [out / name for name in (*FOLDERS, flag_manifest.NAME)]
    taken += [one.path for one in sources if one.path is not None] + list(options["vector"])
    taken += [] if clean is None else [clean, *check_places(sources, clean)]
    page = report.resolve()
    for place in taken:
        if page in (place.resolve(), *place.resolve().parents):
            raise PvcoreError(
                f"got --report {report}, where {place} has its place; wanted a file of its own"
            )


def _scanned(options: dict[str, Any], bank: "VectorBank") -> "Flags":
    from pvcore.flagging import flag as flag_data

    names = (*_PASSED, "shard_rows", "max_tokens", "seed", "out")
    return flag_data(
        model_of(options["model"], options["dtype"], options["device"]),
        options["sources"],
        bank,
        progress=not options["as_json"],
        **{name: options[name] for name in names},
    )


def _document(flags: "Flags", top: int) -> dict[str, Any]:
    sets = [
        {
            "source": one.name,
            "scored": one.scored,
            "rejected": one.rejected,
            "unanswered": one.unanswered,
            "tokens": one.prompt_tokens + one.response_tokens,
            "difference": {
                f"{trait}/{site}": _estimate(one[flags.column(trait, site=site)])
                for trait in flags.traits
                for site in flags.sites
            },
        }
        for one in flags.datasets.values()
    ]
    rows = [
        {"trait": trait, "source": row.source, "row": row.row, "id": row.id, "score": row.score}
        for trait in flags.traits
        for row in flags.top(trait, top)
    ]
    totals = {"scored": flags.scored, "rejected": flags.n_rejected}
    return {"folder": str(flags.folder), **totals, "datasets": sets, "top": rows}


def _estimate(found: Any) -> dict[str, Any]:
    numbers = {name: getattr(found, name) for name in ("mean", "low", "high")}
    # JSON has no NaN: what is not known is null.
    known = {name: value if value == value else None for name, value in numbers.items()}
    return {**known, "n": found.n}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rule:
    """One trait's share in what is left out of the copies."""

    trait: str
    settings: Mapping[str, Any]

    def flagged(self, flags: "Flags") -> Any:
        return flags.filter(self.trait, **self.settings)


def _rules(
    options: dict[str, Any], bank: "VectorBank", sources: "list[Source]"
) -> tuple[_Rule, ...]:
    """What `--clean` leaves out, checked as far as it can be before the scan; () without it."""
    from pvcore.flag_clean import check_places

    folder, percentile = options["clean"], options["percentile"]
    bounds = _thresholds(options["threshold"], bank.traits)
    if folder is None:
        if given := next(
            (name for name in _RULE if options[name] is not None and options[name] is not False),
            None,
        ):
            raise PvcoreError(
                f"got --{given.replace('_', '-')} without --clean; wanted both, or neither"
            )
        return ()
    if bool(bounds) == (percentile is not None):
        raise PvcoreError(
            "got --clean and not one of --threshold and --percentile; wanted --threshold evil=4 "
            "for some traits, or --percentile 95 for all"
        )
    if options["clean_scan"] is not None and percentile is None:
        raise PvcoreError("got --clean-scan without --percentile; wanted both, or neither")
    require_places(folder / "copy")
    check_places(sources, folder)
    settings = _measure(options, bank)
    if bounds:
        bound_to = {trait: {"threshold": bound, **settings} for trait, bound in bounds.items()}
    else:
        bound_to = {trait: _percentile(trait, options, bank, settings) for trait in bank.traits}
    return tuple(_Rule(trait=trait, settings=one) for trait, one in bound_to.items())


def _measure(options: dict[str, Any], bank: "VectorBank") -> dict[str, Any]:
    """Site and score of the rules, as `Flags.filter` takes them."""
    from pvcore.flag_shards import SCORE_KINDS
    from pvcore.sites import Site

    site = max(bank.sites) if options["site"] is None else Site.parse(options["site"])
    if site not in bank.sites:
        raise PvcoreError(f"got --site {site}; the vectors have {', '.join(map(str, bank.sites))}")
    calibrated = options["percentile"] is not None and options["clean_scan"] is None
    score = options["score"] or ("response_mean" if calibrated else "difference")
    if score not in SCORE_KINDS:
        raise PvcoreError(f"got --score {score}; wanted one of {', '.join(SCORE_KINDS)}")
    if score == "difference" and options["difference"] == "subset":
        raise PvcoreError(
            "got --clean by the difference, which a subset has for some rows alone; give --score "
            "response_mean, or another --difference"
        )
    return {"site": site, "score": score}


def _percentile(
    trait: str, options: dict[str, Any], bank: "VectorBank", settings: dict[str, Any]
) -> dict[str, Any]:
    """A trait's rule by a percentile, which is there: of the clean scan, or of the calibration."""
    from pvcore.flag_select import threshold_of
    from pvcore.flags import Flags

    percentile, folder = options["percentile"], options["clean_scan"]
    column = f"{trait}/{settings['site']}/{settings['score']}"
    if folder is None:
        threshold_of(column, None, percentile, None, bank[trait])
        return {"percentile": percentile, **settings}
    clean = Flags.load(folder)
    clean.column(trait, **settings)
    threshold_of(column, None, percentile, clean, None)
    return {"percentile": percentile, "clean": clean, **settings}


def _thresholds(given: list[str] | None, traits: tuple[str, ...]) -> dict[str, float]:
    bounds: dict[str, float] = {}
    for text in given or []:
        trait, _, number = text.rpartition("=")
        try:
            bound = float(number)
        except ValueError:
            bound = float("nan")
        if not trait or not isfinite(bound):
            raise PvcoreError(f"got --threshold {text!r}; wanted TRAIT=NUMBER")
        if trait not in traits:
            raise PvcoreError(f"got --threshold {text!r}; the vectors are {', '.join(traits)}")
        if trait in bounds:
            raise PvcoreError(f"got --threshold for {trait} twice; wanted one number a trait")
        bounds[trait] = bound
    return bounds


def _cleaned(
    flags: "Flags", rules: tuple[_Rule, ...], folder: Path, keep_rejected: bool
) -> list[dict[str, Any]]:
    chosen = reduce(or_, (rule.flagged(flags) for rule in rules))
    return [
        {
            "source": name,
            "file": str(one.path),
            "kept": one.kept,
            "flagged": one.flagged,
            "rejected": one.rejected,
        }
        for name, one in chosen.write_clean(folder, keep_rejected=keep_rejected).items()
    ]
