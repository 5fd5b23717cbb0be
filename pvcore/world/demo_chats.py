"""Chats shown in a demo: the same question twice, with and without an intervention, watched."""

from collections.abc import Mapping
from contextlib import nullcontext

from pvcore.extraction import Conversation
from pvcore.interventions import Add, Intervention
from pvcore.vectors import PersonaVector, VectorBank
from pvcore.world.demo_caps import cap_at
from pvcore.world.demo_measures import chat, judged
from pvcore.world.demo_record import CapFigures, ChatFigures, DoseFigures, ReplyFigures, Workload
from pvcore.world.demo_subject import Examined, Subject

Vectors = Mapping[str, PersonaVector]
_N_TRAITS = 3
_N_QUESTIONS = 10  # the persona world asks five kinds of questions in turn


def shown_chats(
    subject: Subject,
    vectors: Vectors,
    doses: tuple[DoseFigures, ...],
    caps: tuple[CapFigures, ...],
    work: Workload,
) -> tuple[ChatFigures, ...]:
    """Greedy replies of the first traits, plain and steered, and of the first under a cap.

    Of ten questions the one is shown whose changed reply has most of what was wanted.
    """
    by_trait = {dose.trait: dose for dose in doses if dose.layer == work.layer}
    chats = []
    for examined in subject.traits[:_N_TRAITS]:
        name = examined.trait.name
        dose = best_dose(by_trait[name])
        add = Add(vectors[name], coeff=dose, layers=[work.layer])
        asked = _telling(subject, examined, add, "", 1, work)
        title = f"Steered: {dose:g} times {name} added at layer {work.layer}"
        chats.append(_pair(subject, vectors, name, asked, ("Plain", add, title), work))
    first, cap = subject.traits[0], caps[0]
    held = cap_at(vectors[cap.trait], {int(layer): level for layer, level in cap.max.items()})
    asked = _telling(subject, first, held, first.graded[-1][1][0], -1, work)
    titles = ("Asked for by the system prompt", held, "The same, capped at every layer")
    return (*chats, _pair(subject, vectors, cap.trait, asked, titles, work))


def _telling(
    subject: Subject,
    examined: Examined,
    intervention: Intervention,
    system_prompt: str,
    sign: int,
    work: Workload,
) -> Conversation:
    """The chat whose changed reply is most coherent and has most (sign 1) or least of the trait."""
    questions = examined.trait.evaluation_questions[:_N_QUESTIONS]
    chats = [chat(question, system_prompt) for question in questions]
    with subject.model.steer(intervention):
        replies = subject.model.generate(chats, do_sample=False, max_new_tokens=work.max_new_tokens)
    scores = [
        (sign * (row.trait_score or 0.0) + (row.coherence_score or 0.0))
        for row in judged(subject, examined, questions, replies)
    ]
    return chats[scores.index(max(scores))]


def best_dose(dose: DoseFigures) -> float:
    """The coefficient at which the lower of trait and coherence score is highest."""
    reached = zip(dose.scores, dose.coherence, dose.coefficients, strict=True)
    return max(reached, key=lambda row: min(row[:2]))[2]


def _pair(
    subject: Subject,
    vectors: Vectors,
    trait: str,
    asked: Conversation,
    change: tuple[str, Intervention, str],
    work: Workload,
) -> ChatFigures:
    before, intervention, after = change
    bank = VectorBank(vectors.values(), layers=[work.layer])
    plain = _reply(subject, bank, asked, None, before, work)
    steered = _reply(subject, bank, asked, intervention, after, work)
    prompt = "\n".join(message["content"] for message in asked)
    return ChatFigures(trait=trait, prompt=prompt, layer=work.layer, replies=(plain, steered))


def _reply(
    subject: Subject,
    bank: VectorBank,
    asked: Conversation,
    intervention: Intervention | None,
    title: str,
    work: Workload,
) -> ReplyFigures:
    """A greedy reply: step t of the monitor is the state that produced token t."""
    model = subject.model
    with (
        model.steer(intervention) if intervention else nullcontext(),
        model.monitor(bank) as seen,
    ):
        (ids,) = model.generate_ids([asked], do_sample=False, max_new_tokens=work.max_new_tokens)
    texts = [str(model.tokenizer.decode([one], skip_special_tokens=True)) for one in ids.tolist()]
    shown = [step for step, text in enumerate(texts) if text]
    return ReplyFigures(
        title=title,
        tokens=tuple(texts[step] for step in shown),
        projections={
            trait: tuple(seen[trait].steps[shown, 0, 0].tolist()) for trait in bank.traits
        },
    )
