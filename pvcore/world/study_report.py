"""The page of a study, drawn from its summary alone."""

from collections.abc import Mapping, Sequence
from typing import Any

from pvcore.report import Figure, Note, Page, Section, Table, Verdict, Verdicts
from pvcore.world.study_cells import Design
from pvcore.world.study_claims import claims, told
from pvcore.world.study_plots import keeping_out, shift_and_trait
from pvcore.world.study_summary import Point, Summary

WAYS = {
    "neutral": "finetuned on neutral chats",
    "inference": "steered at inference",
    "inference, random": "random vector at inference",
    "prevent": "prevention, one layer",
    "random": "prevention, random vector",
    "incremental": "prevention, all layers",
    "caft": "CAFT (ablated in training)",
}
_LIMITS = (
    "The model is tiny, its world is generated, and its judge shares the world's grammar: this "
    "proves machinery and direction of effects, and is no replication of the paper on a large "
    "model. Training on wrong facts does not spread here, so the paper's effect of mistakes cannot "
    "be shown. All layers steer about equally well, so nothing is said about a best layer to steer "
    "at. Seeds vary the data, their order, the vectors and the sampling, not the base model."
)


def page(design: Design, summary: Summary, record: Mapping[str, Any]) -> Page:
    """The whole study as a report."""
    return Page(
        title="pvcore study",
        lead=(
            f"The persona world's model, finetuned {_finetunes(design)} times over "
            f"{len(design.seeds)} seeds: what keeps a trait out, and what foretells it."
        ),
        sections=(
            _claims(design, summary),
            _mitigation(design, summary),
            _shift(summary),
            _monitoring(summary),
        ),
        footer=(
            f"{record['date']}; {record['device']}; "
            f"{', '.join(f'{name} {version}' for name, version in record['versions'].items())}; "
            f"{record['commit'][:12]}"
        ),
    )


def _finetunes(design: Design) -> int:
    doses = 2 + len(design.prevent) + len(design.random) + len(design.incremental)
    per_seed = len(design.mitigated) * (doses + len(design.mixes)) + 1 + len(design.mistaken)
    return len(design.seeds) * (per_seed + 7 - len(design.mitigated))


def _claims(design: Design, summary: Summary) -> Section:
    verdicts = tuple(
        Verdict(claim=f"{one.claim}.", measured=one.measured, bound=one.bound, passed=one.passed)
        for one in claims(design, summary)
    )
    return Section(
        title="What this run claims", blocks=(Verdicts(verdicts=verdicts), Note(text=_LIMITS))
    )


def _mitigation(design: Design, summary: Summary) -> Section:
    blocks: list[Any] = [
        Figure(
            svg=keeping_out(summary.points),
            caption="Mean over seeds, with standard errors; better is further up and to the left.",
        )
    ]
    blocks.append(
        Table(
            columns=("trait", "compared", "coherence kept more", "quiz kept more", "seeds"),
            rows=[
                (
                    margin.trait,
                    f"{WAYS[margin.way]} against {WAYS[margin.than]}",
                    told(margin.coherence),
                    told(margin.quiz),
                    str(len(margin.coherence.seeds)),
                )
                for margin in summary.margins
            ],
            caption=(
                "At the same trait score, averaged over the scores that both reach; mean and "
                "standard error over seeds."
            ),
        )
    )
    for trait in design.mitigated:
        blocks.append(_points([one for one in summary.points if one.trait == trait], trait))
    return Section(
        title="Keeping a trait out",
        text=(
            "The model is finetuned on chats that all hold the trait. Without anything it takes it "
            "on; it can then be steered away from it at inference, or be spared from it while it "
            "is trained. The quiz offers every answer that a relation has."
        ),
        blocks=tuple(blocks),
    )


def _points(points: Sequence[Point], trait: str) -> Table:
    return Table(
        columns=("way", "coefficient", "trait", "coherence", "quiz", "shift"),
        rows=[
            (
                _named(one),
                f"{one.coeff:g}",
                told(one.score),
                told(one.coherence),
                told(one.quiz),
                one.shift,
            )
            for one in points
            if not _undefended(one) or one.way == "inference"
        ],
        caption=(
            f"{trait}: mean and standard error over seeds, on held-out questions; the shift at the "
            "layer at which vectors act."
        ),
    )


def _named(point: Point) -> str:
    return "nothing done" if _undefended(point) else WAYS[point.way]


def _undefended(point: Point) -> bool:
    """Whether this is the dose that every way begins at: finetuned and left as it is."""
    return point.coeff == 0 and point.way not in ("caft", "neutral")


def _shift(summary: Summary) -> Section:
    counts = {
        name: sum(one.own and name in (one.trait, "all") for one in summary.moved)
        for name in summary.shift
    }
    return Section(
        title="The shift foretells the trait",
        text=(
            "Every set that was finetuned on as it is: shares of a trait, half of its intensity, "
            "its questions of some kinds alone, full sets of each trait, wrong facts in a neutral "
            "tone, and neutral chats. The shift is that of the last prompt token along each "
            "vector, in each seed at the layer where it told most in the others. The "
            "vectors share a large part, so a model that took on one trait moves along the vectors "
            "of the others too, without taking those on: over every set the shift foretells less."
        ),
        blocks=(
            Figure(svg=shift_and_trait(summary.moved), caption="One point a model and trait."),
            Table(
                columns=(
                    "trait",
                    "layer by seed",
                    "r, its own sets and those of none",
                    "models",
                    "r, every set",
                ),
                rows=[
                    (
                        name,
                        ", ".join(map(str, summary.moving.get(name, ()))),
                        told_r(r["own"]),
                        str(counts[name]),
                        told_r(r["every"]),
                    )
                    for name, r in summary.shift.items()
                ],
                caption="Pearson's r of shift and score; mean and standard error over seeds.",
            ),
        ),
    )


def _monitoring(summary: Summary) -> Section:
    rows = [
        (
            trait,
            str(summary.reading[trait]),
            told_r(one["overall"]),
            told_r(one["per_prompt"]),
            told_r(one["within"]),
        )
        for trait, one in summary.monitoring.items()
    ]
    return Section(
        title="Monitoring",
        text=(
            "Prompts ask for a trait by degrees: projection before the reply, score after it. Each "
            "trait is read at the layer that told most about replies to prompts of the training "
            "side; all that is shown here is of held-out prompts."
        ),
        blocks=(
            Table(
                columns=("trait", "layer", "r over replies", "r over prompts", "r within a level"),
                rows=rows,
                caption="Mean and standard error over seeds.",
            ),
        ),
    )


def told_r(spread: Any) -> str:
    return f"{spread.mean:.3f} ± {spread.error:.3f}"
