"""Extraction: a persona vector from contrasting system prompts (arXiv 2507.21509, 2 and A.1)."""

import os
from collections.abc import Iterable, Sequence
from numbers import Real

from pvcore.blocks import find_decoder
from pvcore.errors import ExtractionError, WorkError
from pvcore.extraction_result import Extraction as Extraction
from pvcore.extraction_result import LayerQuality as LayerQuality
from pvcore.grading import knowing
from pvcore.judge import Judge, Judgement, Judgements
from pvcore.model import HookedModel
from pvcore.provenance import Provenance
from pvcore.replies import ModelWriter, Writer
from pvcore.replies import sample_replies as sample_replies
from pvcore.request_checks import check_request
from pvcore.rollout_run import Run, readable
from pvcore.rollouts import Conversation as Conversation
from pvcore.rollouts import Rollout as Rollout
from pvcore.rollouts import Score, turns
from pvcore.rollouts import pairwise_filter as pairwise_filter
from pvcore.sites import Site, as_sites, resid_post
from pvcore.taps import taps_of
from pvcore.traits import ContrastPair, Trait
from pvcore.vector_making import Making
from pvcore.workbook import Workbook

Folder = str | os.PathLike[str]


def extract(
    model: HookedModel,
    trait: Trait,
    *,
    judge: Judge,
    layers: Iterable[int | Site] | None = None,
    system_prompts: Sequence[ContrastPair] | None = None,
    questions: Sequence[str] | None = None,
    rollouts: int = 1,
    writer: Writer | None = None,
    max_new_tokens: int = 64,
    temperature: float | int = 1.0,
    threshold: float | int = 50.0,
    batch_size: int = 64,
    resamples: int = 100,
    seed: int = 0,
    work: Folder | None = None,
    progress: bool = False,
) -> Extraction:
    """Sample replies under contrasting system prompts, judge and filter them, subtract the means.

    Every question is asked under both sides of every pair of system prompts, `rollouts` times, by
    default those of the trait. At each of `layers` (default: all) a vector is the mean over kept
    positive replies of the residual averaged over each, minus that over negative ones. A `writer`
    writes instead, in its own length and heat. A judge with rubrics goes by the trait's own.
    `ExtractionError` for fewer than two kept pairs.

    In the folder `work` everything is kept as it is done: a run that was killed, and is repeated,
    writes and judges no reply twice and comes to the same bytes. `WorkError` for another run's.
    """
    check_request(trait, judge, questions, ExtractionError)
    prompts = trait.system_prompts if system_prompts is None else system_prompts
    asked = turns(prompts, trait.extraction_questions if questions is None else questions, rollouts)
    if writer is None:
        length, heat = max_new_tokens, temperature
        writer = ModelWriter(model, max_new_tokens=length, temperature=heat, seed=seed)
    run = Run(model, trait, knowing(judge, trait), asked, writer, batch_size, progress)
    sites = _sites(model, layers)
    making = Making(model, trait.name, sites, threshold, batch_size, resamples, seed, progress)
    return _extraction(run, making, work)


def extract_from(
    model: HookedModel,
    trait: str,
    rollouts: Sequence[Rollout],
    *,
    layers: Iterable[int | Site] | None = None,
    threshold: float | int = 50.0,
    batch_size: int = 64,
    resamples: int = 100,
    seed: int = 0,
    judge: str = "",
    progress: bool = False,
) -> Extraction:
    """Make the vectors of rollouts that were written and judged before: filter, pool, subtract.

    Positive rollouts come first, then the negative ones in the same order of pairs, as
    `rollout_rows` makes them of the paper's CSV files. `judge` names who judged them. Raises
    `ExtractionError` for rollouts that are no such pairs and when fewer than two pairs are kept.
    """
    half = len(rollouts) // 2
    if [row.positive for row in rollouts] != [True] * half + [False] * half:
        raise ExtractionError(
            f"got {len(rollouts)} rollouts, {sum(row.positive for row in rollouts)} of them "
            "positive; wanted positive ones first and then as many negative ones, pair by pair"
        )
    _check_scored(rollouts)
    sites = _sites(model, layers)
    making = Making(model, trait, sites, threshold, batch_size, resamples, seed, progress)
    making.check()
    rows, encoded = readable(model, rollouts)
    asked = [row for row in rows if not row.dropped or row.trait_score is not None]
    judgements = Judgements(trait=trait, rows=tuple(map(_judgement, asked)))
    made = Provenance(judge=judge, note="rollouts written and judged before")
    return making.extraction(rows, encoded, judgements, Workbook(None, {}), made)


def _sites(model: HookedModel, layers: Iterable[int | Site] | None) -> tuple[Site, ...]:
    return as_sites(map(resid_post, range(model.n_layers)) if layers is None else layers)


def _extraction(run: Run, making: Making, work: Folder | None) -> Extraction:
    """Run what the work folder does not have yet, and make the vectors."""
    making.check()
    if work is not None and taps_of(find_decoder(run.model.hf)).is_armed():
        raise WorkError(
            f"got work={os.fspath(work)!r} while a plan is armed, which changes the replies and is "
            "not in the folder's record; wanted none. Extract without a work folder, or outside"
        )
    settings = {} if work is None else run.settings() | making.settings()
    book = Workbook(work, settings)
    copies = 1 + max(turn.copy for turn in run.turns)
    how = [f"{name} {value}" for name, value in run.writer.identity.items()]
    made = Provenance(
        judge=type(run.judge).__qualname__, note=", ".join([f"rollouts {copies}", *how])
    )
    with book.held():
        rows, judgements, encoded = run.judged(book, run.written(book))
        return making.extraction(rows, encoded, judgements, book, made)


def _check_scored(rollouts: Sequence[Rollout]) -> None:
    """Raise for scores that are none, and for pairs whose sides do not ask the same."""
    half = len(rollouts) // 2
    for at, row in enumerate(rollouts):
        for name in ("trait_score", "coherence_score"):
            score: Score = getattr(row, name)
            number = isinstance(score, Real) and not isinstance(score, bool)
            if score is not None and not (number and 0 <= score <= 100):
                raise ExtractionError(
                    f"rollout {at}: got {name}={score!r}; wanted a number from 0 to 100, or None "
                    "for a reply that was not judged"
                )
        if row.question != rollouts[at % half].question:
            raise ExtractionError(
                f"rollout {at}: got the question {row.question[:60]!r}, and "
                f"{rollouts[at % half].question[:60]!r} in rollout {at % half}; wanted both sides "
                "of a pair to ask the same. Bring them into one order"
            )


def _judgement(row: Rollout) -> Judgement:
    scores = {"the trait": row.trait_score, "coherence": row.coherence_score}
    missing = [name for name, score in scores.items() if score is None]
    return Judgement(
        question=row.question,
        answer=row.answer,
        trait_score=None if missing else _float(row.trait_score),
        coherence_score=None if missing else _float(row.coherence_score),
        failure=f"no score of {' and '.join(missing)}" if missing else None,
    )


def _float(score: Score) -> float | None:
    return None if score is None else float(score)
