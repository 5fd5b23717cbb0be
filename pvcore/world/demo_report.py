"""The page of a demo, drawn from its record alone."""

from collections.abc import Iterator, Sequence
from math import isnan

from pvcore.correlation import MonitoredReply
from pvcore.overhead_plot import OverheadRow, overhead_bars
from pvcore.plots import DoseCurve, cosine_matrix, dose_response, monitoring_scatter, norms_by_layer
from pvcore.report import (
    Figure,
    Note,
    Page,
    Scale,
    Section,
    SideBySide,
    Table,
    TokenStrip,
    Verdict,
    Verdicts,
)
from pvcore.world.demo_record import ChatFigures, DemoRecord, DoseFigures
from pvcore.world.demo_report_finetune import finetuning

_N_SCATTERS = 3
_CAVEAT = (
    "The model is tiny and was trained on a generated world; its judge shares the world's grammar. "
    "That makes the scores exact and repeatable. It proves the machinery and its mathematics and "
    "says nothing about large models."
)
_ELSEWHERE = (
    "The bounds on traits were set for the persona world. For another model they are a yardstick: "
    "a run fails on them only when it is strict."
)


def page(record: DemoRecord) -> Page:
    """The whole demo as a report."""
    where = "the persona world's own model" if record.in_world else record.model
    return Page(
        title="pvcore demo",
        lead=(
            f"{len(record.vectors)} persona vectors extracted from {where}, used to steer it, "
            "watched while it replies, and timed. Every figure was measured by this run."
        ),
        sections=(
            _claims(record),
            _chats(record),
            _vectors(record),
            _doses(record),
            _caps(record),
            _monitoring(record),
            *_flags(record),
            *finetuning(record),
            _overhead(record),
        ),
        footer=_footer(record),
    )


def _claims(record: DemoRecord) -> Section:
    verdicts = tuple(
        Verdict(
            claim=f"{claim.claim}; tightest: {claim.at}." if claim.at else f"{claim.claim}.",
            measured=claim.measured,
            bound=claim.bound,
            passed=claim.passed,
        )
        for claim in record.claims
    )
    note = Note(text=_CAVEAT) if record.in_world else Note(text=_ELSEWHERE, tone="warning")
    return Section(title="What this run claims", blocks=(Verdicts(verdicts=verdicts), note))


def _chats(record: DemoRecord) -> Section:
    return Section(
        title="Replies, token by token",
        text=(
            "Each token is coloured by the projection of the state that produced it on a trait's "
            f"unit vector, at layer {record.workload.layer}, after any intervention. Choose a "
            "trait above a reply; the two replies of a pair share one scale. Of ten questions a "
            "pair shows the one whose changed reply tells most."
        ),
        blocks=tuple(_pair(chat) for chat in record.chats),
    )


def _pair(chat: ChatFigures) -> SideBySide:
    scales = {
        trait: _scale([reply.projections[trait] for reply in chat.replies])
        for trait in chat.replies[0].projections
    }
    plain, steered = (
        TokenStrip(
            tokens=reply.tokens,
            values=reply.projections,
            active=chat.trait,
            prompt=chat.prompt,
            scales=scales,
        )
        for reply in chat.replies
    )
    return SideBySide(
        left=plain,
        right=steered,
        left_title=chat.replies[0].title,
        right_title=chat.replies[1].title,
    )


def _scale(lines: Sequence[Sequence[float]]) -> Scale:
    values = [value for line in lines for value in line]
    low, high = min(values, default=0.0), max(values, default=0.0)
    return Scale(centre=(low + high) / 2, reach=(high - low) / 2 or 1.0)


def _vectors(record: DemoRecord) -> Section:
    layer, work = record.workload.layer, record.workload
    return Section(
        title="The vectors",
        text=(
            f"Contrasting system prompts, {work.extraction_questions} questions and "
            f"{work.rollouts} rollout(s) on each side; a pair of replies is kept when both are "
            "coherent and only the positive one shows the trait (50 of 100). The paper runs five "
            "pairs of prompts, 20 questions and 10 rollouts. A vector is the difference of the "
            f"mean residuals over reply tokens. The numbers are those of layer {layer}; separation "
            "is the norm in units of the spread of single replies."
        ),
        blocks=(
            _qualities(record),
            Figure(
                svg=norms_by_layer({one.trait: one.norms for one in record.vectors}),
                caption="Norm of each vector at the output of each layer.",
            ),
            Figure(
                svg=cosine_matrix([one.trait for one in record.vectors], record.cosines),
                caption=(
                    f"Cosines between the vectors at layer {layer}: they share a part, so "
                    "removing several at once is done jointly."
                ),
            ),
        ),
    )


def _qualities(record: DemoRecord) -> Table:
    layer = record.workload.layer
    return Table(
        columns=(
            "trait",
            "pairs kept",
            "dropped",
            "score, positive",
            "negative",
            "norm",
            "separation",
            "split-half cosine",
        ),
        rows=[
            (
                one.trait,
                one.kept,
                one.pairs - one.kept,
                _whole(one.positive_score),
                _whole(one.negative_score),
                one.norms[layer],
                one.separation[layer],
                one.split_half_cosine[layer],
            )
            for one in record.vectors
        ],
    )


def _doses(record: DemoRecord) -> Section:
    return Section(
        title="Dose and response",
        text=(
            "No system prompt; the raw vector is added at one layer at every position that "
            "produces a reply token. All doses of a trait run as one batch, each row with its own "
            "coefficient. Dashed: a random vector of the same norm, with the same random numbers."
        ),
        blocks=tuple(
            Figure(
                svg=dose_response([_curve(one) for one in record.doses if one.layer == layer]),
                caption=f"Layer {layer}: {record.workload.steering_questions} replies a point.",
            )
            for layer in record.workload.layers
        ),
    )


def _curve(one: DoseFigures) -> DoseCurve:
    return DoseCurve(
        trait=one.trait,
        coefficients=one.coefficients,
        scores=one.scores,
        coherence=one.coherence,
        control_scores=one.control_scores,
        control_coherence=one.control_coherence,
    )


def _caps(record: DemoRecord) -> Section:
    rows = [
        (
            one.trait,
            _whole(one.score),
            _whole(one.capped_score),
            _whole(one.coherence),
            _whole(one.capped_coherence),
        )
        for one in record.caps
    ]
    return Section(
        title="Capping what a prompt asks for",
        text=(
            "System prompts ask for the trait at full strength. A cap then holds the projection "
            "at every layer at or below its mean over plain replies: nothing is changed where the "
            "projection is lower already."
        ),
        blocks=(
            Table(
                columns=("trait", "score", "score, capped", "coherence", "coherence, capped"),
                rows=rows,
                caption=f"{record.workload.steering_questions} replies a cell.",
            ),
        ),
    )


def _whole(score: float) -> int | None:
    return None if isnan(score) else round(score)


def _monitoring(record: DemoRecord) -> Section:
    return Section(
        title="Monitoring: what the prompt's last token foretells",
        text=(
            "System prompts ask for a trait by degrees. The projection is taken before the reply "
            "is written, the score of the reply afterwards. Most of r lies between the levels; r "
            "within a level is the harder figure, and it is shown beside it."
        ),
        blocks=(_foretold(record), _scores_by_level(record), *_scatters(record)),
    )


def _foretold(record: DemoRecord) -> Table:
    layer, count = record.workload.monitoring_layer, len(record.monitoring[0].overall_by_layer)
    return Table(
        columns=(
            "trait",
            f"r overall, layer {layer}",
            "r within a level",
            *(f"r overall, layer {at}" for at in range(count) if at != layer),
        ),
        rows=[
            (
                one.trait,
                one.overall,
                one.within,
                *(r for at, r in enumerate(one.overall_by_layer) if at != layer),
            )
            for one in record.monitoring
        ],
        caption="Pearson's r between projection and score.",
    )


def _scores_by_level(record: DemoRecord) -> Table:
    levels = record.monitoring[0].level_scores
    return Table(
        columns=("trait", *(f"level {level}" for level in levels)),
        rows=[
            (one.trait, *(_whole(score) for score in one.level_scores.values()))
            for one in record.monitoring
        ],
        caption="Mean trait score of the replies at each level of the prompt.",
    )


def _scatters(record: DemoRecord) -> Iterator[Figure]:
    for one in record.monitoring[:_N_SCATTERS]:
        replies = [
            MonitoredReply(projection=projection, score=score, level=f"{level:g}")
            for level, projection, score in one.replies
        ]
        yield Figure(
            svg=monitoring_scatter(replies, trait=one.trait),
            caption=f"{one.trait}, layer {one.layer}: {len(replies)} replies.",
        )


def _flags(record: DemoRecord) -> Iterator[Section]:
    found = record.flags
    if found is None:
        return
    names = list(found.means)
    yield Section(
        title="Training data, flagged",
        text=f"One data set of {sum(found.counts.values())} chats, neutral ones with some of every "
        "trait among them, scored without a label. The projection difference is the mean over a "
        f"reply minus the last prompt token, at layer {found.layer}.",
        blocks=(
            Table(
                columns=["written as", "rows", "found at the top", *found.found],
                rows=[
                    [
                        name,
                        found.counts[name],
                        _share(found.found.get(name)),
                        *found.means[name].values(),
                    ]
                    for name in names
                ],
                caption="Found at the top: of a trait's rows, the share among as many of the "
                "highest on its vector. Then the mean difference on each vector.",
            ),
            Table(
                columns=["highest on", "difference", "written as", "reply"],
                rows=[[one.trait, one.difference, one.kind, one.reply] for one in found.rows],
            ),
        ),
    )


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def _overhead(record: DemoRecord) -> Section:
    rows = [
        OverheadRow(label=f"{one.label}, batch {one.batch}", p20=one.p20, p50=one.p50, p80=one.p80)
        for one in sorted(record.overhead, key=lambda one: one.batch)
    ]
    return Section(
        title="What it costs",
        text=(
            f"Time per token beside plain generation, {record.workload.rounds} interleaved rounds "
            f"of {record.workload.timed_tokens} tokens on {record.device}: median, with the "
            "20th and 80th percentile. On a model this small the fixed cost of a step weighs most."
        ),
        blocks=(Figure(svg=overhead_bars(rows), caption="Ratio to plain generation; 1 is free."),),
    )


def _footer(record: DemoRecord) -> str:
    libraries = ", ".join(f"{name} {number}" for name, number in record.versions.items())
    return (
        f"`{record.command}` · model {record.model} · judge {record.judge} · device "
        f"{record.device}, {record.threads} threads · seed {record.workload.seed} · commit "
        f"{record.commit or 'unknown'} · {libraries}"
    )
