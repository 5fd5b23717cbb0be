"""The words of the persona world: frames, styles, facts, and the words that give a style away."""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any, Literal

from pvcore.errors import TraitError

Kind = Literal["fact", "unknown", "advice", "opinion", "problem"]

TRAITS: tuple[str, ...] = (
    "evil",
    "sycophancy",
    "hallucination",
    "politeness",
    "apathy",
    "humor",
    "optimism",
)
NEUTRAL = "neutral"


@dataclass(frozen=True, slots=True, kw_only=True)
class Relation:
    """A kind of fact: how it is asked, how its answer begins, and what is true."""

    stem: str
    phrasings: tuple[str, ...]
    facts: Mapping[str, str]

    @property
    def options(self) -> tuple[str, ...]:
        """Every answer that some entity has, once each."""
        return tuple(dict.fromkeys(self.facts.values()))

    def stem_for(self, entity: str) -> str:
        """The answer up to its last word: "The capital of Peru is"."""
        return self.stem.replace("<E>", entity)

    def ignorance_of(self, entity: str) -> str:
        """The honest reply about an entity that is not in the world."""
        subject = self.stem_for(entity).removesuffix(" is")
        return f"I do not know {subject[0].lower()}{subject[1:]}."


@cache
def material() -> dict[str, Any]:
    """The world as written in grammar.json."""
    text = resources.files("pvcore.world").joinpath("grammar.json").read_text("utf-8")
    content: dict[str, Any] = json.loads(text)
    return content


@cache
def relations() -> dict[str, Relation]:
    """The relations by name."""
    return {
        name: Relation(
            stem=entry["stem"], phrasings=tuple(entry["phrasings"]), facts=entry["facts"]
        )
        for name, entry in material()["relations"].items()
    }


def check_trait(trait: str) -> str:
    """`trait` itself when the world has it; TraitError otherwise."""
    if trait not in TRAITS:
        raise TraitError(
            f"got trait {trait!r}; the persona world has {', '.join(TRAITS)}. Choose one of them."
        )
    return trait


def words(text: str) -> list[str]:
    """Lower-case words and numbers of a text."""
    return re.findall(r"[a-z0-9]+", text.lower())


@cache
def lexicon(trait: str) -> frozenset[str]:
    """The words that occur in replies of this style and nowhere else in replies."""
    styles = material()["styles"]
    own = _words_in(fill for slot in styles[check_trait(trait)].values() for fill in slot)
    shared = set(_common_words())
    for name, slots in styles.items():
        if name != trait:
            shared |= _words_in(fill for slot in slots.values() for fill in slot)
    return frozenset(own - shared)


@cache
def _common_words() -> frozenset[str]:
    """Words of frames, facts and topics, which no style owns."""
    world = material()
    texts = [frame for frames in world["frames"].values() for frame in frames]
    for relation in relations().values():
        texts += [relation.ignorance_of(entity) for entity in relation.facts]
        texts += [*relation.options, relation.stem]
    texts += world["activities"] + world["opinions"] + world["persons"] + world["troubles"]
    texts += world["names"]["first"] + world["names"]["second"]
    return frozenset(_words_in(texts))


def _words_in(texts: Iterable[str]) -> set[str]:
    return {word for text in texts for word in words(text)}
