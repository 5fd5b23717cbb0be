"""Where a training began, kept beside its checkpoints: a resumed one measures shift from there."""

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from weakref import WeakValueDictionary

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from pvcore.errors import HookError
from pvcore.files import write_whole
from pvcore.fingerprints import of_text
from pvcore.shift import Standing
from pvcore.sites import Site

NAME = "shift_start.safetensors"

# Trainings that began here, by the identity of their state, which cannot be hashed.
_TRAININGS: WeakValueDictionary[int, object] = WeakValueDictionary()


def read_at(sites: Sequence[Site], prompts: Sequence[Tensor]) -> str:
    """A fingerprint of what is read: the sites and the tokens of the prompts."""
    return of_text([[str(site) for site in sites], [ids.tolist() for ids in prompts]])


def keep(folder: str | PathLike[str], start: Standing, read: str, state: object) -> None:
    """Write where a training begins; `HookError` where nothing can be written.

    Callbacks that are told of one `state` share its training and its file; what an earlier training
    left in the folder is no beginning of this one, and goes.
    """
    path = Path(folder) / NAME
    shared = _TRAININGS.get(id(state)) is state
    entries = {**(_held(path) if shared else {}), read: start.mean.cpu().contiguous()}
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        write_whole(path, save(entries))
    except OSError as error:
        raise HookError(
            f"got {folder}, where the beginning of a training cannot be kept ({error.strerror}); "
            "wanted an output folder that can be written"
        ) from error
    _TRAININGS[id(state)] = state


def kept(folder: str | PathLike[str] | None, read: str, prompts: int, step: int) -> Standing:
    """Where a training resumed at `step` began; `HookError` where that was not kept."""
    held = {} if folder is None else _held(Path(folder) / NAME)
    if read not in held:
        raise HookError(
            f"got a training resumed at step {step}, whose beginning is not in {folder} for these "
            "vectors' sites and prompts; resume in the output folder it began in, with the same "
            "callback, or leave the callback out"
        )
    return Standing(mean=held[read].double(), prompts=prompts)


def _held(path: Path) -> dict[str, Tensor]:
    """By fingerprint, the beginnings in a file; none where it is missing or damaged."""
    try:
        return load(path.read_bytes())
    except (OSError, SafetensorError):
        return {}
