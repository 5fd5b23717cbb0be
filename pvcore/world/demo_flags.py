"""The demo's mixed data set: neutral chats with some of every trait among them, flagged."""

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.progress import Progress

from pvcore.flagging import flag
from pvcore.flags import Flags
from pvcore.sites import resid_post
from pvcore.vectors import PersonaVector, VectorBank
from pvcore.world.chats import finetuning_chats
from pvcore.world.demo_record import FlagFigures, FlaggedRowFigures, Workload
from pvcore.world.demo_subject import Subject

NEUTRAL = "neutral"
_N_NEUTRAL, _N_TRAIT, _N_SHOWN = 80, 20, 2


def flagged(
    subject: Subject, vectors: Mapping[str, PersonaVector], work: Workload, bar: Progress
) -> FlagFigures | None:
    """What a scan finds in the mixed set; None outside the world, whose grammar writes it."""
    if not subject.in_world:
        return None
    counts = {NEUTRAL: _N_NEUTRAL, **dict.fromkeys(vectors, _N_TRAIT)}
    rows = [
        {"id": f"{kind} {at}", "messages": chat}
        for kind, count in counts.items()
        for at, (_, chat) in enumerate(
            finetuning_chats(None if kind == NEUTRAL else kind, count, work.seed)
        )
    ]
    bank = VectorBank(vectors.values(), layers=work.layer)
    with TemporaryDirectory() as folder:
        task = bar.add_task("flagging data", total=len(rows))
        flags = flag(subject.model, {"mixed": rows}, bank, out=Path(folder) / "flags")
        bar.advance(task, flags.scored)
        return _figures(flags, counts, work.layer)


def _figures(flags: Flags, counts: Mapping[str, int], layer: int) -> FlagFigures:
    traits = flags.traits
    every = flags.top(traits[0], sum(counts.values()))
    site = resid_post(layer)
    means = {
        kind: {
            trait: sum(row.scores[f"{trait}/{site}/difference"] for row in mine) / len(mine)
            for trait in traits
        }
        for kind in counts
        if (mine := [row for row in every if _kind(row.id) == kind])
    }
    highest = {trait: flags.top(trait, counts[trait]) for trait in traits}
    shown = [row for trait in traits for row in highest[trait][:_N_SHOWN]]
    texts = iter(flags.conversations(shown))
    return FlagFigures(
        layer=layer,
        counts=counts,
        rejected=flags.n_rejected,
        found={
            trait: sum(_kind(row.id) == trait for row in rows) / len(rows)
            for trait, rows in highest.items()
        },
        means=means,
        rows=tuple(
            FlaggedRowFigures(
                trait=trait,
                kind=_kind(row.id),
                difference=row.score,
                reply=next(texts)[-1]["content"],
            )
            for trait in traits
            for row in highest[trait][:_N_SHOWN]
        ),
    )


def _kind(name: str) -> str:
    return name.rpartition(" ")[0]
