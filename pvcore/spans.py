"""Spans: which tokens of a conversation. This module alone decides what each name covers."""

from typing import Literal, get_args

from pvcore.errors import SpanError

Span = Literal["all", "prompt", "response", "last_prompt_token"]
SPANS: tuple[Span, ...] = get_args(Span)


def check_span(span: str) -> Span:
    """The span itself, or a `SpanError` that lists the four there are."""
    for known in SPANS:
        if span == known:
            return known
    raise SpanError(f"got span {span!r}; wanted one of {', '.join(SPANS)}")
