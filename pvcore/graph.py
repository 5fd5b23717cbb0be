"""The graph engine: transformers' own decode loop with a static cache and a compiled step.

The prompt runs through the ordinary taps. Every decode step after it is one compiled graph in
which the taps trace the armed plan as resident buffers, so that CUDA graphs can replay it. What
compiles is the structure of a plan (which sites act how, on how many vectors), the batch and the
length of the cache; numbers are written in place.
"""

import copy
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import count
from types import FunctionType
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from pvcore.errors import HookError, ModelError, PlanError
from pvcore.frames import Call, Frame
from pvcore.graph_checks import refuse_model, refuse_settings
from pvcore.resident import TRACED, Decode, Met, Resident
from pvcore.sessions import Session, Take, session_on
from pvcore.sites import Site
from pvcore.taps import Taps
from pvcore.transport import Transport

MAX_STRUCTURES = 8
# After 128 captures of one step torch gives up CUDA graphs for it, with a log line only.
MAX_CACHES = 100
_SHORTEST, _STRIDE = 64, 2048
# A cache is kept for shorter replies until it is longer than this times what they need.
_SPARE = 2

Mode = Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Graph:
    """How `engine="graph"` compiles a decode step.

    `backend` and `mode` are those of `torch.compile`; only inductor has modes. By default that is
    inductor with `reduce-overhead` on CUDA, which captures CUDA graphs, and on other devices the
    traced step as it is (`eager`): there inductor takes a minute to save little, so it is yours to
    ask for.
    """

    backend: str | Callable[..., Any] | None = None
    mode: Mode | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.backend, Hashable):
            raise PlanError(
                f"got a backend of type {type(self.backend).__name__} that has no hash; wanted one "
                "whose compiled steps can be found again: give its class __hash__"
            )
        if self.mode is not None and self.mode not in get_args(Mode):
            raise PlanError(f"got mode {self.mode!r}; wanted one of {', '.join(get_args(Mode))}")
        if isinstance(self.backend, str):
            from torch._dynamo import exc, lookup_backend

            try:
                lookup_backend(self.backend)
            except exc.InvalidBackend as error:
                raise PlanError(
                    f"got backend {self.backend!r}, which torch.compile does not know; wanted "
                    "'inductor', 'aot_eager', 'eager' or a function"
                ) from error

    def on(self, device: torch.device) -> "Graph":
        """These settings with the defaults of a device filled in."""
        cuda = device.type == "cuda"
        backend = self.backend or ("inductor" if cuda else "eager")
        if backend != "inductor":
            if self.mode is not None:
                raise PlanError(
                    f"got mode {self.mode!r} for a backend without modes; give it together with "
                    "backend='inductor'"
                )
            return Graph(backend=backend)
        return Graph(backend=backend, mode=self.mode or ("reduce-overhead" if cuda else "default"))

    def compile(self, step: Callable[..., Any]) -> Callable[..., Any]:
        compiled: Callable[..., Any] = torch.compile(
            step, backend=self.backend or "eager", fullgraph=True, dynamic=False, mode=self.mode
        )
        return compiled


Engine = Literal["eager", "graph"]


def check_engine(engine: object) -> Graph | None:
    """The graph engine's settings, or None for eager; `PlanError` for anything else."""
    if isinstance(engine, Graph):
        return engine
    if engine == "graph":
        return Graph()
    if engine != "eager":
        raise PlanError(f"got engine {engine!r}; wanted 'eager', 'graph' or a pv.Graph(...)")
    return None


class _Meeting:
    """A reader that notes where the sites' residuals live while the prompt runs."""

    before = False

    def __init__(self, sites: tuple[Site, ...]) -> None:
        self.sites = sites
        self.met: dict[Site, Met] = {}

    def begin(self, frame: Frame) -> Take:
        return self._meet

    def _meet(self, place: int, h: Tensor) -> None:
        self.met[self.sites[place]] = Met(device=h.device, dtype=h.dtype)

    def end(self, frame: Frame) -> None: ...

    def close(self, call: Call, outcome: Any) -> None: ...


_NAMES = count()


def step_of(hf: Any) -> Callable[..., Any]:
    """A call of the model under a code object of its own.

    The compiler counts and limits its graphs by code object: structures must not share one.
    """

    def step(**inputs: Any) -> Any:
        return hf(**inputs)

    code = step.__code__.replace(co_name=f"decode_step_{next(_NAMES)}")
    return FunctionType(code, step.__globals__, code.co_name, None, step.__closure__)


class _Step:
    """The compiled decode step of one structure, and the buffers it works on."""

    def __init__(self, hf: Any, resident: Resident, graph: Graph) -> None:
        self.resident = resident
        # Not held: a kept step would keep every cache it ever ran on.
        self._cache: Callable[[], Any] = lambda: None
        self._caches = 0
        self._call = graph.compile(step_of(hf))

    def takes(self, cache: Any) -> bool:
        """Whether this step may run on a cache; CUDA graphs are captured anew for another one."""
        if cache is not self._cache():
            self._caches += 1
            self._cache = weakref.ref(cache)
        return self._caches < MAX_CACHES

    def __call__(self, inputs: dict[str, Any]) -> Any:
        from torch._dynamo import exc

        token = TRACED.set(self.resident)
        try:
            output = self._call(**inputs)
        except (exc.TorchDynamoException, exc.FailOnRecompileLimitHit) as error:
            raise ModelError(
                f"got a decode step that does not compile into one graph ({_first_line(error)}); "
                "use engine='eager', or take out what stands in the way"
            ) from error
        finally:
            TRACED.reset(token)
        self.resident.check_trace()
        return output


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


class GraphEngine:
    """Compiled steps and the static cache of one model. One generation at a time uses them."""

    def __init__(self, hf: Any, taps: Taps) -> None:
        self.hf, self.taps = hf, taps
        self._steps: OrderedDict[Hashable, _Step] = OrderedDict()
        self._cache: Any = None
        self._cache_kind: Hashable = None
        self._cache_length = 0

    def generate(
        self,
        graph: Graph,
        call: Call,
        setting: Callable[[str], Any],
        streams: bool,
        **settings: Any,
    ) -> Any:
        """What `hf.generate(**settings)` gives. `setting` looks a setting up as it will be used.

        One that `streams` has every step's scores at once, and waits for its consumer.
        `HookError` where the decode steps did not all run as armed.
        """
        refuse_model(self.hf)
        refuse_settings(setting)
        graph = graph.on(self.hf.device)
        session = session_on(self.taps.key)
        with self.taps.turn.taken("stream" if streams else "generation"), ExitStack() as stack:
            stack.callback(setattr, self.taps, "resident", None)
            meeting = _Meeting(session.expected if session else ())
            if session:
                stack.enter_context(self.taps.armed({}, readers=[meeting]))
            run = _Generation(self, graph, call, session, meeting, paced=streams)
            run.prompt_steps = _chunks(call.mask.shape[1], setting("prefill_chunk_size"))
            output = run.twin().generate(**settings | {"cache_implementation": "static"})
            run.finish(output.sequences.shape[1] - call.mask.shape[1])
        return output

    def step_for(self, graph: Graph, plan: Decode, cache: Any, device: torch.device) -> _Step:
        """The compiled step of a plan's structure, with the plan's numbers in its buffers.

        The `MAX_STRUCTURES` newest are kept; an older one compiles again when it comes back.
        """
        kept = (self._cache_kind, self._cache_length)
        key = (graph, plan.structure(), kept, device, _hooks_on(self.hf))
        step = self._steps.pop(key, None)
        if step is None or not step.takes(cache):
            resident = Resident(self.taps.key, plan, self.taps.decoder.d_model, device)
            step = _Step(self.hf, resident, graph)
            step.takes(cache)
        self._steps[key] = step
        while len(self._steps) > MAX_STRUCTURES:
            self._steps.popitem(last=False)
        step.resident.write(plan)
        return step

    def empty_cache(self, batch: int, columns: int) -> Any:
        """A static cache of at least `columns`, emptied; the same one as long as it fits.

        Only the newest cache is kept: it may fill much of the device. Another one costs a compiled
        step, so that a longer one serves as well, up to twice the length.
        """
        length = room(columns)
        kind = (batch, self.hf.dtype, self.hf.device, torch.is_inference_mode_enabled())
        fits = self._cache_kind == kind and length <= self._cache_length <= _SPARE * length
        if not fits:
            self._cache = _static_cache(self.hf, length)
            self._cache_kind, self._cache_length = kind, length
        self._cache.reset()
        return self._cache


def room(columns: int) -> int:
    """How long a cache for so many columns is made.

    Attention reads all of it at every step, and each length is a step to compile: lengths are
    powers of two and those half-way between, then multiples of 2048.
    """
    if columns > 2 * _STRIDE:
        return -(-columns // _STRIDE) * _STRIDE
    whole = max(_SHORTEST, 1 << (columns - 1).bit_length())
    half_way = whole * 3 // 4
    return half_way if _SHORTEST < columns <= half_way else whole


class _Generation:
    """One `generate` call: which forward is which, and what its decode steps showed."""

    def __init__(
        self,
        engine: GraphEngine,
        graph: Graph,
        call: Call,
        session: Session | None,
        meeting: _Meeting,
        *,
        paced: bool,
    ) -> None:
        self._engine, self._graph, self._call = engine, graph, call
        self._session, self._meeting, self._paced = session, meeting, paced
        # The meeting is armed on top by now; nothing else may come or go until the end.
        self._armed = session_on(engine.taps.key)
        self._step: _Step | None = None
        self._transport: Transport | None = None
        self.prompt_steps = 0
        self._cache: Any = None

    def twin(self) -> Any:
        """A shallow copy of the model whose decode loop calls this generation.

        It shares every module and parameter, and the model itself stays as it is.
        """
        twin = copy.copy(self._engine.hf)
        twin.__dict__.update(
            get_compiled_call=lambda _config: self._forward,
            _valid_auto_compile_criteria=lambda *_: True,
            _prepare_static_cache=self._prepare_cache,
        )
        return twin

    def _prepare_cache(self, **given: Any) -> Any:
        self._cache = self._engine.empty_cache(len(self._call.rows), given["max_cache_len"])
        return self._cache

    def _forward(self, **inputs: Any) -> Any:
        if self.prompt_steps > 0:
            self.prompt_steps -= 1
            return self._engine.hf(**inputs)
        if session_on(self._engine.taps.key) is not self._armed:
            raise HookError(
                "got a plan armed or taken off in the middle of a compiled generation, which goes "
                "by what was armed when it began; use engine='eager', or on_alarm and standby"
            )
        if inputs.get("past_key_values") is not self._cache:
            raise HookError(
                "got a decode step on a cache that engine='graph' did not make; this version of "
                "transformers generates in another way: use engine='eager'"
            )
        if self._step is None or self._transport is None:
            self._begin(inputs["input_ids"].device)
        assert self._step is not None
        assert self._transport is not None
        for move in self._step.resident.dialled:
            move.turn(self._call)
        output = self._step(inputs)
        self._transport.step()
        return output

    def _begin(self, device: torch.device) -> None:
        plan = Decode.of(self._session, self._call, self._meeting.met)
        step = self._engine.step_for(self._graph, plan, self._cache, device)
        self._engine.taps.resident = step.resident
        self._step = step
        watches = step.resident.watches
        self._transport = Transport(self._call, plan.scorers, watches, paced=self._paced)
        for scorer in plan.scorers:
            scorer.settle(self._call, self._transport.finish)

    def finish(self, n_tokens: int) -> None:
        """Hand the scores over; `HookError` unless every token after the first had its step."""
        made = self._transport.made if self._transport else 0
        if self._transport is not None and self._step is not None:
            self._transport.finish()
            ran = int(self._step.resident.step)
            if ran != made:
                raise HookError(f"got {ran} compiled decode steps on the device; launched {made}")
        if made < n_tokens - 1:
            raise HookError(
                f"got {n_tokens} tokens from {made} compiled decode steps; this model's generate "
                "does not run them: use engine='eager'"
            )


def _hooks_on(hf: Any) -> Hashable:
    """Which hooks a step would be traced with: the compiler does not look at them again."""
    return tuple(
        (name, *module._forward_pre_hooks, None, *module._forward_hooks)
        for name, module in hf.named_modules()
        if module._forward_pre_hooks or module._forward_hooks
    )


def _chunks(columns: int, chunk: int | None) -> int:
    """How many forwards of a prompt come through the decode step's door: those of its chunks."""
    return 0 if chunk is None else -(-columns // chunk)


def _static_cache(hf: Any, length: int) -> Any:
    """A static cache in which sliding windows keep every position.

    Their own layers count tokens in a Python number, for which each step would compile anew; the
    mask does the sliding here.
    """
    from transformers import StaticCache
    from transformers.cache_utils import StaticLayer, StaticSlidingWindowLayer

    cache = StaticCache(config=hf.config.get_text_config(decoder=True), max_cache_len=length)
    cache.layers = [
        StaticLayer(max_cache_len=length) if type(layer) is StaticSlidingWindowLayer else layer
        for layer in cache.layers
    ]
    if not cache.is_compileable:
        raise ModelError(
            f"got a {type(hf).__name__}, whose cache cannot be compiled; use engine='eager'"
        )
    return cache
