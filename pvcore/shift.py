"""Finetuning shift: how far training moved a model along persona vectors (paper, section 4.2)."""

from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from pvcore.chats import Chats
from pvcore.errors import VectorError
from pvcore.model import HookedModel
from pvcore.plan import Plan
from pvcore.sites import Site
from pvcore.vectors import VectorBank

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


def finetuning_shift(
    base: Source,
    tuned: Source,
    bank: VectorBank,
    prompts: Chats,
    *,
    batch_size: int = 16,
    check_model: bool = True,
    progress: bool = False,
) -> FinetuningShift:
    """How far `tuned` stands from `base` along each vector, on the same prompts.

    A model given by name or folder is loaded when its turn comes and let go after it, so that the
    two need not fit into memory together. Prompts end where a reply would begin.
    """
    means, count = [], 0
    for source in (base, tuned):
        mean, count = _mean(source, bank, prompts, batch_size, check_model, progress)
        means.append(mean)
    moved = means[1] - means[0]
    along = torch.einsum("sd,skd->sk", moved, bank.units.double())
    shifts = {trait: along[:, k] for k, trait in enumerate(bank.traits)}
    return FinetuningShift(sites=bank.sites, shifts=shifts, prompts=count)


def _mean(
    source: Source,
    bank: VectorBank,
    prompts: Chats,
    batch_size: int,
    check_model: bool,
    progress: bool,
) -> tuple[Float[Tensor, "site d_model"], int]:
    model = source if isinstance(source, HookedModel) else load(source)
    model.check(Plan(monitor=bank), check_model=check_model)
    acts = model.read(
        prompts,
        sites=bank.sites,
        span="last_prompt_token",
        reduce="last",
        batch_size=batch_size,
        progress=progress,
    )
    assert acts.values is not None
    return acts.values.double().mean(1), acts.values.shape[1]


def load(source: str | PathLike[str]) -> HookedModel:
    """A model by name or folder; a folder of a PEFT adapter is loaded on top of its base."""
    if (Path(source) / "adapter_config.json").exists():
        from peft import AutoPeftModelForCausalLM
        from transformers import AutoTokenizer

        adapted = AutoPeftModelForCausalLM.from_pretrained(str(source))
        merged = adapted.merge_and_unload()
        name = str(adapted.peft_config["default"].base_model_name_or_path)
        return HookedModel(merged, AutoTokenizer.from_pretrained(name), model_id=name)
    return HookedModel.from_pretrained(source)
