"""Fused norms: the mode in which a block's last add, the steering and the next norm are one op.

The one exception to the rule that nothing is put in a model's way, opt-in and taken back: while it
is on, calls of blocks, MLPs and norms go through the slot of `Module.__call__` that lanes sit in.
No module, `forward`, hook or `state_dict` key changes.
"""

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from contextvars import Context, ContextVar
from typing import Any, no_type_check
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from pvcore import lanes
from pvcore.blocks import Decoder, find_decoder, input_device
from pvcore.errors import HookError, ModelError
from pvcore.fused_sites import UNDER, FusedNorms, FusedSite, Late, Made, Under, is_changed
from pvcore.model import HookedModel
from pvcore.rms_norms import as_rms_norm
from pvcore.runs import RUN
from pvcore.taps import Taps, taps_of
from pvcore_kernels.reference import exact

_SLOT = "_compiled_call_impl"
# Of a forward both ways, in roundings of the model's dtype: a few a block, where a kernel sums the
# squares of a row in another order.
PROBE_BOUND = 64

# The decoders for which this context has the mode on.
_ON: ContextVar[Mapping[int, FusedNorms] | None] = ContextVar("pvcore_fused", default=None)


@no_type_check
def _block_lane(site, ordinary):
    block, key = site.block, site.key

    def lane(*args, **kwargs):
        if is_dynamo_compiling():
            return ordinary(*args, **kwargs)
        on = _ON.get()
        if on is None or key not in on:
            return ordinary(*args, **kwargs)
        run, post = RUN.get(), site.post()
        run = run if run is not None and run.owner == key else None
        if post is None or not site.is_free(run):
            UNDER.set(None)
            return ordinary(*args, **kwargs)
        for pre in tuple(block._forward_pre_hooks.values()):
            args, kwargs = pre(block, args, kwargs) or (args, kwargs)
        under = Under(site, _handed_on(), run, on[key])
        return _finish(under, post, args, _run(under, args, kwargs))

    return lane


def _handed_on() -> Made | None:
    """What the block before made, kept by nobody else, so that it goes once it is used."""
    before = UNDER.get()
    UNDER.set(None)
    return None if before is None else before.made


@no_type_check
def _run(under, args, kwargs):
    UNDER.set(under)
    try:
        return under.site.block.forward(*args, **kwargs)
    finally:
        under.closed, under.given = True, None
        UNDER.set(None)


@no_type_check
def _finish(under, post, args, output):
    """What the block's tap does: all of it, or only to read where the op has steered."""
    if under.made is not None and under.made.holds(output):
        if under.run is not None:
            under.run.fire(under.site.depth, output, patched=True)
        UNDER.set(under)
        return output
    if under.steered:
        raise HookError(
            f"got block {under.site.layer} doing more in this forward than adding its MLP's output "
            "to the residual, after the steering was in it; run it without fused_norms"
        )
    moved = post(under.site.block, args, output)
    return output if moved is None else moved


@no_type_check
def _mlp_lane(site):
    mlp = site.mlp

    def lane(*args, **kwargs):
        if is_dynamo_compiling():
            return mlp._call_impl(*args, **kwargs)
        under = UNDER.get()
        x = mlp._call_impl(*args, **kwargs)
        if under is None or under.site is not site or type(x) is not Tensor or is_changed(mlp):
            return x
        UNDER.set(under)  # a model inside this one may have left its own
        late = x.as_subclass(Late)
        late.under = under
        return late

    return lane


@no_type_check
def _norm_lane(site):
    norm = site.norm.module

    def lane(*args, **kwargs):
        if is_dynamo_compiling():
            return norm._call_impl(*args, **kwargs)
        under = UNDER.get()
        # Inside the next block, or behind the last one.
        made = None if under is None else under.made if under.closed else under.given
        if made is None or made.site is not site or len(args) != 1 or not made.holds(args[0]):
            return norm._call_impl(*args, **kwargs)
        under.tally.norms += 1
        under.given = None  # whoever norms these rows again has it done as ever
        if under.closed:
            UNDER.set(None)
        return made.normed

    return lane


class _Lanes:
    """The lanes of one decoder, in the slots while anybody has the mode on."""

    def __init__(self, decoder: Decoder, taps: Taps) -> None:
        self.users, self._undo = 0, ExitStack()
        self._lanes: list[tuple[nn.Module, Callable[..., Any]]] = []
        for site in _sites(decoder, taps):
            ordinary = site.block._compiled_call_impl or site.block._call_impl
            self._lanes += [
                (site.block, _block_lane(site, ordinary)),
                (site.mlp, _mlp_lane(site)),
                (site.norm.module, _norm_lane(site)),
            ]

    def put_on(self) -> None:
        for module, lane in self._lanes:
            setattr(lane, lanes.MARK, True)
            self._undo.callback(_take_off, module, lane, module.__dict__.get(_SLOT))
            setattr(module, _SLOT, lane)

    def take_off(self) -> None:
        self._undo.close()


def _take_off(module: nn.Module, lane: Callable[..., Any], before: Any) -> None:
    if module.__dict__.get(_SLOT) is not lane:
        return  # somebody compiled the module meanwhile, or tapped it anew
    if before is None:
        del module.__dict__[_SLOT]
    else:
        setattr(module, _SLOT, before)


def _sites(decoder: Decoder, taps: Taps) -> list[FusedSite]:
    """Every block with the norm behind it; `ModelError` where the op could not stand in."""
    last = getattr(decoder.owner, "norm", None)
    norms = [*(getattr(block, "input_layernorm", None) for block in decoder.blocks[1:]), last]
    sites = []
    for layer, (block, norm) in enumerate(zip(decoder.blocks, norms, strict=True)):
        mlp = getattr(block, "mlp", None)
        if not isinstance(mlp, nn.Module) or not isinstance(norm, nn.Module):
            raise ModelError(
                f"got a {decoder.family} model whose block {layer} has no `mlp`, or no norm behind "
                "it called `input_layernorm` or `norm`; run it without fused_norms"
            )
        for name, module in (("block", block), ("MLP", mlp), ("norm", norm)):
            _refuse(f"the {name} of layer {layer}", module, taps)
        as_norm = as_rms_norm(norm, f"the norm behind block {layer}")
        sites.append(FusedSite(taps, layer, mlp, as_norm))
    return sites


def _refuse(what: str, module: nn.Module, taps: Taps) -> None:
    if module.training:
        raise ModelError(f"got {what} in training mode; call .eval() on the model first")
    if is_changed(module, taps) or lanes.is_compiled(module):
        raise ModelError(
            f"got {what} with hooks, a forward or a compiled call of somebody else's (a trace, "
            "accelerate, PEFT and output_hidden_states leave some); take them off, or run the "
            "model without fused_norms"
        )


_LOCK = threading.Lock()
_LANES: WeakKeyDictionary[nn.Module, _Lanes] = WeakKeyDictionary()


@contextmanager
def fused_norms(model: HookedModel) -> Iterator[FusedNorms]:
    """Do each block's last add, the steering after it and the next RMSNorm in one op.

    For models whose blocks end in `residual + mlp(...)` and whose next RMSNorm reads that sum
    (llama, qwen2, qwen3, mistral, gemma, phi3, mixtral and what is built alike), found out from the
    modules and from forwards on random rows. Any other is one `ModelError` and left as it was. On
    CUDA the op is one launch; on a CPU it is plain torch, bit for bit what the model computes, and
    no faster.

    The mode is this thread's alone. Results stay what they are under every plan. What the op does
    not do goes the ordinary way: a site with an ablation, a cap, a condition or several plans,
    forwards with gradients, in training mode, under autocast or in a trace, and blocks with
    somebody else's hooks. So do decode steps of `engine="graph"`, whose compiler fuses these sums
    by itself; a step compiles once more inside. Scores are made as ever. Given is a count of the
    norms that the op made. Leaving the block takes everything back, whatever raised.
    """
    decoder = find_decoder(model.hf)
    taps = taps_of(decoder)
    with ExitStack() as undo:
        _put_on(decoder, taps)
        undo.callback(_leave, decoder.owner)
        Context().run(_probe, decoder, taps.key)
        tally, outer = FusedNorms(), (_ON.get() or {}).get(taps.key)
        _switch(taps.key, tally)
        undo.callback(_switch, taps.key, outer)
        yield tally


def _put_on(decoder: Decoder, taps: Taps) -> None:
    with _LOCK:
        found = _LANES.get(decoder.owner)
        if found is None:
            found = _Lanes(decoder, taps)
            found.put_on()
            _LANES[decoder.owner] = found
        found.users += 1


def _leave(owner: nn.Module) -> None:
    with _LOCK:
        found = _LANES[owner]
        found.users -= 1
        if not found.users:
            # Not kept: it holds on to the model it is found by.
            del _LANES[owner]
            found.take_off()


def _switch(key: int, tally: FusedNorms | None) -> None:
    others = {one: held for one, held in (_ON.get() or {}).items() if one != key}
    _ON.set((others if tally is None else {**others, key: tally}) or None)
    UNDER.set(None)


@torch.inference_mode(False)
@torch.no_grad()
def _probe(decoder: Decoder, key: int) -> None:
    """Run the blocks on random rows both ways; `ModelError` unless the op made every norm."""
    owner: Any = decoder.owner
    root: Any = decoder.root
    dtype = root.get_input_embeddings().weight.dtype
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(2, 4, decoder.d_model, generator=generator).to(input_device(root), dtype)
    tally = FusedNorms()
    with exact(rows.device):
        wanted = owner(inputs_embeds=rows, use_cache=False)[0]
        _switch(key, tally)
        got = owner(inputs_embeds=rows, use_cache=False)[0]
    error = float((got - wanted).float().norm() / wanted.float().norm())
    if tally.norms != decoder.n_layers or not error <= PROBE_BOUND * torch.finfo(got.dtype).eps:
        raise ModelError(
            f"got a {decoder.family} model in which the op could make {tally.norms} of the "
            f"{decoder.n_layers} norms behind its blocks (error {error:.1e}); wanted blocks that "
            "end in residual + mlp(...) and norms that read just that: run it without fused_norms"
        )
