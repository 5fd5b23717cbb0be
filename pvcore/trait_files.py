"""Trait files: JSON objects read field by field, and written whole."""

import json
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pvcore.errors import TraitError
from pvcore.files import write_whole
from pvcore.trait_texts import ContrastPair

SHIPPED = Path(__file__).parent / "data" / "traits"


def shipped_names() -> tuple[str, ...]:
    """The traits that ship with pvcore."""
    return tuple(sorted(path.stem for path in SHIPPED.glob("*.json")))


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """The object of one JSON file, read field by field; a `TraitError` names the field."""

    path: Path
    fields: Mapping[str, object]

    @classmethod
    def read(cls, path: Path) -> "Record":
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise TraitError(
                f"{path}: cannot be read ({error.strerror}); wanted a trait file. Check the path, "
                f"or name a shipped trait: {', '.join(shipped_names())}"
            ) from error
        except (ValueError, RecursionError) as error:
            raise TraitError(
                f"{path}: got text that is not JSON ({error}); wanted a trait file. "
                "Write one with Trait.save"
            ) from error
        if not isinstance(fields, dict):
            raise TraitError(
                f"{path}: got a JSON {type(fields).__name__}; wanted an object. "
                "Write trait files with Trait.save"
            )
        return cls(path=path, fields=fields)

    def require(self, wanted: tuple[str, ...], *, closed: bool) -> None:
        """Every wanted field is there and, when `closed`, no other."""
        missing = [field for field in wanted if field not in self.fields]
        unknown = [field for field in self.fields if field not in wanted] if closed else []
        if missing or unknown:
            lacks = f"no {', '.join(missing)}" if missing else ""
            extra = f"unknown {', '.join(unknown)}" if unknown else ""
            raise TraitError(
                f"got {' and '.join(filter(None, (lacks, extra)))}; "
                f"wanted the fields {', '.join(wanted)}. Correct the file"
            )

    def text(self, field: str) -> str:
        value = self.fields[field]
        if not isinstance(value, str):
            raise _wrong(field, value, "a text")
        return value

    def texts(self, field: str) -> tuple[str, ...]:
        value = self.fields[field]
        if not isinstance(value, list):
            raise _wrong(field, value, "a list of texts")
        for index, entry in enumerate(value):
            if not isinstance(entry, str):
                raise _wrong(f"{field}[{index}]", entry, "a text")
        return tuple(value)

    def pairs(self, field: str, positive: str, negative: str) -> tuple[ContrastPair, ...]:
        value = self.fields[field]
        if not isinstance(value, list):
            raise _wrong(field, value, "a list of pairs")
        for index, entry in enumerate(value):
            if not (
                isinstance(entry, dict)
                and entry.keys() == {positive, negative}
                and all(isinstance(prompt, str) for prompt in entry.values())
            ):
                wanted = f"an object of two texts, {positive!r} and {negative!r}"
                raise _wrong(f"{field}[{index}]", entry, wanted)
        return tuple(ContrastPair(positive=e[positive], negative=e[negative]) for e in value)

    def one_sided(self, field: str, side: str) -> tuple[str, ...] | None:
        """The texts of a list of objects that hold `side` and nothing else; None for any other."""
        value = self.fields[field]
        if not isinstance(value, list) or not value:
            return None
        if not all(isinstance(entry, dict) and entry.keys() == {side} for entry in value):
            return None
        for index, entry in enumerate(value):
            if not isinstance(entry[side], str):
                raise _wrong(f"{field}[{index}]", entry, f"a text for {side!r}")
        return tuple(entry[side] for entry in value)


def _wrong(field: str, value: object, wanted: str) -> TraitError:
    return TraitError(f"{field}: got {reprlib.repr(value)}; wanted {wanted}. Correct the file")


def write_json(path: Path, record: Mapping[str, object]) -> None:
    """Write JSON beside `path` and move it there, so that no reader ever meets half a file."""
    content = (json.dumps(record, ensure_ascii=False, indent=2) + "\n").encode()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, content)
    except OSError as error:
        raise TraitError(
            f"{path}: cannot be written ({error.strerror}); wanted a file in a directory that can "
            "be written. Give another path"
        ) from error
