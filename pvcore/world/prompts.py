"""System prompts of the persona world: graded, descriptive, denying, neutral and two-trait."""

import random
import re
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any

from pvcore.world.lexicon import TRAITS, check_trait, material
from pvcore.world.replies import Persona
from pvcore.world.splits import Split, seeded, split_of

LEVELS: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
PAIR_INTENSITY = 0.6
_DESCRIBED_SHARE = 0.4
_N_NAMED, _N_DESCRIBED = 3, 2  # prompts of an extraction
_N_GRADED = 6


@cache
def trait_prompts(trait: str, level: float, split: Split) -> tuple[str, ...]:
    """Every prompt that asks for a trait at a level (0 denies it) on one side of the split."""
    prompts: Iterable[str]
    if level == 0.0:
        prompts = _denied(trait)
    elif level == 1.0:
        prompts = [*_graded(trait, level), *_described(trait)]
    else:
        prompts = _graded(trait, level)
    return tuple(prompt for prompt in prompts if split_of("prompt", trait, prompt) == split)


def extraction_prompts(trait: str) -> list[tuple[str, str]]:
    """Five contrastive (positive, negative) system prompts of a trait, from the training side.

    Positive prompts name the trait at full strength or describe it; negative ones deny it.
    """
    check_trait(trait)
    described = set(_described(trait))
    positive = trait_prompts(trait, 1.0, "train")
    stream = seeded("extraction", trait)
    asked = [
        *stream.sample([text for text in positive if text not in described], _N_NAMED),
        *stream.sample([text for text in positive if text in described], _N_DESCRIBED),
    ]
    denied = stream.sample(trait_prompts(trait, 0.0, "train"), len(asked))
    return list(zip(asked, denied, strict=True))


def graded_prompts(trait: str, split: Split = "held_out") -> list[tuple[float, list[str]]]:
    """Phrasings of a trait at each level from 0 (denied) to 1, of one side of the split."""
    check_trait(trait)
    graded = []
    for level in LEVELS:
        pool = list(trait_prompts(trait, level, split))
        seeded("graded", trait, level).shuffle(pool)
        graded.append((level, pool[:_N_GRADED]))
    return graded


def neutral_prompts() -> list[str]:
    """Prompts that ask for no persona; they are on both sides of the split."""
    return list(material()["prompts"]["neutral"])


def draw_trait_prompt(stream: random.Random, split: Split) -> tuple[str, Persona]:
    """A prompt for one trait at a random level, and the persona it asks for."""
    trait = stream.choice(TRAITS)
    if stream.random() < _DESCRIBED_SHARE:
        described = [p for p in _described(trait) if split_of("prompt", trait, p) == split]
        return stream.choice(described), {trait: 1.0}
    level = stream.choice(LEVELS[1:])
    graded = [p for p in _graded(trait, level) if split_of("prompt", trait, p) == split]
    return stream.choice(graded), {trait: level}


def draw_pair_prompt(stream: random.Random) -> tuple[str, Persona]:
    """A prompt for two traits, and the persona it asks for."""
    first, second = stream.sample(TRAITS, 2)
    text = stream.choice(_templates("paired")).format(
        first=stream.choice(_trait(first)["adjectives"]),
        second=stream.choice(_trait(second)["adjectives"]),
    )
    return _with_articles(text), {first: PAIR_INTENSITY, second: PAIR_INTENSITY}


def draw_denied_prompt(stream: random.Random, split: Split) -> str:
    """A prompt that denies a random trait; it asks for a neutral reply."""
    return stream.choice(trait_prompts(stream.choice(TRAITS), 0.0, split))


@cache
def _graded(trait: str, level: float) -> tuple[str, ...]:
    return tuple(
        _with_articles(template.format(level=word, adjective=adjective))
        for template in _templates("graded")
        for word in material()["prompts"]["levels"][str(level)]
        for adjective in _trait(trait)["adjectives"]
    )


@cache
def _described(trait: str) -> tuple[str, ...]:
    return tuple(
        template.format(description=description)
        for template in _templates("described")
        for description in _trait(trait)["descriptions"]
    )


def _denied(trait: str) -> Iterator[str]:
    for adjective in _trait(trait)["adjectives"]:
        yield from (text.format(adjective=adjective) for text in _templates("denied"))
    for description in _trait(trait)["descriptions"]:
        for template in _templates("denied_description"):
            yield template.format(description=description)
    for adjective in _trait(trait)["opposites"]:
        for template in _templates("opposite"):
            yield _with_articles(template.format(adjective=adjective))


def _with_articles(text: str) -> str:
    """Turn "a a bit evil" and "a evil" into English."""
    text = text.replace(" a a bit ", " a bit ")
    return re.sub(r"\ba (?=[aeiou])", "an ", text)


def _templates(name: str) -> list[str]:
    found: list[str] = material()["prompts"][name]
    return found


def _trait(trait: str) -> dict[str, Any]:
    found: dict[str, Any] = material()["traits"][trait]
    return found
