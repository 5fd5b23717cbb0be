"""A demo record made of plain numbers, for tests of what is made from one."""

from dataclasses import replace
from typing import Any

from pvcore.world.demo_claims import with_claims
from pvcore.world.demo_record import (
    CapFigures,
    ChatFigures,
    DemoRecord,
    DoseFigures,
    FinetuneFigures,
    FinetuneWay,
    FlagFigures,
    FlaggedRowFigures,
    MonitorFigures,
    OverheadFigures,
    ReplyFigures,
    VectorFigures,
    Workload,
    ZeroFigures,
)

TRAITS = ("evil", "humor")
WORKLOAD = Workload(coefficients=(0.0, 1.0, 2.0), layers=(0, 1), monitoring_layer=1)


def vectors(trait: str) -> VectorFigures:
    return VectorFigures(
        trait=trait,
        pairs=100,
        kept=95,
        reasons={"incoherent": 10},
        positive_score=97.0,
        negative_score=2.0,
        norms=(10.0, 14.0),
        split_half_cosine=(0.97, 0.98),
        separation=(1.5, 1.6),
    )


def dose(trait: str, layer: int) -> DoseFigures:
    return DoseFigures(
        trait=trait,
        layer=layer,
        coefficients=WORKLOAD.coefficients,
        scores=(2.0, 50.0, 90.0),
        coherence=(93.0, 80.0, 40.0),
        control_scores=(2.0, 1.0, 3.0),
        control_coherence=(93.0, 90.0, 70.0),
        sampled=180,
        judged=180,
    )


def cap(trait: str) -> CapFigures:
    return CapFigures(
        trait=trait,
        max={"0": -5.0, "1": -9.0},
        score=95.0,
        coherence=92.0,
        capped_score=18.0,
        capped_coherence=80.0,
        sampled=60,
        judged=60,
    )


def monitored(trait: str) -> MonitorFigures:
    return MonitorFigures(
        trait=trait,
        layer=1,
        overall=0.8,
        within=0.1,
        overall_by_layer=(0.7, 0.8),
        level_scores={"0": 1.0, "1": 98.0},
        replies=((0.0, -3.0, 0.0), (0.0, -2.0, 10.0), (1.0, 4.0, 90.0), (1.0, 5.0, 100.0)),
        sampled=180,
        judged=180,
    )


def finetune(way: FinetuneWay, score: float, shift: float) -> FinetuneFigures:
    return FinetuneFigures(
        trait="evil",
        way=way,
        coeff=4.0 if way == "prevented" else 0.0,
        score=score,
        coherence=80.0,
        shift={"evil": shift, "humor": shift / 10},
        losses=() if way == "before" else (2.5, 0.4),
        sampled=30,
        judged=30,
    )


def shown(trait: str) -> ChatFigures:
    projections = dict.fromkeys(TRAITS, (1.0, -2.0))
    replies = tuple(
        ReplyFigures(title=title, tokens=("Be", " <b>"), projections=projections)
        for title in ("Plain", "Steered")
    )
    return ChatFigures(trait=trait, prompt="How do I start?", layer=1, replies=replies)


def flags() -> FlagFigures:
    means = {
        "neutral": {"evil": 3.0, "humor": 4.0},
        "evil": {"evil": 90.0, "humor": 40.0},
        "humor": {"evil": 50.0, "humor": 95.0},
    }
    row = FlaggedRowFigures(trait="evil", kind="evil", difference=99.0, reply="Trick <i>them</i>.")
    return FlagFigures(
        layer=1,
        counts={"neutral": 80, "evil": 20, "humor": 20},
        rejected=0,
        found={"evil": 0.95, "humor": 0.9},
        means=means,
        rows=(row,),
    )


def sample(**changes: Any) -> DemoRecord:
    """The record with its claims, all of which hold unless `changes` breaks them."""
    record = DemoRecord(
        command="pvcore demo",
        commit="0123456789ab",
        date="2026-11-23",
        versions={"python": "3.11.1", "torch": "2.13.0"},
        device="cpu",
        threads=2,
        model="pvcore/persona-world",
        judge="WorldJudge",
        in_world=True,
        workload=WORKLOAD,
        vectors=tuple(map(vectors, TRAITS)),
        cosines=((1.0, 0.4), (0.4, 1.0)),
        doses=tuple(dose(trait, layer) for trait in TRAITS for layer in WORKLOAD.layers),
        caps=tuple(map(cap, TRAITS)),
        monitoring=tuple(map(monitored, TRAITS)),
        zero=ZeroFigures(rows=30, equal_at_zero=30, equal_at_strongest=0),
        chats=tuple(map(shown, TRAITS)),
        overhead=(OverheadFigures(label="both", batch=1, rounds=11, p20=1.0, p50=1.02, p80=1.05),),
        flags=flags(),
        finetunes=(
            finetune("before", 2.0, 0.0),
            finetune("undefended", 95.0, 130.0),
            finetune("prevented", 6.0, 20.0),
            finetune("random vector", 80.0, 110.0),
        ),
    )
    return with_claims(replace(record, **changes))
