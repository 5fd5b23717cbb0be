"""What the commands share: lists with commas, places to write to, documents printed or as JSON."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import typer

from pvcore.errors import PvcoreError
from pvcore.numerals import number

T = TypeVar("T")


def require_places(*paths: Path | None) -> None:
    """Refuse before the work what could not be written after it."""
    for path in paths:
        if path is None:
            continue
        parent = next(folder for folder in path.absolute().parents if folder.exists())
        if path.is_dir() or not parent.is_dir() or not os.access(parent, os.W_OK):
            raise PvcoreError(f"got {path} to write to; wanted a file in a folder you may write to")


def split_list(text: str | None, kind: Callable[[str], T]) -> tuple[T, ...] | None:
    """The values of a list with commas."""
    if text is None:
        return None
    try:
        return tuple(kind(part.strip()) for part in text.split(","))
    except ValueError:
        raise PvcoreError(f"got {text!r}; wanted numbers with commas, as in 15,19") from None


def print_document(document: dict[str, Any], as_json: bool) -> None:
    """Print a result as indented lines, or as one JSON document."""
    typer.echo(json.dumps(document, indent=2) if as_json else "\n".join(_lines(document)))


def _lines(value: Any, indent: str = "") -> Iterator[str]:
    """A document as indented lines of `name: value`."""
    for name, entry in value.items():
        if isinstance(entry, list) and not any(isinstance(part, dict) for part in entry):
            yield f"{indent}{name}: {', '.join(map(_shown, entry)) or 'none'}"
        elif isinstance(entry, dict | list):
            yield f"{indent}{name}:"
            for part in entry if isinstance(entry, list) else [entry]:
                yield from _lines(part, indent + "  ")
        else:
            yield f"{indent}{name}: {_shown(entry)}"


def _shown(value: Any) -> str:
    return number(value) if isinstance(value, float) else str(value)
