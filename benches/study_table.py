"""The study's record as tables: what keeps a trait out at the same score, and what foretells it."""

from collections.abc import Mapping, Sequence
from typing import Any

from benches.record import RecordError
from benches.tables import provenance, table
from pvcore.numerals import number


def study_summary(document: Mapping[str, Any]) -> str:
    """Claims and margins over seeds; `RecordError` if a figure is missing."""
    try:
        summary, seeds = document["summary"], document["design"]["seeds"]
        parts = [_claims(document["claims"]), _margins(summary["margins"])]
        where = provenance(
            date=document["date"],
            device=document["device"],
            versions=document["versions"].items(),
            commit=document["commit"],
            command=document["command"],
        )
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise RecordError(
            f"got a study's record without a figure the table needs ({error!r}); run it again"
        ) from error
    return "\n\n".join((*parts, f"Mean and standard error over {len(seeds)} seeds. {where}"))


def _claims(claims: Sequence[Mapping[str, Any]]) -> str:
    return table(
        ("claim", "measured", "wanted", "holds"),
        [
            (one["claim"], one["measured"], one["bound"], "yes" if one["passed"] else "no")
            for one in claims
        ],
    )


def _margins(margins: Sequence[Mapping[str, Any]]) -> str:
    return table(
        ("at the same trait score", "coherence kept more", "quiz kept more"),
        [
            (
                f"{one['trait']}: {one['way']} against {one['than']}",
                _spread(one["coherence"]),
                _spread(one["quiz"]),
            )
            for one in margins
        ],
    )


def _spread(spread: Mapping[str, Any]) -> str:
    if spread["mean"] is None:
        return "no common score"
    error = "?" if spread["error"] is None else number(spread["error"], decimals=1)
    return f"{number(spread['mean'], decimals=1)} ± {error}"
