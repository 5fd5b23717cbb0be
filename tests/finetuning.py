"""Finetuning for tests: subjects to train, prevention written out by hand, trainers."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import pvcore as pv
from tests.families import FAMILIES, build

COEFF = 1.5
CHECKPOINTING = {"off": None, "reentrant": True, "without reentry": False}


def vector(*layers: int) -> pv.PersonaVector:
    directions = torch.randn(len(layers), 64, generator=torch.Generator().manual_seed(5))
    sites = [pv.resid_post(layer) for layer in layers]
    return pv.PersonaVector(trait="evil", sites=sites, directions=directions, model_id="")


def delta(evil: pv.PersonaVector, layer: int, coeff: float = COEFF) -> Tensor:
    return coeff * evil.direction(pv.resid_post(layer))


def ids(seed: int = 0, rows: int = 2) -> Tensor:
    return torch.randint(3, 128, (rows, 9), generator=torch.Generator().manual_seed(seed))


def with_lora(hf: Any, *, fan_in_fan_out: bool = False, **variant: bool) -> Any:
    """PEFT's wrapper, whose adapters already do something."""
    import peft

    torch.manual_seed(3)
    settings = peft.LoraConfig(
        r=4,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
        fan_in_fan_out=fan_in_fan_out,
        **variant,
    )
    wrapped = peft.get_peft_model(hf, settings)
    for name, weight in wrapped.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.1)
    return wrapped


def subject(
    name: str, checkpointing: str = "off", *, lora: bool = False, **variant: bool
) -> tuple[Any, Any]:
    """A model in training mode and what is called: the model, or PEFT's wrapper around it."""
    hf = build(name).train()
    called = with_lora(hf, fan_in_fan_out=name == "gpt2", **variant) if lora else hf
    reentrant = CHECKPOINTING[checkpointing]
    if reentrant is not None:
        hf.gradient_checkpointing_enable({"use_reentrant": reentrant})
        hf.enable_input_require_grads()
    return hf, called


@contextmanager
def adding(hf: Any, name: str, deltas: dict[int, Tensor]) -> Iterator[None]:
    """The same by hand: blocks whose forward adds a constant."""
    blocks = hf.get_submodule(FAMILIES[name].blocks)

    def wrap(block: Any, added: Tensor) -> Callable[..., Any]:
        plain = block.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            output = plain(*args, **kwargs)
            if isinstance(output, tuple):
                return (output[0] + added, *output[1:])
            return output + added

        return forward

    for layer, added in deltas.items():
        blocks[layer].forward = wrap(blocks[layer], added)
    try:
        yield
    finally:
        for layer in deltas:
            del blocks[layer].forward


def gradients(called: Any, seed: int = 0) -> dict[str, Tensor]:
    called.zero_grad()
    called(input_ids=ids(seed), labels=ids(seed), use_cache=False).loss.backward()
    return {n: p.grad.clone() for n, p in called.named_parameters() if p.grad is not None}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


class Rows(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Sixteen rows of random tokens."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = ids(index)[0]
        return {"input_ids": row, "labels": row}


def trainer(hf: Any, folder: Any, *callbacks: Any, **settings: Any) -> Any:
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=4,
        per_device_train_batch_size=2,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        seed=0,
        dataloader_pin_memory=False,
        **{"save_strategy": "no", "logging_steps": 1, "learning_rate": 1e-2} | settings,
    )
    return transformers.Trainer(
        model=hf,
        args=arguments,
        train_dataset=Rows(),
        eval_dataset=Rows(),
        callbacks=list(callbacks),
    )


def losses(made: Any) -> list[float]:
    return [entry["loss"] for entry in made.state.log_history if "loss" in entry]
