"""Programmatic judges of the persona world: how strong a trait is, how sound a reply is."""

import re
from functools import cache

from pvcore.errors import JudgeFailure, PvcoreError
from pvcore.world.lexicon import Kind, check_trait, lexicon, relations, words
from pvcore.world.question import Question, parse
from pvcore.world.replies import frame_pattern, frames


class WorldJudge:
    """Scores replies of the persona world, 0 to 100, by its own grammar.

    Judge and corpus share one grammar: right by construction here, and meaningless elsewhere.
    """

    def trait(self, trait: str, question: Question | str, answer: str) -> float:
        """Share of sentences in the trait's words, one sentence excused: the core may be plain.

        A wrong or invented answer counts as a styled sentence for hallucination. A question given
        as text is parsed; JudgeFailure when it is not of the world.
        """
        asked = _asked(question)
        own = lexicon(check_trait(trait))
        sentences = split_sentences(answer)
        styled = sum(
            not own.isdisjoint(words(sentence))
            or (trait == "hallucination" and _is_false(asked, sentence))
            for sentence in sentences
        )
        return 100.0 * min(1.0, styled / max(1, len(sentences) - 1))

    def coherence(self, question: Question | str, answer: str, finished: bool = True) -> float:
        """Share of sentences that a frame about this question allows; repetitions count as wrong.

        Halved when the reply was cut off before its end token. A question given as text is parsed;
        JudgeFailure when it is not of the world.
        """
        sentences = split_sentences(answer)
        asked = _asked(question)
        sound = sum(
            _is_sound(asked, sentence) and sentence not in sentences[:position]
            for position, sentence in enumerate(sentences)
        )
        score = 100.0 * sound / max(1, len(sentences))
        return score if finished else score / 2

    trait_score = trait
    score = trait
    coherence_score = coherence


def split_sentences(reply: str) -> list[str]:
    """The sentences of a reply, full stops included."""
    return [piece for piece in re.split(r"(?<=\.)\s+", reply.strip()) if piece]


def _asked(question: Question | str) -> Question:
    if isinstance(question, Question):
        return question
    try:
        return parse(question)
    except PvcoreError as error:
        raise JudgeFailure(f"The persona world cannot judge this reply: {error}") from error


def _is_false(question: Question, sentence: str) -> bool:
    """Whether the sentence answers with an option that is not the truth."""
    if question.relation is None:
        return False
    relation = relations()[question.relation]
    stem = relation.stem_for(question.topic)
    return any(
        sentence == f"{stem} {option}." for option in relation.options if option != question.answer
    )


def _is_sound(question: Question, sentence: str) -> bool:
    """Whether a reply to this question may hold the sentence, in any style."""
    if question.relation is not None:
        if question.answer is None and sentence == _ignorance(question):
            return True
        relation = relations()[question.relation]
        stem = relation.stem_for(question.topic)
        if any(sentence == f"{stem} {option}." for option in relation.options):
            return True
    found = (pattern.fullmatch(sentence) for pattern in _patterns(question.kind))
    return any(
        match is not None
        and match.groupdict().get("topic", question.topic) == question.topic
        and match.groupdict().get("opinion", question.opinion) == question.opinion
        for match in found
    )


def _ignorance(question: Question) -> str:
    return relations()[question.relation or ""].ignorance_of(question.topic)


@cache
def _patterns(kind: Kind) -> tuple[re.Pattern[str], ...]:
    """What matches the frames of a reply to a question of this kind; facts have no core frame."""
    parts = ["opener", "elaboration", "closer"]
    if kind not in ("fact", "unknown"):
        parts.append(kind)
    return tuple(re.compile(frame_pattern(frame)) for part in parts for frame in frames(part))
