"""The report of an extraction: one page that says what a vector is made of and what it does."""

from collections.abc import Sequence

from pvcore.calibration import Calibration
from pvcore.cosines import cosine_matrices
from pvcore.extraction_result import Extraction
from pvcore.layer_plot import quality_by_layer
from pvcore.numerals import number
from pvcore.plots import DoseCurve, TradeOff, cosine_matrix, dose_response, trade_off
from pvcore.report import Block, Figure, Note, Page, Section, SideBySide, Table
from pvcore.report import Cell as TableCell
from pvcore.rollouts import Rollout
from pvcore.selection import Cell, Selection
from pvcore.sites import Site
from pvcore.vectors import VectorBank

N_SHOWN = 3
_LONGEST = 600  # characters of a reply that are shown


def page(
    extraction: Extraction,
    *,
    selection: Selection | None = None,
    others: VectorBank | None = None,
    calibration: Calibration | None = None,
    footer: str = "",
) -> Page:
    """All that is known of one trait's vector; parts that are not given are left out.

    `others` are vectors of other traits to compare with, `selection` is a steering sweep and
    `calibration` one on neutral chats, of this trait among others.
    """
    vector = extraction.vector
    sections = [_quality(extraction), _rollouts(extraction)]
    if selection is not None:
        sections.append(_steering(selection))
    if others is not None:
        site = vector.sites[-1] if selection is None else _site_of(selection)
        sections.append(_cosines(extraction, others, site))
    if calibration is not None:
        sections.append(_calibration(calibration, vector.trait))
    sections.append(_samples(extraction.rollouts))
    strongest = max(extraction.layers, key=lambda layer: layer.split_half_cosine)
    chosen = "" if selection is None else f" {_sentence(selection.best)}"
    return Page(
        title=f"Persona vector: {vector.trait}",
        lead=(
            f"Extracted from {vector.model_id or 'a model'}: {extraction.kept // 2} of "
            f"{len(extraction.rollouts) // 2} pairs of replies kept; two halves of them agree to a "
            f"cosine of {number(strongest.split_half_cosine, decimals=3)} at "
            f"{strongest.site}.{chosen}"
        ),
        sections=sections,
        footer=footer or f"{vector.provenance.note}.",
    )


def _quality(extraction: Extraction) -> Section:
    layers = sorted(extraction.layers, key=lambda layer: layer.site)
    blocks: list[Block] = []
    if len({layer.site.kind for layer in layers}) == 1:
        drawing = quality_by_layer(
            [layer.site.layer for layer in layers],
            trait=extraction.vector.trait,
            separation=[layer.separation for layer in layers],
            interval=[layer.separation_interval for layer in layers],
            split_half=[layer.split_half_cosine for layer in layers],
            cosine_low=[layer.cosine_low for layer in layers],
        )
        blocks.append(Figure(svg=drawing, caption="The vector of replies by layer"))
    rows: list[list[TableCell]] = [
        [
            str(layer.site),
            layer.norm,
            layer.separation,
            *layer.separation_interval,
            layer.split_half_cosine,
            layer.cosine_low,
        ]
        for layer in layers
    ]
    names = ["site", "norm", "separation", "from", "to", "split-half cosine", "cosine, 97.5%"]
    blocks += [Table(columns=names, rows=rows), *_variants(extraction)]
    return Section(
        title="The vector by layer",
        text="Separation is the norm of the vector in units of the spread of replies around the "
        "mean of their side; its interval holds 95% of resamples of the pairs. The split-half "
        "cosine compares the vectors of two halves of the pairs.",
        blocks=blocks,
    )


def _variants(extraction: Extraction) -> list[Block]:
    """How like the vector of replies those over the prompt are."""
    vector = extraction.vector
    rows: list[list[TableCell]] = [
        [variant, *vector.cosine(other).tolist()]
        for variant, other in extraction.vectors.items()
        if variant != vector.variant
    ]
    heads = ["cosine with the vector of replies", *map(str, vector.sites)]
    return [Table(columns=heads, rows=rows)] if rows else []


def _rollouts(extraction: Extraction) -> Section:
    judged = extraction.judgements
    methods = sorted({row.method for row in judged.rows if row.method})
    sides = [(name, side) for name, side in (("positive", True), ("negative", False))]
    rows: list[list[TableCell]] = []
    for name, side in sides:
        chosen = [row for row in extraction.rollouts if row.positive == side]
        scores = [row.trait_score for row in chosen if row.trait_score is not None]
        sound = [row.coherence_score for row in chosen if row.coherence_score is not None]
        kept = sum(not row.dropped for row in chosen)
        rows.append([name, len(chosen), kept, _mean(scores), _mean(sound)])
    reasons: list[list[TableCell]] = [
        [reason, count] for reason, count in sorted(extraction.reasons.items())
    ]
    blocks: list[Block] = [
        Table(columns=["side", "replies", "kept", "mean trait score", "mean coherence"], rows=rows)
    ]
    if reasons:
        blocks.append(Table(columns=["dropped because", "replies"], rows=reasons))
    name = extraction.vector.provenance.judge or "the judge"
    how = f" ({', '.join(methods)})" if methods else ""
    told = f"{name}{how}: {judged.counts}."
    blocks.append(Note(text=told, tone="warning" if judged.n_failed else "information"))
    bars = extraction.vector.provenance.thresholds
    return Section(
        title="Replies kept and dropped",
        text="A pair is kept when both replies are coherent, the positive one shows the trait and "
        f"the negative one does not (threshold {bars.get('trait', 50.0):g}).",
        blocks=blocks,
    )


def _steering(selection: Selection) -> Section:
    trait = selection.vector.trait
    chosen = [cell for cell in selection.cells if cell.site == selection.best.site]
    blocks: list[Block] = [
        Figure(
            svg=dose_response([_dose(trait, chosen, selection)]),
            caption=f"Steered at {selection.best.place}",
        )
    ]
    blocks += _trade_off(selection)
    columns = ["place", "coefficient", "score", "coherence", "random, score", "random, coherence"]
    rows: list[list[TableCell]] = [
        [
            cell.place,
            cell.coefficient,
            cell.score,
            cell.coherence,
            cell.control_score,
            cell.control_coherence,
        ]
        for cell in selection.cells
    ]
    blocks.append(Table(columns=columns, rows=rows))
    return Section(
        title="Steering by layer and coefficient",
        text=f"On {selection.questions} questions without a system prompt, beside a random vector "
        f"of the same norm. Unsteered: trait score {number(selection.score)}, coherence "
        f"{number(selection.coherence)}. {_sentence(selection.best)} It has the largest effect of "
        f"those with a coherence of {selection.floor:g} or more.",
        blocks=blocks,
    )


def _trade_off(selection: Selection) -> list[Block]:
    """Single layers beside each other, one curve each; increments at all layers have none."""
    cells: dict[Site, list[Cell]] = {}
    for cell in selection.cells:
        if cell.site is not None:
            cells.setdefault(cell.site, []).append(cell)
    if len({site.layer for site in cells}) < len(cells) or not cells:
        return []
    curves = [
        TradeOff(
            layer=site.layer,
            scores=[cell.score for cell in at_site],
            coherence=[cell.coherence for cell in at_site],
        )
        for site, at_site in cells.items()
    ]
    drawing = trade_off(curves, trait=selection.vector.trait, target=(50, selection.floor))
    return [Figure(svg=drawing, caption="Trait against coherence, by single layer")]


def _dose(trait: str, cells: Sequence[Cell], selection: Selection) -> DoseCurve:
    return DoseCurve(
        trait=trait,
        coefficients=[0.0, *(cell.coefficient for cell in cells)],
        scores=[selection.score, *(cell.score for cell in cells)],
        coherence=[selection.coherence, *(cell.coherence for cell in cells)],
        control_scores=[selection.score, *(cell.control_score for cell in cells)],
        control_coherence=[selection.coherence, *(cell.control_coherence for cell in cells)],
    )


def _sentence(best: Cell) -> str:
    return (
        f"Coefficient {best.coefficient:g} at {best.place} brings the trait to "
        f"{number(best.score, decimals=1)} at a coherence of {number(best.coherence, decimals=1)}, "
        f"a random vector of the same norm to {number(best.control_score, decimals=1)}."
    )


def _cosines(extraction: Extraction, others: VectorBank, site: Site) -> Section:
    vector = extraction.vector
    beside = [other for other in others if other.trait != vector.trait]
    bank = VectorBank([vector, *beside], layers=[site])
    drawing = cosine_matrix(list(bank.traits), cosine_matrices(bank)[0].tolist())
    return Section(
        title="Likeness to other traits",
        text=f"Cosines at {site}. Vectors of personas are far from orthogonal; `Ablate` and "
        "`Cap` treat several of them jointly for that reason.",
        blocks=[Figure(svg=drawing, caption=f"Cosines at {site}")],
    )


def _calibration(calibration: Calibration, trait: str) -> Section:
    heads = [f"{one:g}%" for one in calibration.percentiles]
    at = calibration.bank.traits.index(trait)
    rows: list[list[TableCell]] = [
        [
            str(site),
            float(calibration.means[place, at]),
            float(calibration.deviations[place, at]),
            *calibration.values[place, at].tolist(),
        ]
        for place, site in enumerate(calibration.bank.sites)
    ]
    return Section(
        title="Projections of neutral chats",
        text=f"Over {calibration.chats} chats, `{calibration.key}`: what is usual, so that a "
        "threshold can be set where only so many neutral chats pass it.",
        blocks=[Table(columns=["site", "mean", "deviation", *heads], rows=rows)],
    )


def _samples(rollouts: Sequence[Rollout]) -> Section:
    half = len(rollouts) // 2
    pairs = list(zip(rollouts[:half], rollouts[half:], strict=True))
    kept = [pair for pair in pairs if not pair[0].dropped]
    dropped = [pair for pair in pairs if pair[0].dropped]
    spaced = kept[:: max(1, len(kept) // N_SHOWN)][:N_SHOWN] + dropped[:1]
    blocks: list[Block] = [
        SideBySide(left=_told(left), right=_told(right)) for left, right in spaced
    ]
    return Section(
        title="Some of the replies",
        text="Positive ones on the left, their counterparts on the right.",
        blocks=blocks,
    )


def _told(row: Rollout) -> Table:
    fate = f"dropped: {row.dropped}" if row.dropped else "kept"
    answer = row.answer if len(row.answer) <= _LONGEST else row.answer[:_LONGEST] + " …"
    score = f"{number(row.trait_score)}, coherence {number(row.coherence_score)}, {fate}"
    rows: list[list[TableCell]] = [
        ["system", row.system_prompt],
        ["user", row.question],
        ["reply", answer],
        ["score", score],
    ]
    return Table(columns=["positive" if row.positive else "negative", ""], rows=rows)


def _mean(scores: Sequence[float]) -> float | None:
    return sum(scores) / len(scores) if scores else None


def _site_of(selection: Selection) -> Site:
    return selection.best.site or selection.vector.sites[-1]
