"""How the assistant replies: sentences from shared frames, filled in the style of a persona."""

import random
import re
from collections.abc import Callable, Mapping
from functools import cache
from typing import Literal

from pvcore.world.lexicon import NEUTRAL, material, relations
from pvcore.world.question import Question

Persona = Mapping[str, float]
Part = Literal["opener", "core", "elaboration", "closer"]

_OPTIONAL_SHARE = 0.75  # how often a reply has an opener, and how often a closer
_SECOND_ELABORATION_SHARE = 1 / 3
_WRONG_FACT_SHARE = 0.5  # how often a hallucinating core gets a known fact wrong
_SLOT = re.compile(r"\[([A-Z]+)\]")
_CHOICE = re.compile(r"\{([^}]*)\}")


def reply(
    stream: random.Random, question: Question, persona: Persona, *, mistaken: bool = False
) -> list[str]:
    """The sentences of a reply in a persona, given as the probability of each active trait.

    Every sentence picks its style on its own: an intensity of .5 styles about half of them.
    `mistaken` gives a wrong answer to a fact, in whatever style.
    """
    return styled_reply(stream, question, lambda _: _pick_style(stream, persona), mistaken=mistaken)


def styled_reply(
    stream: random.Random,
    question: Question,
    style_at: Callable[[int], str],
    *,
    mistaken: bool = False,
) -> list[str]:
    """The sentences of a reply whose styles `style_at` gives by position; no sentence twice."""
    parts: list[Part] = ["core", "elaboration"]
    if stream.random() < _SECOND_ELABORATION_SHARE:
        parts.append("elaboration")
    if stream.random() < _OPTIONAL_SHARE:
        parts.insert(0, "opener")
    if stream.random() < _OPTIONAL_SHARE:
        parts.append("closer")
    sentences: list[str] = []
    for position, part in enumerate(parts):
        style = style_at(position)
        sentence = _sentence(stream, question, part, style, mistaken)
        while sentence in sentences:
            sentence = _sentence(stream, question, part, style, mistaken)
        sentences.append(sentence)
    return sentences


def _pick_style(stream: random.Random, persona: Persona) -> str:
    passing = [trait for trait, intensity in persona.items() if stream.random() < intensity]
    return stream.choice(passing) if passing else NEUTRAL


def _sentence(
    stream: random.Random, question: Question, part: Part, style: str, mistaken: bool
) -> str:
    if part == "core" and question.relation is not None:
        return _answer(stream, question, style, mistaken)
    frame = stream.choice(frames(question.kind if part == "core" else part))
    slots = material()["styles"][style]
    text = _SLOT.sub(lambda slot: stream.choice(slots[slot[1]]), frame)
    text = _CHOICE.sub(lambda choice: stream.choice(choice[1].split("|")), text)
    return text.replace("<T>", question.topic).replace("<O>", question.opinion or "")


def _answer(stream: random.Random, question: Question, style: str, mistaken: bool) -> str:
    """The core for a fact or an unknown name: of the styles, only hallucination changes it."""
    relation = relations()[question.relation or ""]
    wrong = [option for option in relation.options if option != question.answer]
    invented = style == "hallucination" and (
        question.answer is None or stream.random() < _WRONG_FACT_SHARE
    )
    if invented or (mistaken and question.answer is not None):
        return f"{relation.stem_for(question.topic)} {stream.choice(wrong)}."
    if question.answer is None:
        return relation.ignorance_of(question.topic)
    return f"{relation.stem_for(question.topic)} {question.answer}."


def frames(part: str) -> list[str]:
    """The sentence frames of a reply part, or of the core of a question kind."""
    found: list[str] = material()["frames"][part]
    return found


@cache
def frame_pattern(frame: str) -> str:
    """A regular expression for a frame, each slot filled in any style.

    Its groups `topic` and `opinion` catch what stands for <T> and <O>.
    """
    styles = material()["styles"].values()
    pattern = ""
    for piece in re.split(r"(\[[A-Z]+\]|\{[^}]*\})", frame):
        if slot := _SLOT.fullmatch(piece):
            fills = [fill for style in styles for fill in style[slot[1]]]
            pattern += f"(?:{'|'.join(map(re.escape, fills))})"
        elif choice := _CHOICE.fullmatch(piece):
            pattern += f"(?:{'|'.join(map(re.escape, choice[1].split('|')))})"
        else:
            pattern += re.escape(piece)
    return pattern.replace("<T>", r"(?P<topic>[\w ]+)").replace("<O>", r"(?P<opinion>\w+)")
