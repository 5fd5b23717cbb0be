"""Checks of what an extraction or a selection is asked for, before anything is sampled or paid."""

from collections.abc import Sequence
from math import inf
from numbers import Integral, Real
from reprlib import repr as brief

from pvcore.errors import PvcoreError
from pvcore.judge import Judge
from pvcore.traits import Trait

Refusal = type[PvcoreError]


def check_request(trait: object, judge: object, questions: object, refusal: Refusal) -> None:
    """A `Trait`, a judge, and questions that are texts, or None for those of the trait."""
    if not isinstance(trait, Trait):
        raise refusal(f"got trait {brief(trait)}; wanted a Trait. Load it: Trait.load(name)")
    if not isinstance(judge, Judge):
        raise refusal(
            f"got judge {brief(judge)}; wanted trait(trait, question, answer) and "
            "coherence(question, answer). Give ApiJudge, LocalJudge, HumanJudge or one of your own"
        )
    if questions is None:
        return
    listed = isinstance(questions, Sequence) and not isinstance(questions, str)
    if not listed or not all(isinstance(one, str) for one in questions):  # type: ignore[attr-defined]
        raise refusal(f"got questions {brief(questions)}; wanted a list of texts")


def check_whole(refusal: Refusal, least: int | None = None, /, **values: object) -> None:
    """Whole numbers, at least `least` where that is given."""
    for name, value in values.items():
        whole = isinstance(value, Integral) and not isinstance(value, bool)
        if not whole or (least is not None and value < least):  # type: ignore[operator]
            wanted = "" if least is None else f", at least {least}"
            raise refusal(f"got {name}={brief(value)}; wanted a whole number{wanted}")


def check_real(refusal: Refusal, least: float | int = -inf, /, **values: object) -> None:
    """Finite numbers, at least `least`."""
    for name, value in values.items():
        real = isinstance(value, Real) and not isinstance(value, bool)
        if not real or not least <= value < inf or value == -inf:  # type: ignore[operator]
            wanted = "" if least == -inf else f", at least {least:g}"
            raise refusal(f"got {name}={brief(value)}; wanted a finite number{wanted}")
