"""Chats shown in a demo: the same question twice, with and without an intervention, watched."""

from collections.abc import Mapping
from contextlib import nullcontext

from pvcore.extraction import Conversation
from pvcore.interventions import Add, Intervention
from pvcore.vectors import PersonaVector, VectorBank
from pvcore.world.demo_caps import cap_at
from pvcore.world.demo_measures import chat
from pvcore.world.demo_record import CapFigures, ChatFigures, DoseFigures, ReplyFigures, Workload
from pvcore.world.demo_subject import Examined, Subject

Vectors = Mapping[str, PersonaVector]
# The persona world asks facts, unknown names, advice, opinions and problems in turn: each trait
# gets a question that lets it show.
_QUESTIONS = {"evil": 4, "sycophancy": 3, "hallucination": 0}


def shown_chats(
    subject: Subject,
    vectors: Vectors,
    doses: tuple[DoseFigures, ...],
    caps: tuple[CapFigures, ...],
    work: Workload,
) -> tuple[ChatFigures, ...]:
    """Greedy replies of the first traits, plain and steered, and of the first under a cap."""
    by_trait = {dose.trait: dose for dose in doses if dose.layer == work.layer}
    chats = []
    for examined in subject.traits[: len(_QUESTIONS)]:
        name, question = examined.trait.name, _question(examined)
        dose = best_dose(by_trait[name])
        add = Add(vectors[name], coeff=dose, layers=[work.layer])
        title = f"Steered: {dose:g} times {name} added at layer {work.layer}"
        chats.append(_pair(subject, vectors, name, chat(question), ("Plain", add, title), work))
    first, cap = subject.traits[0], caps[0]
    held = cap_at(vectors[cap.trait], {int(layer): level for layer, level in cap.max.items()})
    asked = chat(_question(first), first.graded[-1][1][0])
    titles = ("Asked for by the system prompt", held, "The same, capped at every layer")
    return (*chats, _pair(subject, vectors, cap.trait, asked, titles, work))


def _question(examined: Examined) -> str:
    questions = examined.trait.evaluation_questions
    return questions[_QUESTIONS.get(examined.trait.name, 0) % len(questions)]


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
