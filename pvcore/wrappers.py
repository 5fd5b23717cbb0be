"""What finetuning does to a model, undone for a look: wrappers around it, and its mode."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from pvcore.blocks import find_decoder
from pvcore.errors import HookError, ModelError
from pvcore.model import HookedModel
from pvcore.taps import is_tapped


def as_hooked(model: HookedModel | nn.Module, tokenizer: Any = None) -> HookedModel:
    """The model itself, or the decoder inside wrappers of finetuning, hooked.

    Raises `HookError` for a model that was compiled before it was hooked, and for one whose
    replicas run in threads, where no plan is seen.
    """
    if isinstance(model, HookedModel):
        return model
    inner: Any = model
    compiled = False
    while (wrapped := _inside(inner)) is not None:
        compiled = compiled or hasattr(inner, "_orig_mod")
        inner = wrapped
    if compiled and not is_tapped(find_decoder(inner)):
        raise HookError(
            "got a model that was compiled before it was hooked, which may ignore every hook; "
            "make a HookedModel of the plain model first, then compile"
        )
    return HookedModel(inner, tokenizer)


def refuse_replicas(devices: int) -> None:
    """Raise `HookError` where one process trains on several devices by threads."""
    if devices > 1:
        raise HookError(
            f"got training on {devices} devices by threads of one process (DataParallel), which "
            "see no armed plan; start one process for each device with torchrun, or make one "
            "device visible"
        )


def refuse_virtual_tokens(model: Any) -> None:
    """Raise `ModelError` for prompt and prefix tuning, which leave the decoder as it was."""
    adapters = getattr(model, "peft_config", {})
    for name, config in adapters.items() if isinstance(adapters, dict) else ():
        if getattr(config, "is_prompt_learning", False):
            kind = getattr(config.peft_type, "value", config.peft_type)
            raise ModelError(
                f"got a PEFT adapter {name!r} of kind {kind}, which puts tokens in front and leaves"
                " the decoder as it was; wanted one that changes weights (LoRA and its like)"
            )


def refuse_partitions(model: nn.Module) -> None:
    """Raise `HookError` where DeepSpeed has spread parameters over processes (ZeRO-3)."""
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise HookError(
            "got parameters that DeepSpeed ZeRO-3 spreads over processes, which a forward of one "
            "process alone would wait for without end; use ZeRO-2 or FSDP, or measure the saved "
            "checkpoints with pv.shift_trajectory"
        )


@contextmanager
def evaluating(hf: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; after it every module is in the mode it was in."""
    modes = [(module, module.training) for module in hf.modules()]
    hf.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _inside(model: Any) -> Any:
    """What a wrapper holds; None for a model that wraps nothing."""
    if isinstance(model, nn.DataParallel):
        refuse_replicas(len(model.device_ids))
    if hasattr(model, "_orig_mod"):
        return model._orig_mod
    if hasattr(model, "get_base_model"):
        return model.get_base_model()
    held = None if hasattr(model, "config") else getattr(model, "module", None)
    return held if isinstance(held, nn.Module) else None
