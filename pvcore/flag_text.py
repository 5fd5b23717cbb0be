"""The text of rows that were scored: read again from where they came from."""

from collections.abc import Sequence

from pvcore.errors import FlagError
from pvcore.flag_rows import Form, Message, RowDefect, conversation
from pvcore.flag_sources import Source, decode

Key = tuple[str, int]


def conversations_of(
    sources: Sequence[Source], form: Form, keys: Sequence[Key]
) -> list[list[Message]]:
    """The conversation of each `(source, row)`, in the order asked for."""
    wanted: dict[str, set[int]] = {}
    for name, row in keys:
        wanted.setdefault(name, set()).add(row)
    found: dict[Key, list[Message]] = {}
    for source in sources:
        rows = wanted.get(source.name, set())
        last = max(rows, default=-1)
        for raw in source.rows(form.known) if rows else ():
            if raw.row in rows:
                try:
                    found[source.name, raw.row] = conversation(decode(raw.content), form)
                except RowDefect:
                    break
            if raw.row >= last:
                break
    missing = next((key for key in keys if key not in found), None)
    if missing is not None:
        raise FlagError(
            f"got no conversation at row {missing[1]} of {missing[0]}; wanted the sources as they "
            "were when they were scored"
        )
    return [found[key] for key in keys]
