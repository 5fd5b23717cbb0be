"""The peers, each doing the jobs its own documentation offers, in its own words.

A job that a peer has no call for is left out and reported as unsupported. Peers are imported when
their adapter is used: each runs in a process where it is installed.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import pvcore as pv
from benches.peers.subject import (
    KINDS,
    READ_AT_ONCE,
    Arm,
    Kind,
    Peer,
    Reply,
    Subject,
    read_means,
)


class Pvcore:
    def arms(self, subject: Subject) -> Mapping[Kind, Arm]:
        model = pv.HookedModel(subject.fresh(), model_id="")
        bank, prompts = pv.VectorBank(subject.vectors), list(subject.ids)
        vector, aim = subject.vectors[0], [subject.layer]
        add = pv.Add(vector, coeff=subject.coeff, layers=aim, span="all")
        rows = pv.Add(vector, coeff=subject.coeffs.tolist(), layers=aim, span="all")
        every = pv.Add(vector, coeff=subject.coeff, layers=list(range(model.n_layers)), span="all")

        def generating(plan: pv.Plan) -> Arm:
            def run() -> Reply:
                with model.arm(plan) as seen:
                    tokens = torch.stack(model.generate_ids(prompts, **subject.settings))
                traits = seen.traits
                return Reply(
                    tokens=tokens,
                    scores=lambda: torch.stack([seen[trait].steps for trait in traits], dim=-1),
                )

            return run

        return {
            "steer": generating(pv.Plan(add)),
            "everywhere": generating(pv.Plan(every)),
            "watch": generating(pv.Plan(monitor=bank)),
            "both": generating(pv.Plan(add, monitor=bank)),
            "rows": generating(pv.Plan(rows)),
            "extract": lambda: self._read(model, subject),
        }

    def _read(self, model: pv.HookedModel, subject: Subject) -> Reply:
        texts = [ids for batch in subject.samples for ids in batch]
        sites = list(range(model.n_layers - 1))
        found = model.read(texts, sites=sites, span="all", batch_size=READ_AT_ONCE)
        return Reply(tokens=torch.empty(0, 0, dtype=torch.long), means=found.values)


class TorchHook:
    """The same jobs in hooks of plain torch: the bar."""

    def arms(self, subject: Subject) -> Mapping[Kind, Arm]:
        return {kind: subject.hooked(kind, subject.fresh()) for kind in KINDS}


class Nnsight:
    def arms(self, subject: Subject) -> Mapping[Kind, Arm]:
        import nnsight

        model = nnsight.NNsight(subject.fresh())
        turned = subject.units.mT.contiguous()

        def generating(kind: Kind, watching: bool) -> Arm:
            deltas, layers = subject.deltas(kind), model.model.layers

            def run() -> Reply:
                with torch.no_grad():  # noqa: SIM117 - nnsight reads a `with` of its own line
                    with model.trace(subject.ids, fn="generate", **subject.settings) as tracer:
                        made = nnsight.save([])
                        for _ in tracer.iter[: subject.size.new_tokens]:
                            for layer in range(len(turned)):
                                if layer in deltas:
                                    layers[layer].output = layers[layer].output + deltas[layer]
                                if watching:
                                    made.append(layers[layer].output[:, -1] @ turned[layer])
                        out = tracer.result.save()
                tokens = out[:, subject.ids.shape[1] :]
                return Reply(tokens=tokens, scores=lambda: subject.table(made))

            return run

        return {
            "steer": generating("steer", False),
            "everywhere": generating("everywhere", False),
            "watch": generating("watch", True),
            "both": generating("both", True),
            "rows": generating("rows", False),
            "extract": lambda: self._read(model, subject),
        }

    def _read(self, model: Any, subject: Subject) -> Reply:
        """Ended at the last layer read, as its documentation advises."""
        import nnsight

        layers, batches = model.model.layers, []
        with torch.no_grad():
            for ids in subject.samples:
                with model.trace(ids) as tracer:
                    made = nnsight.save([])
                    for layer in range(subject.n_layers - 1):
                        made.append(layers[layer].output.mean(1))
                    tracer.stop()
                batches.append(list(made))
        return read_means(batches)


class TransformerLens:
    def arms(self, subject: Subject) -> Mapping[Kind, Arm]:
        bridge = self._booted(subject)
        turned = subject.units.mT.contiguous()

        def generating(kind: Kind, watching: bool) -> Arm:
            deltas = subject.deltas(kind)

            def run() -> Reply:
                made: list[Tensor] = []
                hooks: list[Any] = []
                for layer in range(len(turned)):
                    name = f"blocks.{layer}.hook_out"
                    if layer in deltas:
                        hooks.append((name, _hook_adding(deltas[layer])))
                    if watching:
                        hooks.append((name, _hook_watching(made, turned[layer])))
                with bridge.hooks(fwd_hooks=hooks):
                    out = bridge.generate(
                        subject.ids,
                        max_new_tokens=subject.size.new_tokens,
                        do_sample=False,
                        stop_at_eos=False,
                        return_type="tokens",
                        verbose=False,
                    )
                tokens = out[:, subject.ids.shape[1] :]
                return Reply(tokens=tokens, scores=lambda: subject.table(made))

            return run

        return {
            "steer": generating("steer", False),
            "everywhere": generating("everywhere", False),
            "watch": generating("watch", True),
            "both": generating("both", True),
            "rows": generating("rows", False),
            "extract": lambda: self._read(bridge, subject),
        }

    @torch.no_grad()
    def _read(self, bridge: Any, subject: Subject) -> Reply:
        names = [f"blocks.{layer}.hook_out" for layer in range(subject.n_layers - 1)]
        batches = []
        for ids in subject.samples:
            _, cache = bridge.run_with_cache(ids, names_filter=names, stop_at_layer=len(names))
            batches.append([cache[name].mean(1) for name in names])
        return read_means(batches)

    def _booted(self, subject: Subject) -> Any:
        from transformer_lens.model_bridge import TransformerBridge

        tokenizer = _numbers(subject.n_vocabulary)
        return TransformerBridge.boot_transformers(
            "random", hf_model=subject.fresh(), tokenizer=tokenizer, device="cpu"
        )


def _hook_adding(delta: Tensor) -> Any:
    return lambda h, hook: h + delta


def _hook_watching(made: list[Tensor], turned: Tensor) -> Any:
    return lambda h, hook: made.append(h[:, -1] @ turned)


def _numbers(size: int) -> Any:
    """A tokenizer that writes ids as numbers: bridges want one, also where they are given ids."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = models.WordLevel({str(number): number for number in range(size)}, unk_token="0")
    special = {"bos_token": "0", "eos_token": "0", "pad_token": "0", "unk_token": "0"}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(words), name_or_path="numbers", add_bos_token=True, **special
    )


class SteeringVectors:
    def arms(self, subject: Subject) -> Mapping[Kind, Arm]:
        from steering_vectors import SteeringVector, record_activations

        hf = subject.fresh()
        raw = {layer: subject.raw(layer) for layer in range(subject.n_layers)}
        one = SteeringVector({subject.layer: subject.raw()}, "decoder_block")
        every = SteeringVector(raw, "decoder_block")
        turned = subject.units.mT.contiguous()

        def run(vector: Any, watching: bool) -> Reply:
            with ExitStack() as stack:
                if vector is not None:
                    stack.enter_context(vector.apply(hf, multiplier=subject.coeff))
                recording: AbstractContextManager[Any] = (
                    record_activations(hf, clone_activations=False) if watching else nullcontext()
                )
                records = stack.enter_context(recording)
                tokens = subject.generate(hf)
            if not watching:
                return Reply(tokens=tokens)
            made = [torch.cat([h[:, -1:] for h in records[k]], 1) @ t for k, t in enumerate(turned)]
            return Reply(tokens=tokens, scores=lambda: torch.stack(made).permute(2, 0, 1, 3))

        return {
            "steer": lambda: run(one, False),
            "everywhere": lambda: run(every, False),
            "watch": lambda: run(None, True),
            "both": lambda: run(one, True),
        }


class Repeng:
    def arms(self, subject: Subject) -> Mapping[Kind, Arm]:
        import numpy

        # repeng 0.4.0 names a type that NumPy 2 has renamed.
        if not hasattr(numpy, "float_"):
            vars(numpy)["float_"] = numpy.float64
        from repeng import ControlModel

        def generating(kind: Kind) -> Arm:
            deltas = subject.deltas(kind)
            model = ControlModel(subject.fresh(), list(deltas))
            model.set_raw_control(deltas)
            return lambda: Reply(tokens=subject.generate(model))

        return {"steer": generating("steer"), "everywhere": generating("everywhere")}


class Pyvene:
    def arms(self, subject: Subject) -> Mapping[Kind, Arm]:
        kinds: tuple[Kind, ...] = ("steer", "everywhere", "rows")
        return {kind: self._arm(subject, subject.deltas(kind)) for kind in kinds}

    def _arm(self, subject: Subject, deltas: Mapping[int, Tensor]) -> Arm:
        import pyvene

        class Adding(pyvene.ConstantSourceIntervention):  # type: ignore[misc]
            """Adds a fixed row to every position."""

            def __init__(self, delta: Tensor) -> None:
                super().__init__(embed_dim=subject.d_model, keep_last_dim=True)
                self.delta = delta

            def forward(self, base: Tensor, *_: Any, **__: Any) -> Tensor:
                return base + self.delta

        places = [
            {"component": f"model.layers[{layer}].output", "intervention": Adding(delta)}
            for layer, delta in deltas.items()
        ]
        model = pyvene.IntervenableModel(places, model=subject.fresh())

        def run() -> Reply:
            given = {"input_ids": subject.ids, "attention_mask": torch.ones_like(subject.ids)}
            _, out = model.generate(
                given, unit_locations=None, intervene_on_prompt=True, **subject.settings
            )
            return Reply(tokens=out[:, subject.ids.shape[1] :])

        return run


class InterpEngine:
    def arms(self, subject: Subject) -> Mapping[Kind, Arm]:
        from interp_engine.model import EagerModel
        from interp_engine.steer import SteerSpec, steer

        hf = subject.fresh()
        model = EagerModel(
            "random", hf_model=hf, tokenizer=_numbers(subject.n_vocabulary), device="cpu"
        )
        every = [
            SteerSpec(vector=subject.raw(layer), layer=layer, coeff=subject.coeff)
            for layer in range(subject.n_layers)
        ]

        def run(specs: Any) -> Reply:
            with steer(model, specs):
                return Reply(tokens=subject.generate(hf))

        return {
            "steer": lambda: run([every[subject.layer]]),
            "everywhere": lambda: run(every),
        }


class ActivationSteerer:
    """The context manager of the paper's scripts, written anew from their description: a hook on
    one block that adds `coeff * vector` to all positions. Their extraction reads one sample at a
    time, all hidden states and all logits."""

    def arms(self, subject: Subject) -> Mapping[Kind, Arm]:
        hf = subject.fresh()
        first = next(hf.parameters())
        vector = subject.raw().to(first.device, first.dtype)

        def run() -> Reply:
            def add(_module: nn.Module, _args: Any, output: Any) -> Any:
                delta = subject.coeff * vector
                if torch.is_tensor(output):
                    return output + delta.to(output.device)
                return (output[0] + delta.to(output[0].device), *output[1:])

            handle = hf.model.layers[subject.layer].register_forward_hook(add)
            try:
                return Reply(tokens=subject.generate(hf))
            finally:
                handle.remove()

        return {"steer": run, "extract": lambda: self._read(hf, subject)}

    @torch.no_grad()
    def _read(self, hf: Any, subject: Subject) -> Reply:
        batches = []
        for ids in (one for batch in subject.samples for one in batch[:, None]):
            # Row 0 are the embeddings; the last row is behind the final norm.
            states = hf(ids, output_hidden_states=True).hidden_states
            batches.append([row.mean(dim=1) for row in states[1 : subject.n_layers]])
        return read_means(batches)


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """An adapter, how tables call it, and what it needs beside pvcore's own environment.

    `unwritten` are jobs that the library may do and the adapter does not ask of it.
    """

    adapter: type[Peer]
    title: str
    packages: tuple[str, ...] = ()
    unwritten: tuple[Kind, ...] = ()


# What steering-vectors and repeng import of scikit-learn, without their old bounds on NumPy.
_LEARN = ("scikit-learn", "scipy", "joblib", "threadpoolctl", "narwhals")
PEERS: Mapping[str, Entry] = {
    "pvcore": Entry(adapter=Pvcore, title="pvcore"),
    "torch-hook": Entry(adapter=TorchHook, title="torch hook"),
    "paper": Entry(adapter=ActivationSteerer, title="the paper's steerer, re-written"),
    "nnsight": Entry(adapter=Nnsight, title="nnsight 0.8.1 trace"),
    "transformer-lens": Entry(adapter=TransformerLens, title="TransformerLens 4.3.0 bridge"),
    "steering-vectors": Entry(
        adapter=SteeringVectors,
        title="steering-vectors 0.12.2",
        packages=("steering-vectors==0.12.2", *_LEARN),
        unwritten=("rows", "extract"),
    ),
    "repeng": Entry(
        adapter=Repeng,
        title="repeng 0.4.0",
        packages=("repeng==0.4.0", "gguf", *_LEARN),
        unwritten=("rows",),
    ),
    "pyvene": Entry(
        adapter=Pyvene,
        title="pyvene 0.1.8",
        packages=("pyvene==0.1.8",),
        unwritten=("watch", "both", "extract"),
    ),
    "interp-engine": Entry(
        adapter=InterpEngine,
        title="interp-engine 1.14.2, eager",
        packages=("interp-engine==1.14.2",),
        unwritten=("watch", "both", "rows", "extract"),
    ),
}
