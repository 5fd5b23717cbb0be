"""Finetuning shift: how far training moved a model along persona vectors (paper, section 4.2)."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pvcore.blocks import find_decoder
from pvcore.chats import Chats
from pvcore.errors import ModelError, VectorError
from pvcore.model import HookedModel
from pvcore.plan import Plan
from pvcore.sites import Site
from pvcore.vectors import VectorBank
from pvcore.wrappers import evaluating, refuse_virtual_tokens

Source = HookedModel | str | PathLike[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class FinetuningShift:
    """The change of the mean last-prompt-token residual, projected on unit vectors.

    `shifts` gives one number per site for each trait, in units of the residual; `prompts` counts
    the prompts both means were taken over.
    """

    sites: tuple[Site, ...]
    shifts: Mapping[str, Float[Tensor, " site"]]
    prompts: int

    def __getitem__(self, trait: str) -> Float[Tensor, " site"]:
        if trait not in self.shifts:
            raise VectorError(f"got trait {trait!r}; this shift is along {', '.join(self.shifts)}")
        return self.shifts[trait]

    def named(self) -> dict[str, float]:
        """Each number under `trait/site`, as in `evil/resid_post.19`."""
        return {
            f"{trait}/{site}": float(number)
            for trait, numbers in self.shifts.items()
            for site, number in zip(self.sites, numbers, strict=True)
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """Where a model stands: its mean residual over the last tokens of so many prompts."""

    mean: Float[Tensor, "site d_model"]
    prompts: int

    def shift_to(self, after: "Standing", bank: VectorBank) -> FinetuningShift:
        along = torch.einsum("sd,skd->sk", after.mean - self.mean, bank.units.double())
        shifts = {trait: along[:, k] for k, trait in enumerate(bank.traits)}
        return FinetuningShift(sites=bank.sites, shifts=shifts, prompts=self.prompts)


def finetuning_shift(
    base: Source,
    tuned: Source,
    bank: VectorBank,
    prompts: Chats,
    *,
    batch_size: int = 16,
    check_model: bool = True,
    progress: bool = False,
    **settings: Any,
) -> FinetuningShift:
    """How far `tuned` stands from `base` along each vector, on the same prompts.

    A model given by name or folder, also that of a PEFT adapter, is loaded when its turn comes and
    let go after it, so that the two need not fit into memory together; `settings` go to the loader.
    Unless they name a dtype, the second is loaded in that of the first. Both are given the tokens
    that base's tokenizer makes, and are in evaluation mode. Prompts end where a reply would begin.
    `check_model` holds base to the model the vectors were made for. Raises `ModelError` for two
    models of unlike dtypes, whose rounding would count as shift.
    """
    _refuse_shared(base, tuned)
    if isinstance(tuned, HookedModel):
        settings = _in_dtype(tuned.dtype, settings)
    start = _base(base, bank, prompts, batch_size, check_model, progress, settings)
    model = tuned if isinstance(tuned, HookedModel) else load(tuned, **start.loading)
    _refuse_rounding(start, model)
    after = standing(model, bank, start.prompts, batch_size, progress)
    return start.before.shift_to(after, bank)


def shift_trajectory(
    base: Source,
    folder: str | PathLike[str],
    bank: VectorBank,
    prompts: Chats,
    *,
    batch_size: int = 16,
    check_model: bool = True,
    progress: bool = False,
    **settings: Any,
) -> dict[int, FinetuningShift]:
    """The shift of every `checkpoint-STEP` that a trainer left in a folder, by its step.

    One model at a time is loaded beside a base given as a model. Raises `ModelError` for a folder
    without checkpoints, and for checkpoints loaded in another dtype than base.
    """
    found = checkpoints(folder)
    if not found:
        raise ModelError(f"got {folder} without checkpoints; wanted folders named checkpoint-STEP")
    start = _base(base, bank, prompts, batch_size, check_model, progress, settings)
    shifts = {}
    for step, path in found.items():
        model = load(path, **start.loading)
        _refuse_rounding(start, model)
        after = standing(model, bank, start.prompts, batch_size, progress)
        shifts[step] = start.before.shift_to(after, bank)
    return shifts


def checkpoints(folder: str | PathLike[str]) -> dict[int, Path]:
    """The checkpoints in a folder by their step, in the order of training."""
    named = (
        (re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in Path(folder).glob("*")
    )
    return dict(sorted((int(match[1]), path) for match, path in named if match and path.is_dir()))


def prompt_ids(model: HookedModel, prompts: Chats) -> list[Tensor]:
    """The tokens of each prompt up to where a reply would begin."""
    return [torch.tensor(one.ids[: one.prompt_length]) for one in model.encode(prompts)]


def standing(
    model: HookedModel,
    bank: VectorBank,
    prompts: Chats,
    batch_size: int = 16,
    progress: bool = False,
) -> Standing:
    """The mean in float64 over the prompts, of the model in evaluation mode."""
    model.check(Plan(monitor=bank), check_model=False)
    with evaluating(model.hf):
        acts = model.read(
            prompts,
            sites=bank.sites,
            span="last_prompt_token",
            reduce="last",
            batch_size=batch_size,
            progress=progress,
        )
    assert acts.values is not None
    return Standing(mean=acts.values.double().mean(1), prompts=acts.values.shape[1])


def load(source: str | PathLike[str], **settings: Any) -> HookedModel:
    """A model by name or folder, without a tokenizer; an adapter on top of its base.

    Raises one `ModelError` for what cannot be loaded, and for a folder of checkpoints.
    """
    folder = Path(source)
    found = checkpoints(folder)
    if found and not holds_model(folder):
        raise ModelError(
            f"got {source}, a folder of {len(found)} checkpoints; wanted one model: name one, such "
            f"as {next(reversed(found.values()))}, or use shift_trajectory for all"
        )
    with _loading(source):
        return HookedModel(_weights(folder, source, settings), model_id=str(source))


ADAPTER = "adapter_config.json"


def holds_model(folder: str | PathLike[str]) -> bool:
    """Whether a folder is itself that of a model or an adapter, whatever else lies in it."""
    return any((Path(folder) / name).exists() for name in ("config.json", ADAPTER))


def _weights(folder: Path, source: str | PathLike[str], settings: dict[str, Any]) -> nn.Module:
    from transformers import AutoModelForCausalLM

    if not (folder / ADAPTER).exists():
        plain: nn.Module = AutoModelForCausalLM.from_pretrained(source, **settings)
        return plain
    from peft import AutoPeftModelForCausalLM

    # Not merged: adding the adapter to half-precision weights would round it.
    adapted = AutoPeftModelForCausalLM.from_pretrained(str(source), **settings)
    refuse_virtual_tokens(adapted)
    inside: nn.Module = adapted.get_base_model().eval()
    return inside


def _refuse_shared(base: Source, tuned: Source) -> None:
    """Two hooked models of the same blocks are one model: an adapter acts in both."""
    if not (isinstance(base, HookedModel) and isinstance(tuned, HookedModel)) or base is tuned:
        return
    if find_decoder(base.hf).owner is find_decoder(tuned.hf).owner:
        raise ModelError(
            "got base and tuned model on the same weights, where an adapter acts in both; load "
            "base anew, or give both by name or folder"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Start:
    """What base leaves for the models after it: where it stands, and how they are asked the same.

    `loading` says how they are loaded. Base itself is let go if it was loaded here.
    """

    before: Standing
    prompts: list[Tensor]
    dtype: torch.dtype
    loading: dict[str, Any]


def _base(
    base: Source,
    bank: VectorBank,
    prompts: Chats,
    batch_size: int,
    check_model: bool,
    progress: bool,
    settings: dict[str, Any],
) -> _Start:
    if isinstance(base, HookedModel):
        model = base
    else:
        with _loading(base):
            model = HookedModel.from_pretrained(base, **settings)
    model.check(Plan(monitor=bank), check_model=check_model)
    ids = prompt_ids(model, prompts)
    return _Start(
        before=standing(model, bank, ids, batch_size, progress),
        prompts=ids,
        dtype=model.dtype,
        loading=_in_dtype(model.dtype, settings),
    )


def _refuse_rounding(start: _Start, tuned: HookedModel) -> None:
    if tuned.dtype != start.dtype:
        raise ModelError(
            f"got base in {start.dtype} and the tuned model in {tuned.dtype}, whose rounding would "
            "count as shift; load both in one dtype"
        )


def _in_dtype(dtype: torch.dtype, settings: dict[str, Any]) -> dict[str, Any]:
    """A loader's settings, with a dtype if they leave it open."""
    told = settings.get("dtype", settings.get("torch_dtype", "auto")) != "auto"
    return settings if told else {**settings, "dtype": dtype}


@contextmanager
def _loading(source: str | PathLike[str]) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise ModelError(
            f"got model {str(source)!r}, which cannot be loaded ({error}); wanted a name on the "
            "hub, a folder that transformers can load, or one of a PEFT adapter"
        ) from error
