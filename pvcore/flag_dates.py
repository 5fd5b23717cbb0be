"""Dates: a chat template that prints today's gets the day its scan began, in every row.

Otherwise a scan that is finished tomorrow would have scored its rows under two prompts.
"""

import copy
import json
import re
from collections.abc import Mapping
from datetime import datetime
from hashlib import sha256
from typing import Any

# How templates ask for the date, as transformers gives it to them.
ASKED = "strftime_now"
CALL = re.compile(ASKED + r"""\(\s*(["'])(.*?)\1\s*\)""")
_PROBE = [
    {"role": "user", "content": "Which day is it?"},
    {"role": "assistant", "content": "I cannot know."},
]


def moment_for(tokenizer: Any, held: Mapping[str, Any] | None = None) -> str | None:
    """The moment a scan goes by: that of what was asked before, or now; None without a date."""
    if held is not None and isinstance(held.get("moment"), str):
        return str(held["moment"])
    if ASKED not in str(getattr(tokenizer, "chat_template", None)):
        return None
    return datetime.now().isoformat(timespec="seconds")


def pinned(tokenizer: Any, moment: str | None) -> Any:
    """A tokenizer whose chat template takes `moment` for the present; the one given stays as it is.

    What asks for a date in another way is left alone, and noticed by `written`.
    """
    if moment is None:
        return tokenizer
    then = datetime.fromisoformat(moment)

    def dated(template: Any) -> Any:
        if isinstance(template, Mapping):
            return {name: dated(one) for name, one in template.items()}
        return CALL.sub(lambda call: json.dumps(then.strftime(call[2])), template)

    twin = copy.copy(tokenizer)
    twin.chat_template = dated(tokenizer.chat_template)
    return twin


def written(tokenizer: Any) -> str:
    """A hash of what the chat template writes of a fixed chat."""
    try:
        text = str(tokenizer.apply_chat_template(_PROBE, tokenize=False))
    except Exception as error:  # a template may refuse any chat, in any way
        text = type(error).__name__
    return sha256(text.encode(errors="replace")).hexdigest()[:16]
