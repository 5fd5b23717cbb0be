"""The demo's page on finetuning: what training on a trait does, and what prevention keeps out."""

from collections.abc import Iterator

from pvcore.report import Section, Table
from pvcore.world.demo_record import DemoRecord

_SAID = {
    "before": "not trained",
    "undefended": "trained on the trait",
    "prevented": "trained under prevention",
    "random vector": "trained under a random vector of the same norm",
}


def finetuning(record: DemoRecord) -> Iterator[Section]:
    """The section, where the model was finetuned."""
    if not record.finetunes:
        return
    trait, work = record.finetunes[0].trait, record.workload
    traits = list(record.finetunes[0].shift)
    yield Section(
        title="Finetuning, and keeping a trait out",
        text=(
            f"The model is trained {work.finetuning_steps} steps on {work.finetuning_chats} chats "
            f"whose replies show {trait}. Prevention adds {work.prevention:g} times the vector at "
            f"layer {work.layer} while it trains, and nothing afterwards. The shift is how far the "
            "last prompt token has moved along each vector, in units of the residual."
        ),
        blocks=(
            Table(
                columns=(
                    "model",
                    f"{trait} score",
                    "coherence",
                    "first loss",
                    "last loss",
                    *(f"shift, {name}" for name in traits),
                ),
                rows=[
                    (
                        _SAID[one.way],
                        one.score,
                        one.coherence,
                        *(one.losses or (None, None)),
                        *(one.shift[name] for name in traits),
                    )
                    for one in record.finetunes
                ],
                caption=f"{record.finetunes[0].sampled} replies a row.",
            ),
        ),
    )
