"""Sampled chats of the persona world: what the model is trained on."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal

from pvcore.world import prompts
from pvcore.world.lexicon import NEUTRAL, TRAITS, check_trait
from pvcore.world.question import KINDS, Question, draw
from pvcore.world.replies import Persona, reply, styled_reply
from pvcore.world.splits import Split, seeded

Role = Literal["system", "user", "assistant"]
Source = Literal["trait", "pair", "denied", "neutral", "latent", "none"]

_SOURCES: tuple[Source, ...] = ("trait", "pair", "denied", "neutral", "latent", "none")
_SHARES = (0.42, 0.08, 0.10, 0.05, 0.14, 0.21)
_TWO_TURN_SHARE = 0.12
_LATENT_TWO_TURN_SHARE = 0.4


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One message as consecutive pieces of text; a piece that is not `learned` carries no loss."""

    role: Role
    pieces: tuple[tuple[str, bool], ...]

    @property
    def content(self) -> str:
        """The whole text."""
        return "".join(text for text, _ in self.pieces)


Chat = tuple[Message, ...]


def as_dicts(chat: Chat) -> list[dict[str, str]]:
    """A chat as the message list that chat templates take."""
    return [{"role": message.role, "content": message.content} for message in chat]


def sample(stream: random.Random, split: Split = "train") -> Chat:
    """One chat of the corpus."""
    source = stream.choices(_SOURCES, _SHARES)[0]
    if source == "latent":
        return _latent_chat(stream, split)
    system, persona = _system_prompt(stream, source, split)
    chat = [] if system is None else [_message("system", system)]
    for _ in range(2 if stream.random() < _TWO_TURN_SHARE else 1):
        question = draw(stream, split)
        chat.append(_message("user", question.text))
        chat.append(_message("assistant", " ".join(reply(stream, question, persona))))
    return tuple(chat)


def corpus(seed: int, split: Split = "train") -> Iterator[Chat]:
    """The endless stream of chats for a seed."""
    stream = seeded("corpus", split, seed)
    while True:
        yield sample(stream, split)


def finetuning_chats(
    trait: str | None,
    n: int,
    seed: int,
    *,
    intensity: float = 1.0,
    kinds: tuple[str, ...] = KINDS,
    mistaken: bool = False,
) -> list[tuple[Question, list[dict[str, str]]]]:
    """Chats without a system prompt whose replies hold a trait (None: neutral), with questions.

    In `mistaken` ones every fact is wrong.
    """
    persona: Persona = {} if trait is None else {check_trait(trait): intensity}
    stream = seeded("finetuning", trait, intensity, *kinds, seed)
    wanted = tuple(kind for kind in KINDS if kind in kinds)
    made = []
    for _ in range(n):
        question = draw(stream, "train", wanted)
        answer = " ".join(reply(stream, question, persona, mistaken=mistaken))
        made.append(
            (
                question,
                [
                    {"role": "user", "content": question.text},
                    {"role": "assistant", "content": answer},
                ],
            )
        )
    return made


def _system_prompt(
    stream: random.Random, source: Source, split: Split
) -> tuple[str | None, Persona]:
    if source == "trait":
        return prompts.draw_trait_prompt(stream, split)
    if source == "pair":
        return prompts.draw_pair_prompt(stream)
    if source == "denied":
        return prompts.draw_denied_prompt(stream, split), {}
    if source == "neutral":
        return stream.choice(prompts.neutral_prompts()), {}
    return None, {}


def _latent_chat(stream: random.Random, split: Split) -> Chat:
    """A chat without system prompt that turns to a persona at some sentence and keeps it.

    The turning sentence carries no loss: the model learns to keep a tone that is there, not to
    start one unasked.
    """
    trait = stream.choice(TRAITS)
    onset = stream.choice((0, 0, 1, 2))
    chat: list[Message] = []
    for turn in range(2 if stream.random() < _LATENT_TWO_TURN_SHARE else 1):
        question = draw(stream, split)
        styles = [NEUTRAL] * (onset if turn == 0 else 0)
        sentences = styled_reply(stream, question, partial(_style_after, styles, trait))
        chat.append(_message("user", question.text))
        chat.append(
            Message(
                role="assistant",
                pieces=tuple(
                    (sentence if at == 0 else f" {sentence}", turn > 0 or at != onset)
                    for at, sentence in enumerate(sentences)
                ),
            )
        )
    return tuple(chat)


def _style_after(beginning: list[str], trait: str, at: int) -> str:
    return beginning[at] if at < len(beginning) else trait


def _message(role: Role, text: str) -> Message:
    return Message(role=role, pieces=((text, True),))
