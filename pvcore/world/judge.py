"""Programmatic judges of the persona world: how strong a trait is, how sound a reply is."""

import re
from functools import cache

from pvcore.errors import JudgeFailure, PvcoreError
from pvcore.world.lexicon import check_trait, lexicon, relations, words
from pvcore.world.question import Question, parse
from pvcore.world.replies import about, frame_pattern, frames


class WorldJudge:
    """Scores replies of the persona world, 0 to 100, by its own grammar.

    Judge and corpus share one grammar: right by construction here, and meaningless elsewhere.
    """

    def score(self, trait: str, prompt_text: str, reply_text: str) -> float:
        """Trait score of a reply to a prompt given as text; JudgeFailure when not of the world."""
        return self.trait_score(trait, _asked(prompt_text), reply_text)

    def coherence_score(self, prompt_text: str, reply_text: str, *, finished: bool = True) -> float:
        """Coherence of a reply to a prompt given as text; JudgeFailure when not of the world."""
        return self.coherence(_asked(prompt_text), reply_text, finished)

    def trait_score(self, trait: str, question: Question, reply: str) -> float:
        """Share of sentences in the trait's words, one sentence excused: the core may be plain.

        A wrong or invented answer counts as a styled sentence for hallucination.
        """
        own = lexicon(check_trait(trait))
        sentences = split_sentences(reply)
        styled = sum(
            not own.isdisjoint(words(sentence))
            or (trait == "hallucination" and _is_false(question, sentence))
            for sentence in sentences
        )
        return 100.0 * min(1.0, styled / max(1, len(sentences) - 1))

    def coherence(self, question: Question, reply: str, finished: bool = True) -> float:
        """Share of sentences that a frame about this question allows; repetitions count as wrong.

        Halved when the reply was cut off before its end token.
        """
        sentences = split_sentences(reply)
        allowed = _allowed(question)
        sound = sum(
            allowed.fullmatch(sentence) is not None and sentence not in sentences[:position]
            for position, sentence in enumerate(sentences)
        )
        score = 100.0 * sound / max(1, len(sentences))
        return score if finished else score / 2


def split_sentences(reply: str) -> list[str]:
    """The sentences of a reply, full stops included."""
    return [piece for piece in re.split(r"(?<=\.)\s+", reply.strip()) if piece]


def _asked(prompt_text: str) -> Question:
    try:
        return parse(prompt_text)
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


@cache
def _allowed(question: Question) -> re.Pattern[str]:
    """Every sentence a reply to this question may hold, in any style."""
    parts = ["opener", "elaboration", "closer"]
    if question.relation is None:
        parts.append(question.kind)
    patterns = [about(frame_pattern(frame), question) for part in parts for frame in frames(part)]
    if question.relation is not None:
        relation = relations()[question.relation]
        options = "|".join(map(re.escape, relation.options))
        patterns.append(f"{re.escape(relation.stem_for(question.topic))} (?:{options})\\.")
        if question.answer is None:
            patterns.append(re.escape(relation.ignorance_of(question.topic)))
    return re.compile("|".join(patterns))
