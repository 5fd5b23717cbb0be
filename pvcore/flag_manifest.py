"""The manifest of a scan: what was asked, so that a resumed scan is the same scan or refused."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

from pvcore.errors import FlagError, SourceError
from pvcore.files import write_durably
from pvcore.flag_shards import clear, footers
from pvcore.flag_sources import Source, Standing, standing
from pvcore.vector_files import pvcore_version

FORMAT = 1
CHANGED = "changed while it was scanned"
NAME = "manifest.json"
# Projections of one probe differ between machines by rounding, between models by much more.
PROBE_TOLERANCE = 1e-2
SHOWN = 6
HINTS = {
    "plan": " (a plan is armed around the call that was not, or was and is not, or is another)",
    "written": " (what the chat template writes of one and the same chat; a date in it?)",
}


def fingerprint(asked: Mapping[str, Any]) -> str:
    """The hash of what was asked; what the model answers to the probe is compared apart."""
    model = {key: value for key, value in asked["model"].items() if key != "probe"}
    return sha256(json.dumps({**asked, "model": model}, sort_keys=True).encode()).hexdigest()


def begin(folder: Path, asked: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest of a new scan, or that of the same scan begun before.

    Raises `FlagError` that says what changed when the folder holds another one.
    """
    path = folder / NAME
    held = read(folder) if path.exists() else None
    marks = {footer.fingerprint for footer in footers(folder)}
    if held is None and marks - {fingerprint(asked)}:
        raise FlagError(
            f"got {folder} with scores of another scan and no readable {NAME}; wanted an empty "
            "folder or the same scan. Give another out"
        )
    if held is not None:
        if changes := list(_changes(held["asked"], asked)):
            more = f" and {len(changes) - SHOWN} more" if len(changes) > SHOWN else ""
            raise FlagError(
                f"got {folder}, which holds a scan that was asked for otherwise: "
                f"{'; '.join(changes[:SHOWN])}{more}. Ask as before to finish it, or give another "
                "out"
            )
        return _noted(folder, held)
    made = {
        "format": FORMAT,
        "status": "running",
        "fingerprint": fingerprint(asked),
        "versions": [versions()],
        "asked": dict(asked),
    }
    write(folder, made)
    return made


def versions() -> dict[str, str]:
    """What scores here. Told, not compared: another version may go on with a scan."""
    import transformers

    return {"pvcore": pvcore_version(), "transformers": transformers.__version__}


def _noted(folder: Path, held: dict[str, Any]) -> dict[str, Any]:
    """The manifest with the versions that go on; written down before they make anything."""
    known, now = held.get("versions", []), versions()
    if now in known:
        return held
    noted = {**held, "versions": [*known, now]}
    if held["status"] != "complete":
        write(folder, noted)
    return noted


def note_beginning(folder: Path, source: str, count: int, mark: str) -> None:
    """Note the first rows of a data set; `FlagError` where this scan began with others.

    What an interrupted call has taken out of an iterator before the first shard was there is gone.
    In a scan that is complete every row is in a shard, and compared with that.
    """
    held = read(folder) or {}
    if held.get("status") == "complete":
        return
    begun = held.get("begun", {})
    known = begun.get(source, {})
    if known.get(str(count), mark) != mark:
        raise FlagError(
            f"got {source}, which begins with other rows than when this scan began (an iterator "
            "that was read before?); wanted the same data from its beginning. Give a fresh "
            "iterator, or another out"
        )
    if str(count) not in known:
        write(folder, {**held, "begun": {**begun, source: {**known, str(count): mark}}})


class Watch:
    """Sees whether the files of a scan, that of the replies too, stay as they are hashed.

    Made before they are hashed.
    """

    def __init__(
        self, folder: Path, sources: Sequence[Source], replies: Source | None = None
    ) -> None:
        self._folder, self._sources, self._replies = folder, sources, replies
        self._before = self._standing()

    def _standing(self) -> list[Standing]:
        return [*standing(self._sources), *standing([self._replies] if self._replies else [])]

    def refuse_stirred(self) -> None:
        """`FlagError` where a file was but touched, for who has no hash yet of what was read."""
        if self._standing() != self._before:
            raise FlagError(
                "got files that were written to while the scan began; wanted files that stay as "
                "they are. Call again when they do"
            )

    def refuse_changed(self) -> None:
        """`FlagError` where a file does not hold any more what was hashed when the scan began.

        Rows may then be of either, so that nobody can ask for this scan again.
        """
        now = self._standing()
        if now == self._before:
            return
        held = read(self._folder) or {}
        asked = held.get("asked", {})
        known = asked.get("sources", {})
        files = [(one, known.get(one.name)) for one in self._sources]
        if self._replies is not None:
            files.append((self._replies, asked.get("difference", {}).get("replies")))
        changed = [
            one.name
            for (one, hashed), before, then in zip(files, self._before, now, strict=True)
            # One that is gone was read to its end as it was.
            if then not in (None, before) and _content(one) != hashed
        ]
        if changed:
            write(self._folder, {**held, "asked": {**asked, CHANGED: changed}})
            raise FlagError(
                f"got {', '.join(changed)}, which changed while it was scanned, so that scores may "
                "be of either content; wanted files that stay as they are. Give another out"
            )
        self._before = now


def _content(source: Source) -> dict[str, str | int] | None:
    try:
        return source.fingerprint()
    except SourceError:
        return None


def finish(folder: Path, manifest: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Write that everything is there."""
    kept = {name: value for name, value in manifest.items() if name != "begun"}
    write(folder, {**kept, "status": "complete", **found})


def read(folder: Path) -> dict[str, Any] | None:
    """The manifest of a folder; None where it was cut short. `FlagError` for another format."""
    try:
        held = json.loads((folder / NAME).read_text(encoding="utf-8"))
    except ValueError:
        return None
    except OSError as error:
        raise FlagError(
            f"got {folder}, where there is no {NAME} ({error.strerror}); wanted the folder of a "
            "scan"
        ) from error
    if not isinstance(held, dict) or held.get("format") != FORMAT:
        raise FlagError(f"got {folder / NAME}, which is no manifest of format {FORMAT}")
    return held


def write(folder: Path, manifest: Mapping[str, Any]) -> None:
    text = json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"
    try:
        write_durably(folder / NAME, text.encode())
    except OSError as error:
        raise FlagError(f"got {folder}, which cannot be written: {error.strerror}") from error


def asked_before(folder: Path) -> dict[str, Any] | None:
    """What the scan in a folder was asked for; None where there is none, or none that is whole."""
    held = read(folder) if (folder / NAME).exists() else None
    return None if held is None else dict(held["asked"])


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold the folder: two processes at once would do everything twice. A kill lets go of it.

    What killed writes have left is removed once the folder is held: before, it may be another's.
    """
    try:
        import fcntl
    except ImportError:  # Windows, where an open file is its own lock
        clear(folder)
        yield
        return
    try:
        lock = (folder / ".lock").open("w")
    except OSError as error:
        raise FlagError(
            f"got {folder}, where nothing can be written ({error.strerror}); wanted a folder of "
            "your own. A finished scan is read with pv.Flags.load(folder, sources=...)"
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise FlagError(
                f"got {folder}, into which another process is scanning; wait for it, or give "
                "another out"
            ) from error
        clear(folder)
        yield


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    probe = before["model"].get("probe", {}), now["model"].get("probe", {})
    old, new = _flat(_without_probe(before)), _flat(_without_probe(now))
    for key in [*old, *(key for key in new if key not in old)]:
        if old.get(key) != new.get(key):
            was, now_is = (_brief(side[key]) if key in side else "absent" for side in (old, new))
            yield f"{key} was {was} and is {now_is}{HINTS.get(key, '')}"
    if not alike(*probe):
        was, now_is = (_brief(list(_flat(one).values())) for one in probe)
        yield f"the model's projections of a probe were {was} and are {now_is} (a hook that acts?)"


def alike(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two probes agree at the sites and on the vectors that both of them know."""
    return all(
        _near([(of_site[trait], other[site][trait]) for trait in of_site if trait in other[site]])
        for site, of_site in one.items()
        if site in other
    )


def _near(pairs: Sequence[tuple[list[float], list[float]]]) -> bool:
    told = [both for pair in pairs for both in zip(*pair, strict=True)]
    scale = max((abs(value) for both in told for value in both), default=0.0)
    return all(abs(a - b) <= PROBE_TOLERANCE * scale for a, b in told)


def _without_probe(asked: Mapping[str, Any]) -> dict[str, Any]:
    model = {key: value for key, value in asked["model"].items() if key != "probe"}
    return {**asked, "model": model}


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return {name: value}
    flat: dict[str, Any] = {}
    for key, entry in value.items():
        flat |= _flat(entry, f"{name}.{key}" if name else str(key))
    return flat


def _brief(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else f"{text[:37]}..."
