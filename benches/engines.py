"""The ways transformers and pvcore generate: eager, compiled, and as the graph engine does it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

import pvcore as pv
from benches.arms import Reply, Run, Task
from pvcore.graph import Mode, room, step_of

Name = Literal["eager", "compiled", "graph"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """One way to generate; `graph` holds the settings of pvcore's engine, None for eager."""

    name: Name
    graph: pv.Graph | None

    @classmethod
    def of(cls, name: Name, device: torch.device, *, backend: str = "inductor") -> "Engine":
        """`compiled` is `torch.compile` with a backend; `graph` is `engine="graph"` as it comes:
        CUDA graphs on a GPU, and the traced step as it is on a CPU.
        """
        if name == "eager":
            return cls(name=name, graph=None)
        if name == "graph":
            return cls(name=name, graph=pv.Graph().on(device))
        mode: Mode | None = "default" if backend == "inductor" else None
        return cls(name=name, graph=pv.Graph(backend=backend, mode=mode))

    def __str__(self) -> str:
        """What it is, for a table."""
        if self.graph is None:
            return "eager"
        if self.name == "compiled":
            return f"compiled ({self.graph.backend})"
        return "CUDA graphs" if self.graph.mode == "reduce-overhead" else "graph (traced step)"


def plain_run(task: Task, hf: Any, engine: Engine) -> Run:
    """transformers' own generation on a model, by the same means as pvcore's engine."""
    if engine.graph is None:
        return lambda **extra: task.unhooked(hf, extra)
    return compiled_run(task, hf, engine.graph)


def compiled_run(task: Task, hf: Any, graph: pv.Graph) -> Run:
    """transformers' own compiled generation on a static cache of the length the engine takes.

    transformers itself takes a cache as long as prompt and reply. Attention reads a cache whole,
    so that its length is part of what a step costs.
    """
    from transformers import StaticCache

    columns = task.given["input_ids"].shape[1] + task.new_tokens - 1
    cache = StaticCache(config=hf.config, max_cache_len=room(columns))
    how = _compiled_alone(hf, graph)

    def run(**extra: Any) -> Reply:
        cache.reset()
        given: Mapping[str, Any] = {"past_key_values": cache, "compile_config": how}
        return Reply(tokens=task.plainly(hf, {**given, **extra}))

    return run


def own_cache_run(task: Task, hf: Any, graph: pv.Graph) -> Run:
    """The same on the cache that transformers makes by itself."""
    given = {"cache_implementation": "static", "compile_config": _compiled_alone(hf, graph)}
    return lambda **extra: Reply(tokens=task.plainly(hf, {**given, **extra}))


def _compiled_alone(hf: Any, graph: pv.Graph) -> Any:
    """Have a model's decode step compiled under a code object of its own; the settings for it.

    Models of one class share their compiled steps otherwise, and those of a model without hooks
    serve one with hooks: what is in a hook would never be measured.
    """
    from transformers import CompileConfig

    how = CompileConfig(backend=graph.backend, fullgraph=True, mode=_mode(graph))
    # transformers compiles on accelerators only, unless told so.
    how._compile_all_devices = True
    step = torch.compile(step_of(hf), **how.to_dict())
    hf.get_compiled_call = lambda _config: step
    return how


def graphs_of(run: Run, **extra: Any) -> tuple[Reply, int]:
    """A reply, and how many graphs were compiled for it."""
    from torch._dynamo.utils import counters

    before = counters["stats"]["unique_graphs"]
    reply = run(**extra)
    return reply, counters["stats"]["unique_graphs"] - before


def _mode(graph: pv.Graph) -> str | None:
    return None if graph.mode == "default" else graph.mode
