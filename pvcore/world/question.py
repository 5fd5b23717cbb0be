"""What users ask: facts, made-up names, advice, opinions and problems, and how a text is parsed."""

import itertools
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from pvcore.errors import ChatError
from pvcore.world.lexicon import Kind, material, relations
from pvcore.world.splits import Split, seeded, split_of

KINDS: tuple[Kind, ...] = ("fact", "unknown", "advice", "opinion", "problem")
_SHARES = (0.36, 0.12, 0.18, 0.17, 0.17)


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A user message with what a judge must know of it.

    `topic` is how a reply names the subject. `relation` is set for facts and unknown names,
    `answer` for facts, `opinion` for opinions.
    """

    text: str
    kind: Kind
    topic: str
    relation: str | None = None
    answer: str | None = None
    opinion: str | None = None


@cache
def known(kind: Kind, split: Split) -> tuple[Question, ...]:
    """Every question of one kind on one side of the split."""
    return tuple(question for question in _all_of(kind) if split_of(*_key(question)) == split)


def questions(split: Split, n: int, seed: int, kinds: tuple[Kind, ...] = KINDS) -> list[Question]:
    """`n` distinct questions, kinds in turn; ChatError when the world has fewer."""
    random_stream = seeded("questions", split, seed)
    pools = []
    for kind in kinds:
        pool = list(known(kind, split))
        random_stream.shuffle(pool)
        pools.append(pool)
    mixed = [q for row in itertools.zip_longest(*pools) for q in row if q is not None]
    if n > len(mixed):
        raise ChatError(
            f"got n={n}; the {split} side has {len(mixed)} questions of the kinds "
            f"{', '.join(kinds)}. Ask for at most that many."
        )
    return mixed[:n]


def draw(random_stream: random.Random, split: Split, kinds: tuple[Kind, ...] = KINDS) -> Question:
    """One question, kinds in the shares of the training corpus."""
    weights = [_SHARES[KINDS.index(kind)] for kind in kinds]
    kind = random_stream.choices(kinds, weights)[0]
    return random_stream.choice(known(kind, split))


@cache
def parse(text: str) -> Question:
    """The question a user message asks, from its text alone.

    A rendered ChatML prompt is accepted too: its last user turn counts.
    """
    turns = re.findall(r"<\|im_start\|>user\n(.*?)<\|im_end\|>", text, flags=re.DOTALL)
    message = (turns[-1] if turns else text).strip()
    found = _by_text().get(message)
    if found is None:
        raise ChatError(
            f"got {message[:80]!r}, which no template of the persona world matches; "
            "wanted one of its questions. Take them from pvcore.world.questions()."
        )
    return found


@cache
def _by_text() -> dict[str, Question]:
    return {question.text: question for kind in KINDS for question in _all_of(kind)}


def _key(question: Question) -> tuple[str, ...]:
    """Unknown names are split by name, everything else by its exact text."""
    if question.kind == "unknown":
        return (question.kind, question.topic)
    return (question.kind, question.text)


def _all_of(kind: Kind) -> Iterator[Question]:
    if kind == "fact":
        return _facts()
    if kind == "unknown":
        return _unknown_names()
    if kind == "problem":
        return _problems()
    return _activities(kind)


def _facts() -> Iterator[Question]:
    for name, relation in relations().items():
        for phrasing in relation.phrasings:
            for entity, answer in relation.facts.items():
                yield Question(
                    text=phrasing.replace("<E>", entity),
                    kind="fact",
                    topic=entity,
                    relation=name,
                    answer=answer,
                )


def _unknown_names() -> Iterator[Question]:
    names = material()["names"]
    for first, second in itertools.product(names["first"], names["second"]):
        entity = f"{first} {second}"
        for name, relation in relations().items():
            for phrasing in relation.phrasings:
                text = phrasing.replace("<E>", entity)
                yield Question(text=text, kind="unknown", topic=entity, relation=name)


def _activities(kind: Kind) -> Iterator[Question]:
    world = material()
    opinions = world["opinions"] if kind == "opinion" else [None]
    for phrasing, activity, opinion in itertools.product(
        world[kind], world["activities"], opinions
    ):
        text = phrasing.replace("<A>", activity).replace("<O>", opinion or "")
        yield Question(text=text, kind=kind, topic=activity, opinion=opinion)


def _problems() -> Iterator[Question]:
    world = material()
    for phrasing, person, trouble in itertools.product(
        world["problem"], world["persons"], world["troubles"]
    ):
        text = phrasing.replace("<P>", person).replace("<X>", trouble)
        yield Question(text=text, kind="problem", topic=f"your {person}")
