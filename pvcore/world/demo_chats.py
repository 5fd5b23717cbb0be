"""Chats shown in a demo: the same question twice, with and without an intervention, watched."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext

from pvcore.extraction import Conversation
from pvcore.interventions import Add, Intervention
from pvcore.vectors import PersonaVector, VectorBank
from pvcore.world.demo_caps import cap_at
from pvcore.world.demo_measures import chat, judged
from pvcore.world.demo_record import CapFigures, ChatFigures, DoseFigures, ReplyFigures, Workload
from pvcore.world.demo_subject import Examined, Subject

Vectors = Mapping[str, PersonaVector]
# Where the questions begin from which each of the first traits picks. The persona world asks of
# facts, unknown names, advice, opinions and problems in turn: evil answers a problem first,
# sycophancy an opinion, hallucination a fact.
_FIRST_QUESTIONS = (4, 13, 20)
_N_QUESTIONS = 10


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
    for examined, start in zip(subject.traits, _FIRST_QUESTIONS, strict=False):
        name, questions = examined.trait.name, _from(examined.trait.evaluation_questions, start)
        dose = best_dose(by_trait[name])
        add = Add(vectors[name], coeff=dose, layers=[work.layer])
        asked = _telling(subject, examined, add, [chat(q) for q in questions], 1, work)
        title = f"Steered: {dose:g} times {name} added at layer {work.layer}"
        chats.append(_pair(subject, vectors, name, asked, ("Plain", add, title), work))
    first, cap = subject.traits[0], caps[0]
    held = cap_at(vectors[cap.trait], {int(layer): level for layer, level in cap.max.items()})
    prompt = first.graded[-1][1][0]
    requests = [chat(q, prompt) for q in _from(first.trait.evaluation_questions, 0)]
    asked = _telling(subject, first, held, requests, -1, work)
    titles = ("Asked for by the system prompt", held, "The same, capped at every layer")
    return (*chats, _pair(subject, vectors, cap.trait, asked, titles, work))


def _from(questions: Sequence[str], start: int) -> list[str]:
    """Ten questions from `start` on, or as many as there are, beginning again at the end."""
    count = min(_N_QUESTIONS, len(questions))
    return [questions[(start + place) % len(questions)] for place in range(count)]


def _telling(
    subject: Subject,
    examined: Examined,
    intervention: Intervention,
    chats: Sequence[Conversation],
    sign: int,
    work: Workload,
) -> Conversation:
    """The chat whose changed reply is most coherent and has most (sign 1) or least of the trait."""
    questions = [messages[-1]["content"] for messages in chats]
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
