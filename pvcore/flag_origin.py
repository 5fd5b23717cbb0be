"""Origins: whether sources are still those whose rows were scored.

Rows are known by their place. Sources that changed, or that bear another name, would give the
text, and the cleaned copy, of other rows: they are refused.
"""

from collections.abc import Mapping, Sequence
from hashlib import sha256
from typing import Any

from pvcore.errors import FlagError
from pvcore.flag_rows import Form
from pvcore.flag_sources import RawRow, Source
from pvcore.flag_tokens import said_by

Tally = dict[str, int | str]


class Witness:
    """Counts the rows of one data set as they come by, and digests what they say."""

    def __init__(self, source: Source, form: Form) -> None:
        self._source, self._form = source, form
        self._rows, self._digest = 0, sha256()

    def see(self, raw: RawRow) -> None:
        self._rows += 1
        self._digest.update(said_by(self._source.name, raw, self._form).mark)

    @property
    def tally(self) -> Tally:
        return {"rows": self._rows, "sha256": self._digest.hexdigest()}


class Origin:
    """What a finished scan knows of its sources."""

    def __init__(self, manifest: Mapping[str, Any]) -> None:
        self._files: Mapping[str, Any] = manifest["asked"]["sources"]
        self._data_sets: Mapping[str, Any] = manifest.get("data_sets", {})
        self._form = Form(**manifest["asked"]["form"])
        self._checked: dict[str, tuple[int, ...]] = {}

    def check_names(self, sources: Sequence[Source]) -> None:
        """Raises `FlagError` for a source that was not scored under this name."""
        for source in sources:
            kind = self._files.get(source.name, {}).get("kind")
            if kind != source.kind:
                raise FlagError(
                    f"got the source {source.name!r} ({source.kind}), which this scan has not "
                    f"scored; it has {', '.join(map(repr, list(self._files)[:6]))}. Name it as it "
                    "was then: sources={name: path or data set}"
                )

    def check_files(self, sources: Sequence[Source]) -> None:
        """Raises `FlagError` for a file whose bytes are others than when it was scored."""
        self.check_names(sources)
        for source in sources:
            if source.path is None:
                continue
            try:
                held = source.path.stat()
            except OSError as error:
                raise _changed(source) from error
            state = (held.st_ino, held.st_size, held.st_mtime_ns)
            if self._checked.get(source.name) == state:
                continue
            if source.fingerprint() != self._files[source.name]:
                raise _changed(source)
            self._checked[source.name] = state

    def witness(self, source: Source) -> Witness | None:
        """Who watches the rows of a data set as they are read; None for a file."""
        return Witness(source, self._form) if source.path is None else None

    def check_rows(self, source: Source, witness: Witness | None) -> None:
        """Raises `FlagError` where a data set's rows were others than those scored."""
        if witness is not None and witness.tally != self._data_sets.get(source.name):
            raise _changed(source)


def _changed(source: Source) -> FlagError:
    return FlagError(
        f"got {source.name}, which is not what was scored (other rows, or an iterator that was "
        "read before); wanted the same data in the same order. Give it, or flag it anew into "
        "another out"
    )
