"""Files of other tools, read and written: vectors, capping configurations, rollouts and chats.

Index bases are converted where a file is opened, by named functions, and never again: everything
that comes out counts blocks from 0, as sites do. Nothing here runs what a file says.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from pvcore import formats_gguf, formats_pickle, formats_rollouts
from pvcore.errors import FormatError, PvcoreError
from pvcore.files import write_whole
from pvcore.formats_capping import experiment_ids, from_capping, is_capping, to_capping
from pvcore.formats_rollouts import Messages
from pvcore.formats_rollouts import RolloutRow as RolloutRow
from pvcore.formats_tensors import (
    from_axis,
    from_paper,
    from_steering_vector,
    is_axis,
    is_steering_vector,
    paper_name,
    to_axis,
    to_paper,
    to_steering_vector,
)
from pvcore.plan import Plan
from pvcore.vectors import VARIANTS, PersonaVector, Variant

Format = Literal["native", "paper", "assistant-axis", "gguf", "steering-vectors"]
FORMATS: tuple[Format, ...] = get_args(Format)
FilePath = str | os.PathLike[str]
Choice = TypeVar("Choice", bound=str)
ZIP = b"PK"
# Hundreds of times the largest vector file there is; a model given by mistake is refused unread.
MOST_BYTES = 2**30


def read(
    path: FilePath,
    *,
    format: Format | str | None = None,
    trait: str | None = None,
    model_id: str | None = None,
    variant: Variant | str | None = None,
) -> PersonaVector:
    """The vector in a file of any of the formats, which its contents tell apart.

    A bare tensor is the paper's only under the paper's name, `TRAIT_response_avg_diff.pt`; else
    say `format`, because the paper counts its rows from 1 and assistant-axis from 0. `trait`,
    `model_id` and `variant` replace what the file says, which is often nothing: a trait is then
    the file's name. Raises `FormatError` that names the file.
    """
    with _blaming(path):
        wanted = None if format is None else _choice("format", format, FORMATS)
        kind = None if variant is None else _choice("variant", variant, VARIANTS)
        data = _bytes(Path(path))
        found = wanted or _format(data)
        if found == "native":
            vector = PersonaVector.load(path)
        elif found == "gguf":
            vector = formats_gguf.decode(data, trait=trait or Path(path).stem)
        else:
            vector = _from_tensors(data, Path(path).stem, wanted, trait, kind)
        given: dict[str, Any] = {"trait": trait, "model_id": model_id, "variant": kind}
        changes = {name: value for name, value in given.items() if value is not None}
        return replace(vector, source=None, **changes) if changes else vector


def write(
    vector: PersonaVector, path: FilePath, *, format: Format | str, n_layers: int | None = None
) -> None:
    """Write a vector whole or not at all; `FormatError` where the format cannot hold it.

    Only `native` keeps everything. `n_layers`, the number of the model's blocks, is wanted for
    `paper` alone: the shape of that file says it.
    """
    with _blaming(path):
        target = _choice("format", format, FORMATS)
        if (n_layers is not None) != (target == "paper"):
            raise FormatError(
                f"got n_layers={n_layers} for the format {format!r}; wanted the number of the "
                "model's blocks for 'paper', and nothing for the others"
            )
        if target == "native":
            vector.save(path)
        else:
            _write(path, _encoded(vector, target, n_layers or 0))


def experiments(path: FilePath) -> tuple[str, ...]:
    """The ids of the experiments in a capping configuration of assistant-axis."""
    with _blaming(path):
        return experiment_ids(formats_pickle.load(_bytes(Path(path))))


def read_capping(path: FilePath, *, experiment: str | None = None, model_id: str = "") -> Plan:
    """One experiment of a capping configuration of assistant-axis as a plan of `Cap`s."""
    with _blaming(path):
        value = formats_pickle.load(_bytes(Path(path)))
        return from_capping(value, experiment=experiment, model_id=model_id)


def write_capping(plans: Mapping[str, Plan], path: FilePath) -> None:
    """Write plans of `Cap(vector, max=number, span="all")` as one configuration, by their keys."""
    with _blaming(path):
        _write(path, formats_pickle.dump(to_capping(plans)))


def read_rollouts(path: FilePath) -> tuple[RolloutRow, ...]:
    """The rollouts in a CSV of the paper's scripts."""
    with _blaming(path):
        return formats_rollouts.decode_csv(_bytes(Path(path)))


def write_rollouts(rows: Sequence[RolloutRow], path: FilePath) -> None:
    """Write a CSV that the paper's scripts take for their own."""
    with _blaming(path):
        _write(path, formats_rollouts.encode_csv(rows))


def read_messages(path: FilePath) -> list[Messages]:
    """The chats in JSON lines of `messages`, as datasets for finetuning have them."""
    with _blaming(path):
        return formats_rollouts.decode_messages(_bytes(Path(path)))


def write_messages(chats: Iterable[Sequence[Mapping[str, object]]], path: FilePath) -> None:
    """Write chats as JSON lines of `messages`."""
    with _blaming(path):
        _write(path, formats_rollouts.encode_messages(chats))


@contextmanager
def _blaming(path: FilePath) -> Iterator[None]:
    """Turn any error about a file's contents into one `FormatError` that names the file."""
    try:
        yield
    except PvcoreError as error:
        text = str(error).removeprefix(f"{path}: ")
        raise FormatError(f"{path}: {text}") from None


def _bytes(path: Path) -> bytes:
    try:
        # Anything but a regular file may never end, and opening a pipe may never return.
        if path.exists() and not path.is_file():
            raise FormatError("got something that is no regular file; wanted a file")
        size = path.stat().st_size
        if size > MOST_BYTES:
            raise FormatError(f"got {size} bytes; wanted at most {MOST_BYTES}: is this a model?")
        return path.read_bytes()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise FormatError(f"cannot be read ({reason}); wanted a file: check the path") from None


def _write(path: FilePath, content: bytes) -> None:
    try:
        write_whole(Path(path), content)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise FormatError(
            f"cannot be written ({reason}); wanted a writable path in a folder that is there: "
            "nothing was changed"
        ) from None


def _choice(name: str, got: str, wanted: Sequence[Choice]) -> Choice:
    for known in wanted:
        if got == known:
            return known
    raise FormatError(f"got {name} {got!r}; wanted one of {', '.join(wanted)}")


def _format(data: bytes) -> Format | None:
    """The container, by its first bytes; None for a torch file, which must be opened to tell."""
    if data.startswith(formats_gguf.MAGIC):
        return "gguf"
    if data.startswith(ZIP):
        return None
    if data[8:9] == b"{":
        return "native"
    raise FormatError(
        f"got bytes that begin with {data[:8]!r}; wanted a file of torch.save, GGUF or pvcore"
    )


def _from_tensors(
    data: bytes, stem: str, format: Format | None, trait: str | None, variant: Variant | None
) -> PersonaVector:
    value = formats_pickle.load(data)
    named = paper_name(stem)
    if is_capping(value):
        raise FormatError(
            "got a capping configuration; wanted a vector: open it with formats.read_capping"
        )
    if format == "steering-vectors" or (format is None and is_steering_vector(value)):
        return from_steering_vector(value, trait=trait or stem)
    if format == "assistant-axis" or (format is None and is_axis(value)):
        return from_axis(value, trait=trait or stem)
    if format == "paper" or named:
        told, spoken = named or (stem, "response_mean")
        return from_paper(value, trait=trait or told, variant=variant or spoken)
    raise FormatError(
        "got a torch file whose format its contents do not tell; wanted format='paper' (row l is "
        "layer l from 1, row 0 the embeddings) or format='assistant-axis' (row l is block l from 0)"
    )


def _encoded(vector: PersonaVector, format: Format, n_layers: int) -> bytes:
    if format == "gguf":
        return formats_gguf.encode(vector)
    if format == "paper":
        return formats_pickle.dump(to_paper(vector, n_layers=n_layers))
    turn: Callable[[PersonaVector], object] = (
        to_axis if format == "assistant-axis" else to_steering_vector
    )
    return formats_pickle.dump(turn(vector))
