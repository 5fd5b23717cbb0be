"""Memory: the bytes that watching adds beside the bank while thousands of tokens are made.

On a GPU that is the allocator's own peak. On a CPU the bytes of every live tensor are counted, by
storage, between two tokens, and a CPU has to play both the device and the host: what comes by
`Tensor.cpu()`, or is handed to the monitor by the engine's transport, is the host's, as it would be
beside a GPU. From both, the same count of a generation that nothing watches is subtracted. What
lives only within a step is seen on a GPU alone. The eager engine is counted on a GPU alone, too: on
a CPU its scores stay where they are made, and nothing tells device and host apart.

The scores of the very generation that is counted are held to raw hooks, to its last token.
"""

import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import torch
from jaxtyping import Int
from torch import Tensor, nn

import pvcore as pv
from benches import record
from benches.arms import Task
from benches.arms_checks import ERROR, differing, worst_share
from benches.bare_hooks import residual
from benches.engines import Engine, Name
from benches.random_models import random_prompts, random_vectors, twin
from benches.record import Cell, Check, Record

NAME = "memory"
BOUND = 64.0
MIB = 1 << 20
ERROR_BOUND = 1e-5
LEFT = "on a CPU eager scores stay where they are made, with no host to leave for"


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How much is watched. The width is tiny, because no byte of a score depends on it."""

    vectors: int = 128
    layers: int = 28
    width: int = 4
    batches: tuple[int, ...] = (1, 8, 32)
    engines: tuple[Name, ...] = ("eager", "graph")
    # One, so that a cache of 4096 columns holds it all.
    prompt_tokens: int = 1
    new_tokens: int = 4096
    # How often the bytes are counted; each count walks through every object of the process.
    counts: int = 12
    seed: int = 0


QUICK = Settings(vectors=9, layers=2, batches=(2,), new_tokens=16, counts=2)
Counted = tuple[float, dict[str, Check]]


def measure(settings: Settings, *, command: str) -> Record:
    """Check first, then count. A failed check leaves no figure standing."""
    checks: dict[str, Check] = {}
    cells: dict[str, Cell] = {}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for batch in settings.batches:
        task = task_of(batch, settings, device)
        for name in settings.engines:
            engine = Engine.of(name, device)
            label = f"beside the bank/batch {batch}/{engine}"
            if engine.graph is None and device.type == "cpu":
                cells[label] = Cell(status="not measured", reason=LEFT)
                continue
            bytes_, found = beside_bank(task, engine, settings.counts)
            checks |= {f"batch {batch}, {engine}: {what}": one for what, one in found.items()}
            cells[label] = _cell(bytes_ / MIB)
    wrong = [what for what, one in checks.items() if not one.passed]
    return Record(
        name=NAME,
        command=command,
        commit=record.commit(),
        date=record.today(),
        versions=record.versions(),
        device=record.device(device),
        workload=_workload(settings),
        checks=checks,
        cells=dict.fromkeys(cells, Cell(status="failed", reason=wrong[0])) if wrong else cells,
    )


def _cell(mib: float) -> Cell:
    amount = round(mib, 4)
    return Cell(
        status="measured", p20=amount, p50=amount, p80=amount, n=1, unit="MiB", target=BOUND
    )


def task_of(batch: int, settings: Settings, device: torch.device) -> Task:
    """A model of many layers and next to no width; its cache slides, so steps stay short."""
    from transformers import GenerationConfig, MistralConfig, MistralForCausalLM

    torch.manual_seed(settings.seed)
    config = MistralConfig(
        vocab_size=32,
        hidden_size=settings.width,
        intermediate_size=settings.width,
        num_hidden_layers=settings.layers,
        num_attention_heads=1,
        num_key_value_heads=1,
        sliding_window=8,
        max_position_embeddings=1 << 14,
        pad_token_id=0,
        eos_token_id=None,
        bos_token_id=None,
    )
    plain = MistralForCausalLM(config).to(device).eval()
    plain.generation_config = GenerationConfig(pad_token_id=0)
    traits = [f"trait {number}" for number in range(settings.vectors)]
    return Task(
        plain=plain,
        model=pv.HookedModel(twin(plain), model_id=""),
        vectors=random_vectors(settings.width, range(settings.layers), traits=traits),
        prompts=random_prompts([settings.prompt_tokens] * batch, 32, seed=settings.seed),
        new_tokens=settings.new_tokens,
        layer=0,
        coeff=0.0,
    )


def beside_bank(task: Task, engine: Engine, counts: int) -> Counted:
    """Bytes at the peak of a watched generation beyond those of a plain one, and whether it was
    right: the plain one's tokens, and the projections of raw hooks.
    """
    how: dict[str, Any] = {"engine": engine.graph or "eager"}
    peaks: dict[str, int] = {}
    replies: dict[str, Tensor] = {}
    error = 1.0
    for name in ("plain", "watched"):
        model = pv.HookedModel(twin(task.plain), model_id="")
        steps = task.new_tokens
        census = Census(every=max(steps // counts, 1), device=task.model.device)
        with ExitStack() as stack:
            seen = stack.enter_context(model.monitor(task.bank)) if name == "watched" else None
            stack.enter_context(census.across(seen))
            tokens = replace(task, model=model).armed(None, how | census.settings()).tokens
            peaks[name] = census.peak()
        replies[name] = tokens
        if seen is not None:
            error = reply_error(task, tokens, seen)
        del model, seen
        torch.compiler.reset()
        gc.collect()
    unlike = differing(replies["watched"], replies["plain"])
    return max(peaks["watched"] - peaks["plain"], 1.0), {
        "tokens that watching changed": Check(worst=unlike, bound=0),
        ERROR: Check(worst=error, bound=ERROR_BOUND),
    }


def reply_error(task: Task, tokens: Int[Tensor, "chat step"], seen: pv.Seen) -> float:
    """The worst error of the first and the last vector's projections over the last chat's whole
    reply, beside those of raw hooks in one forward over its tokens.
    """
    ids = torch.cat([task.prompts[-1], tokens[-1]])[None, :-1].to(task.model.device)
    first = len(task.prompts[-1]) - 1
    rows: list[Tensor] = []

    def keep(_module: nn.Module, _args: Any, output: Any) -> None:
        rows.append(residual(output)[0, first:].double().cpu())

    with ExitStack() as stack, torch.no_grad():
        for block in task.blocks:
            stack.callback(block.register_forward_hook(keep).remove)
        task.plain(ids, use_cache=False)
    ends = (0, len(seen.traits) - 1)
    units = task.bank.units.double()[:, list(ends)]
    exact = torch.einsum("lsd,lvd->slv", torch.stack(rows), units)[:, :, None]
    got = torch.stack([seen[seen.traits[at]].steps[..., -1:] for at in ends], dim=-1)
    return worst_share(got, exact)


class Census:
    """The most bytes that live on the device while a generation runs, beyond those before it."""

    def __init__(self, *, every: int, device: torch.device) -> None:
        self._every, self._device = every, device
        self._step = 0
        self._most = 0
        self._start = 0
        self._host: dict[int, Tensor] = {}

    @contextmanager
    def across(self, seen: pv.Seen | None) -> Iterator[None]:
        """While it lasts, what crosses to the host is known."""
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            self._start = torch.cuda.memory_allocated(self._device)
            yield
            return
        self._start = sum(live().values())

        def cpu(tensor: Tensor) -> Tensor:
            return self._cross(tensor)

        with ExitStack() as stack:
            stack.enter_context(patch.object(Tensor, "cpu", cpu))
            if seen is not None:
                receive = seen.receive
                stack.enter_context(patch.object(seen, "receive", self._handed(receive)))
            yield

    def settings(self) -> dict[str, Any]:
        """Settings of `generate` that count now and then."""
        from transformers import LogitsProcessorList

        return {"logits_processor": LogitsProcessorList([self])}

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._step += 1
        if self._step % self._every == 0 and self._device.type == "cpu":
            self._count()
        return scores

    def peak(self) -> int:
        """Bytes at the fullest moment, the end of the generation among them."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) - self._start
        self._count()
        return self._most - self._start

    def _count(self) -> None:
        found = live()
        self._most = max(
            self._most, sum(size for at, size in found.items() if at not in self._host)
        )

    def _cross(self, tensor: Tensor) -> Tensor:
        """A copy, as it would be from a device."""
        copied = tensor.clone()
        self._take(copied)
        return copied

    def _handed(self, receive: Callable[..., None]) -> Callable[..., None]:
        def hand(call: Any, steps: Tensor) -> None:
            self._take(steps)
            receive(call, steps)

        return hand

    def _take(self, tensor: Tensor) -> None:
        # Kept, so that no device tensor can be given the address of a host tensor that went.
        self._host[tensor.untyped_storage().data_ptr()] = tensor


def live() -> Mapping[int, int]:
    """Bytes of every storage that a tensor of this process holds, by its address."""
    found: dict[int, int] = {}
    for one in gc.get_objects():
        # A compiler's own tensors are subclasses, and have no bytes.
        if type(one) not in (Tensor, nn.Parameter) or one.layout is not torch.strided:
            continue
        if one.device.type == "cpu":
            storage = one.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return found


def _workload(settings: Settings) -> dict[str, record.Plain]:
    rows = settings.layers * max(settings.batches) * 3584 * 2
    return {
        "ratio": (
            "device memory that watching adds at its fullest beside the same generation unwatched: "
            "the allocator's peak on a GPU, and on a CPU the live tensors counted between tokens, "
            "without those that went to the host"
        ),
        "vectors": settings.vectors,
        "layers": settings.layers,
        "prompt tokens": settings.prompt_tokens,
        "new tokens": settings.new_tokens,
        "width": settings.width,
        "the newest rows, if 3584 wide in bfloat16": (
            f"{rows / MIB:.1f} MiB more at batch {max(settings.batches)}"
        ),
    }
