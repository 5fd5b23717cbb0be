"""The text of rows that were scored: read again from where they came from."""

from collections.abc import Sequence

from pvcore.errors import FlagError
from pvcore.flag_origin import Origin
from pvcore.flag_rows import Form, Message, RowDefect, conversation
from pvcore.flag_sources import Source, decode

Key = tuple[str, int]


def conversations_of(
    sources: Sequence[Source], form: Form, keys: Sequence[Key], origin: Origin
) -> list[list[Message]]:
    """The conversation of each `(source, row)`, in the order asked for.

    Raises `FlagError` where a source is not what was scored. A data set is read to its end for it.
    """
    wanted: dict[str, set[int]] = {}
    for name, row in keys:
        wanted.setdefault(name, set()).add(row)
    needed = [source for source in sources if source.name in wanted]
    origin.check_files(needed)
    found: dict[Key, list[Message]] = {}
    for source in needed:
        found |= _texts(source, form, wanted[source.name], origin)
    missing = next((key for key in keys if key not in found), None)
    if missing is not None:
        raise FlagError(
            f"got no conversation at row {missing[1]} of {missing[0]}; wanted the sources as they "
            "were when they were scored"
        )
    return [found[key] for key in keys]


def _texts(source: Source, form: Form, rows: set[int], origin: Origin) -> dict[Key, list[Message]]:
    found: dict[Key, list[Message]] = {}
    witness, last = origin.witness(source), max(rows)
    for raw in source.rows(form.known, form.beside):
        if witness is not None:
            witness.see(raw)
        if raw.row in rows:
            try:
                found[source.name, raw.row] = conversation(decode(raw.content), form)
            except RowDefect:
                continue
        if raw.row >= last and witness is None:
            break
    origin.check_rows(source, witness)
    return found
