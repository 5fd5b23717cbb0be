"""Tracing: nnsight's own traces, with the residual stream under the names of sites.

nnsight stands in front of every module's forward. Here it does so only while a traced block runs:
before and after, the model is as it was. This is the only module that imports nnsight, and only
when the first trace is opened, because the import changes the process (`.save()` on every object).
"""

import copy
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pvcore.blocks import Decoder
from pvcore.chats import encode_all
from pvcore.errors import TraceError
from pvcore.sites import Site, SiteKind

Rows = Float[Tensor, "batch pos d_model"]

# What nnsight writes into a module: its controller, and what the controller keeps.
_MARKS = ("forward", "__nnsight__")
_ABSENT = object()
# They would take the run elsewhere, away from the lock and from what restores the modules.
_REFUSED = ("backend", "remote", "trace", "tracer_cls")


class _Turn:
    """Who traces a decoder: one thread at a time, because nnsight allows no more."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._thread: int | None = None

    def is_mine(self) -> bool:
        """Whether this thread is inside a traced block."""
        return self._thread == threading.get_ident()

    @contextmanager
    def taken(self) -> Iterator[None]:
        if not self._lock.acquire(blocking=False):
            who = "the same block" if self.is_mine() else "another thread"
            raise TraceError(
                f"got a trace of a model that {who} is tracing; wanted one trace at a time: "
                "finish that one first, or trace a copy of the model"
            )
        self._thread = threading.get_ident()
        try:
            yield
        finally:
            self._thread = None
            self._lock.release()


# By the module that runs the blocks, so that two HookedModels of one model share their turn.
_TURNS: WeakKeyDictionary[nn.Module, _Turn] = WeakKeyDictionary()


class Tracing:
    """Opens traces of one model and finds sites inside them."""

    def __init__(self, hf: nn.Module, decoder: Decoder, is_armed: Callable[[], bool]) -> None:
        self._hf, self._decoder, self._is_armed = hf, decoder, is_armed
        self._turn = _TURNS.setdefault(decoder.owner, _Turn())
        self._root: Any = None
        self._tokenizer: Any = None
        self._modules: list[nn.Module] = []
        self._controllers: dict[nn.Module, tuple[Any, dict[str, Any]]] = {}

    def open(
        self,
        tokenizer: Any,
        inputs: tuple[Any, ...],
        settings: dict[str, Any],
        max_length: int | None,
    ) -> Any:
        """nnsight's tracer of one run over the inputs; nothing runs before its `with` block."""
        for name in _REFUSED:
            if name in settings:
                raise TraceError(
                    f"got {name}= for a trace; pvcore traces run here and now. Wrap the model in "
                    "nnsight's TransformersModel yourself to use it"
                )
        if next(self._hf.parameters()).is_meta:
            raise TraceError(
                "got a model whose first weights are offloaded, where nnsight would send the "
                "inputs; load it onto a device, or use model.read(...) and model.arm(...)"
            )
        modules = list(self._hf.modules())
        if self._root is None or modules != self._modules or tokenizer is not self._tokenizer:
            with self._turn.taken(), _restored(modules):
                self._root = _wrapped(self._hf, tokenizer)
            self._modules, self._tokenizer, self._controllers = modules, tokenizer, {}
        self._root._encode = partial(_token_ids, tokenizer, max_length)
        return self._root.trace(*inputs, backend=self._run, **settings)

    def _run(self, tracer: Any) -> None:
        """What nnsight calls in place of the user's block, which runs in here with the model."""
        if self._is_armed():
            raise TraceError(
                "got a trace inside an armed plan, where nnsight would show block outputs from "
                "before the plan acts; trace outside the `with model.arm(...)` block, and patch "
                "in the trace itself: model.resid_post[20] = model.resid_post[20] + delta"
            )
        with self._turn.taken(), _restored(self._modules):
            self._instrument()
            tracer.execute(tracer.info.code)

    def _instrument(self) -> None:
        """Put nnsight's controllers on the modules: the last trace's, where they still fit."""
        interleaver = self._root.interleaver
        for module in self._modules:
            attributes = module.__dict__
            own = attributes.get("forward")
            known = self._controllers.get(module)
            if known is not None and known[0] is own:
                attributes.update(known[1])
            else:
                interleaver.instrument(interleaver.envoys[id(module)])
                written = {mark: attributes[mark] for mark in _MARKS}
                self._controllers[module] = own, written

    def refuse_inside(self, what: str) -> None:
        """Raise `TraceError` where this thread is inside a traced block of the model."""
        if self._turn.is_mine():
            raise TraceError(
                f"got {what} inside a trace of the same model, whose forward it would mix with; "
                "call it before or after the `with` block"
            )

    def read(self, site: Site) -> Rows:
        """The residual at a site, inside a traced block."""
        _, _, h = self._served(site)
        return h

    def write(self, site: Site, new: object) -> None:
        """Replace the residual at a site, inside a traced block."""
        envoy, served, h = self._served(site)
        value = _like(site, new, h)
        if site.kind == "resid_mid":
            # The block carries this very tensor on as its residual branch: a replaced input
            # would change only what the MLP sees.
            h.copy_(value)
        elif site.kind == "resid_post":
            envoy.output = value if torch.is_tensor(served) else (value, *served[1:])
        else:
            args, kwargs = served
            given = {**kwargs, "hidden_states": value}
            envoy.inputs = ((value, *args[1:]), kwargs) if args else (args, given)

    def _served(self, site: Site) -> tuple[Any, Any, Rows]:
        """nnsight's envoy of a site, what it serves there, and the residual in it."""
        self._decoder.require(site)
        if self._root is None or not self._root.interleaver.interleaving:
            raise TraceError(
                f"got {site} outside a traced run; use it in the block of `with model.trace(...)` "
                "(with several inputs, of `with tr.invoke(...)`), or call model.read(...)"
            )
        module = self._decoder.blocks[site.layer]
        if site.kind == "resid_mid":
            module = self._decoder.mid_norm(site.layer)
        envoy = self._root.interleaver.envoys[id(module)]
        if site.kind == "resid_post":
            served = envoy.output
            h = served if torch.is_tensor(served) else served[0]
        else:
            served = envoy.inputs
            h = served[0][0] if served[0] else served[1]["hidden_states"]
        if h.ndim != 3:
            raise TraceError(
                f"got {site} of shape {list(h.shape)}; this {self._decoder.family} model flattens "
                "batch and positions there, so rows cannot be told apart: use resid_pre or "
                "resid_post, or model.read(...)"
            )
        return envoy, served, h


class Residuals:
    """Sites of one kind by layer, in the block of a trace: `model.resid_post[20]`.

    Reading gives `[batch, pos, d_model]`, assigning replaces it for the rest of the forward. As
    everywhere in nnsight a read tensor is the model's own: clone what must outlive a write. Sites
    are visited in the order of the forward, and in generation once a step with `tr.iter`.
    Raises `SiteError` for a site the model lacks, `TraceError` outside a trace and for a value
    of another shape, dtype or device.
    """

    __slots__ = ("_kind", "_tracing")

    def __init__(self, kind: SiteKind, tracing: Tracing) -> None:
        self._kind, self._tracing = kind, tracing

    def __repr__(self) -> str:
        return f"{self._kind}[layer], readable and assignable in the block of a trace"

    def __getitem__(self, layer: int) -> Rows:
        return self._tracing.read(Site(self._kind, layer))

    def __setitem__(self, layer: int, value: object) -> None:
        self._tracing.write(Site(self._kind, layer), value)


def _like(site: Site, value: object, h: Rows) -> Rows:
    """The value, or `TraceError` where it would not pass for the residual."""
    if not isinstance(value, Tensor):
        raise TraceError(f"got {type(value).__name__} for {site}; wanted a tensor {list(h.shape)}")
    got, wanted = ((list(t.shape), t.dtype, t.device) for t in (value, h))
    if got != wanted:
        raise TraceError(
            f"got {got[0]} {got[1]} on {got[2]} for {site}; wanted {wanted[0]} {wanted[1]} on "
            f"{wanted[2]}: write `h + delta.to(h)`, which keeps all three"
        )
    return value


@contextmanager
def _restored(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Leave the modules' own attributes as they were, whatever forward somebody else had put in."""
    before = [(m.__dict__, [m.__dict__.get(mark, _ABSENT) for mark in _MARKS]) for m in modules]
    try:
        yield
    finally:
        for attributes, values in before:
            for mark, value in zip(_MARKS, values, strict=True):
                if value is _ABSENT:
                    attributes.pop(mark, None)
                else:
                    attributes[mark] = value


def _token_ids(tokenizer: Any, max_length: int | None, chats: Any, fn: Any) -> Any:
    """Chats as the ids every other call gives them; model inputs as they are."""
    if isinstance(chats, Mapping) or (isinstance(chats, Tensor) and chats.ndim != 1):
        return chats
    encoded = encode_all(tokenizer, chats, max_length=max_length, for_generation=fn == "generate")
    ids = [list(chat.ids) for chat in encoded]
    if tokenizer is not None:
        return ids
    if len({len(row) for row in ids}) > 1:
        raise TraceError(
            "got prompts of different lengths and no tokenizer to pad them; wanted equal lengths, "
            "or input_ids= and attention_mask= of a padded batch"
        )
    return torch.tensor(ids)


def _wrapped(hf: nn.Module, tokenizer: Any) -> Any:
    """nnsight's tree over a model. It changes the tokenizer it is given, which is a copy."""
    plain, chats, interleaver = _classes()
    if tokenizer is None:
        return plain(hf, interleaver=interleaver())
    # Left to itself, the pipeline inside moves the model to the first GPU it finds.
    here = {} if getattr(hf, "hf_device_map", None) is not None else {"device": -1}
    return chats(
        hf,
        tokenizer=copy.deepcopy(tokenizer),
        task="text-generation",
        interleaver=interleaver(),
        **here,
    )


@cache
def _classes() -> tuple[Any, Any, Any]:
    """nnsight's wrappers with pvcore's token ids, and an interleaver that serves one thread."""
    nnsight = _nnsight()
    from nnsight.intervention.interleaver import Interleaver

    class OneThread(Interleaver):  # type: ignore[misc]
        """Other threads pass through the same modules, which then do nothing but their own work."""

        _thread: int | None = None

        @property
        def interleaving(self) -> bool:
            return self._thread == threading.get_ident()

        @interleaving.setter
        def interleaving(self, running: bool) -> None:
            self._thread = threading.get_ident() if running else None

    def of_chats(base: Any) -> Any:
        def _batch(self: Any, invokes: list[Any], fn: Any) -> Any:
            ids = [(tuple(self._encode(x, fn) for x in given), kw) for given, kw in invokes]
            return base._batch(self, ids, fn)

        return type(base.__name__, (base,), {"_batch": _batch})

    return of_chats(nnsight.NNsight), of_chats(nnsight.TransformersModel), OneThread


def _nnsight() -> Any:
    """nnsight, which takes a `-v` meant for the host program as a wish for its own debug mode."""
    given, sys.argv = sys.argv, sys.argv[:1]
    try:
        import nnsight
    finally:
        sys.argv = given
    return nnsight
