"""The record of an extraction as tables: what each vector steers to, and the curves behind it."""

from collections.abc import Mapping
from typing import Any

from benches.record import RecordError
from benches.tables import counted, provenance, table
from pvcore.numerals import number

HEAD = (
    "trait",
    "pairs kept",
    "split-half cosine, lowest",
    "added at",
    "coefficient",
    "score",
    "coherence",
    "same norm, random",
    "score, unsteered",
)


def extraction_summary(document: Mapping[str, Any]) -> str:
    """One row a trait, then its scores by coefficient; `RecordError` if a figure is missing."""
    try:
        traits = document["traits"]
        work = document["workload"]
        what = (
            f"{document['model']}, judged by {document['judge']}. Place and coefficient have the "
            f"largest effect at a coherence of {work['coherence floor']:g} or more on "
            f"{work['selection questions']} questions; score, coherence and control are those of "
            f"{work['validation questions']} others."
        )
        curves = (
            "Score / coherence at that place by coefficient, on the questions that chose it, and "
            "below it those of the random vector:"
        )
        claims = document["claims"]
        held = sum(bool(claim["passed"]) for claim in claims)
        device = dict(document["device"])
        where = provenance(
            date=document["date"],
            device=f"{device.pop('kind')}, {counted(device['threads'], 'threads')}",
            versions=document["versions"].items(),
            commit=document["commit"],
            command=document["command"],
        )
        parts = (what, table(HEAD, map(_line, traits)), curves, _curves(traits, work))
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise RecordError(
            f"got an extraction record without a figure the table needs ({error!r}); measure again"
        ) from error
    return "\n\n".join((*parts, f"Claims that hold: {held} of {len(claims)}. {where}"))


def _line(trait: Mapping[str, Any]) -> list[str]:
    cell = trait["validated"]
    halves = min(layer["split_half_cosine"] for layer in trait["layers"])
    return [
        trait["trait"],
        f"{trait['kept']} of {trait['pairs']}",
        number(halves, decimals=3),
        f"`{cell['place']}`",
        f"{cell['coefficient']:g}",
        number(cell["score"], decimals=1),
        number(cell["coherence"], decimals=1),
        number(cell["control_score"], decimals=1),
        number(trait["unsteered"]["score"], decimals=1),
    ]


def _curves(traits: list[Mapping[str, Any]], work: Mapping[str, Any]) -> str:
    doses = work["coefficients"]
    lines = []
    for trait in traits:
        place = trait["chosen"]["place"]
        cells = {c["coefficient"]: c for c in trait["curves"] if c["place"] == place}
        for name, first, second in (
            (trait["trait"], "score", "coherence"),
            ("random", "control_score", "control_coherence"),
        ):
            pairs = [(cells[dose][first], cells[dose][second]) for dose in doses]
            lines.append([name, *(f"{score:.0f} / {coherence:.0f}" for score, coherence in pairs)])
    return table(["trait", *(f"{dose:g}" for dose in doses)], lines)
