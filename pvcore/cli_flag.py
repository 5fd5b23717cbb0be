"""`pvcore flag`: score training data on persona vectors, row by row, however often it stops."""

from functools import reduce
from operator import or_
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from pvcore.cli_models import model_of, vectors_at
from pvcore.cli_options import AsJson, Device, Dtype, Layers, Model, VectorFiles
from pvcore.cli_output import print_document, require_places, split_list
from pvcore.errors import PvcoreError

if TYPE_CHECKING:
    from pvcore.flags import Flags


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
Threshold = Annotated[
    list[str] | None, Option("--threshold", help="For --clean: TRAIT=NUMBER; may be repeated.")
]


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
    threshold: Threshold = None,
    dtype: Dtype = "auto",
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Score conversations on persona vectors: means by source, the highest rows, a cleaned copy."""
    options = dict(locals())
    require_places(report)
    if top < 0:
        raise PvcoreError(f"got --top {top}; wanted 0 or more")
    bounds = _thresholds(threshold, clean)
    found = _scanned(options)
    document = _document(found, top)
    if report is not None:
        found.report(report)
        document["report"] = str(report)
    if clean is not None:
        document["clean"] = _cleaned(found, bounds, clean)
    print_document(document, as_json)


_PASSED = ("difference", "share", "replies", "prompt", "answer", "turn", "max_new_tokens")


def _scanned(options: dict[str, Any]) -> "Flags":
    from pvcore.flagging import flag as flag_data
    from pvcore.vectors import VectorBank

    bank = VectorBank(vectors_at(options["vector"]), layers=split_list(options["layers"], int))
    sources, names = options["sources"], (*_PASSED, "shard_rows", "max_tokens", "seed", "out")
    return flag_data(
        model_of(options["model"], options["dtype"], options["device"]),
        sources,
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


def _thresholds(given: list[str] | None, clean: Path | None) -> dict[str, float]:
    if bool(given) != (clean is not None):
        raise PvcoreError("got --clean or --threshold alone; wanted both, as in --threshold evil=4")
    bounds = {}
    for text in given or []:
        trait, _, number = text.rpartition("=")
        try:
            bounds[trait] = float(number)
        except ValueError:
            raise PvcoreError(f"got --threshold {text!r}; wanted TRAIT=NUMBER") from None
    return bounds


def _cleaned(flags: "Flags", bounds: dict[str, float], folder: Path) -> list[dict[str, Any]]:
    chosen = reduce(or_, (flags.filter(one, threshold=bound) for one, bound in bounds.items()))
    return [
        {
            "source": name,
            "file": str(one.path),
            "kept": one.kept,
            "flagged": one.flagged,
            "rejected": one.rejected,
        }
        for name, one in chosen.write_clean(folder).items()
    ]
