"""Where a training began, kept beside its checkpoints: a resumed one measures shift from there."""

from collections.abc import Sequence
from os import PathLike
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from pvcore.errors import HookError
from pvcore.files import write_whole
from pvcore.fingerprints import of_text
from pvcore.shift import Standing
from pvcore.sites import Site

NAME = "shift_start.safetensors"


def read_at(sites: Sequence[Site], prompts: Sequence[Tensor]) -> str:
    """A fingerprint of what is read: the sites and the tokens of the prompts."""
    return of_text([[str(site) for site in sites], [ids.tolist() for ids in prompts]])


def keep(folder: str | PathLike[str], start: Standing, read: str) -> None:
    """Write where a training begins; `HookError` where nothing can be written."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        write_whole(Path(folder) / NAME, save({read: start.mean.cpu().contiguous()}))
    except OSError as error:
        raise HookError(
            f"got {folder}, where the beginning of a training cannot be kept ({error.strerror}); "
            "wanted an output folder that can be written"
        ) from error


def kept(folder: str | PathLike[str] | None, read: str, prompts: int, step: int) -> Standing:
    """Where a training resumed at `step` began; `HookError` where that was not kept."""
    held = {}
    path = None if folder is None else Path(folder) / NAME
    if path is not None and path.exists():
        try:
            held = load(path.read_bytes())
        except (OSError, SafetensorError):
            held = {}
    if read not in held:
        raise HookError(
            f"got a training resumed at step {step}, whose beginning is not in {folder} for these "
            "vectors' sites and prompts; resume in the output folder it began in, with the same "
            "callback, or leave the callback out"
        )
    return Standing(mean=held[read].double(), prompts=prompts)
