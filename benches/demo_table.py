"""The demo's record as a table: what steering does, and what the monitor foretells."""

from collections.abc import Mapping
from typing import Any

from benches.record import RecordError
from benches.tables import counted, provenance, table
from pvcore.numerals import number

# The coherence below which the paper (arXiv 2507.21509, 5.1) discards a steered reply.
COHERENT = 75.0
HEAD = (
    "trait",
    "pairs kept",
    "score, unsteered",
    "score, steered",
    "same norm, random",
    "coefficient",
    "coherence",
    "r of monitor, overall",
    "r, within a level",
)


def demo_summary(document: Mapping[str, Any]) -> str:
    """One row a trait at the layer that claims are about; `RecordError` if a figure is missing."""
    try:
        layer = document["workload"]["layers"][-1]
        doses = {d["trait"]: d for d in document["doses"] if d["layer"] == layer}
        monitors = {m["trait"]: m for m in document["monitoring"]}
        lines = [
            _line(vectors, doses[vectors["trait"]], monitors[vectors["trait"]])
            for vectors in document["vectors"]
        ]
        what = (
            f"{document['model']}, judged by {document['judge']}, steered at resid_post.{layer} "
            f"with the coefficient that raises the score most at a coherence of {COHERENT:g} or "
            "more."
        )
        claims = document["claims"]
        held = sum(bool(claim["passed"]) for claim in claims)
        where = provenance(
            date=document.get("date", ""),
            device=f"{document['device']}, {counted(document['threads'], 'threads')}",
            versions=document["versions"].items(),
            commit=document["commit"],
            command=document["command"],
        )
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise RecordError(
            f"got a demo record without a figure the table needs ({error!r}); run the demo again"
        ) from error
    return "\n\n".join(
        (what, table(HEAD, lines), f"Claims that hold: {held} of {len(claims)}. {where}")
    )


def _line(
    vectors: Mapping[str, Any], dose: Mapping[str, Any], monitor: Mapping[str, Any]
) -> list[str]:
    best = _best(dose)
    return [
        vectors["trait"],
        str(vectors["kept"]),
        number(dose["scores"][0], decimals=1),
        number(dose["scores"][best], decimals=1),
        number(dose["control_scores"][best], decimals=1),
        f"{dose['coefficients'][best]:g}",
        number(dose["coherence"][best], decimals=1),
        number(monitor["overall"], decimals=2),
        number(monitor["within"], decimals=2),
    ]


def _best(dose: Mapping[str, Any]) -> int:
    """The dose of the highest score among coherent ones; without one, the unsteered model."""
    coherent = [
        at
        for at, (score, coherence) in enumerate(zip(dose["scores"], dose["coherence"], strict=True))
        if score is not None and coherence is not None and coherence >= COHERENT
    ]
    return max(coherent, key=lambda at: dose["scores"][at], default=0)
