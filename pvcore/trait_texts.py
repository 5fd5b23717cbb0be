"""Texts of a trait: what makes a prompt, a list of questions or a rubric usable."""

import reprlib
import string
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from pvcore.errors import TraitError

_PLACEHOLDERS = frozenset({"question", "answer"})


@dataclass(frozen=True, slots=True, kw_only=True)
class ContrastPair:
    """Two system prompts that differ in the trait: one calls for it, one for its absence."""

    positive: str
    negative: str


@contextmanager
def blaming(source: str) -> Iterator[None]:
    """Put the file or trait at fault in front of a `TraitError`."""
    try:
        yield
    except TraitError as error:
        raise TraitError(f"{source}: {error}") from error.__cause__


def check_text(field: str, text: str) -> None:
    if not isinstance(text, str) or not text.strip():
        raise TraitError(f"{field}: got {text!r}; wanted a text. Write it out")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise TraitError(
            f"{field}: got half a surrogate pair in {text!r}; wanted text that can be "
            "stored as UTF-8. Write it again"
        )


def check_texts(field: str, texts: tuple[str, ...]) -> None:
    if not isinstance(texts, tuple) or not texts:
        raise TraitError(
            f"{field}: got {reprlib.repr(texts)}; wanted a tuple of one or more. Write them out"
        )
    first: dict[str, int] = {}
    for index, text in enumerate(texts):
        check_text(f"{field}[{index}]", text)
        earlier = first.setdefault(spoken(text), index)
        if earlier != index:
            raise TraitError(
                f"{field}[{index}]: got {text!r}, which is {field}[{earlier}] again; "
                "wanted each once. Replace one of the two"
            )


def check_disjoint(extraction: tuple[str, ...], evaluation: tuple[str, ...]) -> None:
    asked = {spoken(text): index for index, text in enumerate(extraction)}
    for index, text in enumerate(evaluation):
        if spoken(text) in asked:
            raise TraitError(
                f"evaluation_questions[{index}]: got {text!r}, which is "
                f"extraction_questions[{asked[spoken(text)]}]; wanted questions the vector was "
                "not extracted with. Replace one of the two"
            )


def check_instructions(pairs: tuple[ContrastPair, ...]) -> None:
    if not isinstance(pairs, tuple) or not all(isinstance(pair, ContrastPair) for pair in pairs):
        raise TraitError(
            f"instructions: got {reprlib.repr(pairs)}; wanted a tuple of ContrastPair. "
            "Write ContrastPair(positive=..., negative=...) for each"
        )
    check_texts("instructions.positive", tuple(pair.positive for pair in pairs))
    check_texts("instructions.negative", tuple(pair.negative for pair in pairs))
    for index, pair in enumerate(pairs):
        if spoken(pair.positive) == spoken(pair.negative):
            raise TraitError(
                f"instructions[{index}]: got {pair.positive!r} on both sides; wanted two "
                "prompts that differ in the trait. Rewrite one side"
            )


def check_rubric(rubric: str) -> None:
    check_text("rubric", rubric)
    try:
        parts = list(string.Formatter().parse(rubric))
    except ValueError as error:
        raise TraitError(
            f"rubric: got a loose brace ({error}); wanted {{question}} and {{answer}}. "
            "Write any other brace twice"
        ) from error
    # A conversion or format specification is part of what must match: {answer!r} is refused.
    found = {
        field + (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "")
        for _, field, spec, conversion in parts
        if field is not None
    }
    if found != _PLACEHOLDERS:
        got = ", ".join(f"{{{field}}}" for field in sorted(found)) or "none"
        raise TraitError(
            f"rubric: got the placeholders {got}; wanted {{question}} and {{answer}}. "
            "Use both, and write any other brace twice"
        )


def spoken(text: str) -> str:
    """What counts when two texts are compared: neither case nor spacing."""
    return " ".join(text.split()).casefold()
