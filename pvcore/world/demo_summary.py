"""A demo on the terminal: one table of traits, one of claims."""

from collections.abc import Iterator

from rich.console import Group
from rich.table import Table

from pvcore.numerals import number
from pvcore.world.demo_record import DemoRecord


def summary(record: DemoRecord) -> Group:
    """What `pvcore demo` prints when it is done."""
    return Group(_traits(record), _claims(record), *_costs(record))


def _traits(record: DemoRecord) -> Table:
    layer, doses = record.workload.layer, record.workload.coefficients
    table = Table(title=f"Persona vectors of {record.model}, layer {layer}", title_justify="left")
    columns = (
        "pairs kept",
        "split-half cosine",
        f"score, dose {doses[0]:g}",
        f"dose {doses[-1]:g}",
        f"random, dose {doses[-1]:g}",
        "r overall",
        "r within",
    )
    table.add_column("trait")
    for column in columns:
        table.add_column(column, justify="right")
    steered = [one for one in record.doses if one.layer == layer]
    for vector, dose, seen in zip(record.vectors, steered, record.monitoring, strict=True):
        table.add_row(
            vector.trait,
            f"{vector.kept}/{vector.pairs}",
            number(vector.split_half_cosine[layer], decimals=3),
            *(number(score, decimals=0) for score in (dose.scores[0], dose.scores[-1])),
            number(dose.control_scores[-1], decimals=0),
            *(number(r, decimals=2) for r in (seen.overall, seen.within)),
        )
    return table


def _claims(record: DemoRecord) -> Table:
    table = Table(title="Claims", title_justify="left", show_header=True)
    for column in ("", "claim", "measured", "wanted"):
        table.add_column(column, justify="right" if column == "measured" else "left")
    for claim in record.claims:
        colour, sign = ("green", "✓") if claim.passed else ("red", "✗")
        if not (claim.passed or claim.enforced):
            colour = "yellow"
        table.add_row(
            f"[{colour}]{sign}[/]",
            claim.claim,
            number(claim.measured) + (f" ({claim.at})" if claim.at else ""),
            claim.bound,
        )
    return table


def _costs(record: DemoRecord) -> Iterator[str]:
    yield "Time per token, as a multiple of plain generation (median):"
    for one in record.overhead:
        yield f"  {one.label}, batch {one.batch}: {one.p50:.3f}"
