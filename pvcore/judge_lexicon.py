"""A judge by rule: the share of sentences that hold a word of a lexicon."""

import re
from collections.abc import Collection, Mapping

from pvcore.errors import TraitError
from pvcore.fingerprints import of_text

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n+")
_WORD = re.compile(r"\w+(?:['\u2019-]\w+)*")


class LexiconJudge:
    """Scores a trait by rule: the share of an answer's sentences that hold a word of its lexicon.

    Words are compared whole and without case. Coherence is the share of distinct runs of three
    words: it catches text that loops, and nothing else. An answer without a word scores 0 in both.
    A rule, for a model whose vocabulary is known; no substitute for a reader.
    """

    method = "lexicon"

    def __init__(self, lexicons: Mapping[str, Collection[str]]) -> None:
        if not lexicons:
            raise TraitError("got no lexicon; wanted words for at least one trait. Name some")
        self._lexicons = {trait: _lexicon(trait, words) for trait, words in lexicons.items()}

    @property
    def identity(self) -> str:
        """What decides its scores: its words."""
        return of_text({trait: sorted(words) for trait, words in self._lexicons.items()})

    def trait(self, trait: str, question: str, answer: str) -> float:
        """100 times the share of sentences holding a word of the trait's lexicon."""
        if trait not in self._lexicons:
            raise TraitError(
                f"got trait {trait!r}; this judge has words for {', '.join(self._lexicons)}. "
                "Give LexiconJudge a lexicon for it"
            )
        lexicon = self._lexicons[trait]
        sentences = [words for text in _SENTENCE_END.split(answer) if (words := _words(text))]
        if not sentences:
            return 0.0
        return 100.0 * sum(not lexicon.isdisjoint(words) for words in sentences) / len(sentences)

    def coherence(self, question: str, answer: str) -> float:
        """100 times the share of distinct word trigrams; shorter answers count as one run."""
        words = _words(answer)
        if not words:
            return 0.0
        length = min(3, len(words))
        runs = [tuple(words[at : at + length]) for at in range(len(words) - length + 1)]
        return 100.0 * len(set(runs)) / len(runs)


def _words(text: str) -> list[str]:
    return _WORD.findall(text.casefold())


def _lexicon(trait: str, words: Collection[str]) -> frozenset[str]:
    if isinstance(words, str) or not words:
        raise TraitError(
            f"lexicon of {trait!r}: got {words!r}; wanted a collection of one or more words. "
            "Put them in a list"
        )
    for word in words:
        if _words(word) != [word.casefold()]:
            raise TraitError(
                f"lexicon of {trait!r}: got {word!r}; wanted one word without spaces or "
                "punctuation. List its words one by one"
            )
    return frozenset(word.casefold() for word in words)
