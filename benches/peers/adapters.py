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
from benches.peers.subject import Arm, Kind, Peer, Reply, Subject
from pvcore.blocks import find_decoder


class Pvcore:
    def arms(self, subject: Subject) -> Mapping[Kind, Arm]:
        model = pv.HookedModel(subject.fresh(), model_id="")
        bank, prompts = pv.VectorBank(subject.vectors), list(subject.ids)
        aim: dict[str, Any] = {"layers": [subject.layer], "span": "all"}
        add = pv.Add(subject.vectors[0], coeff=subject.coeff, **aim)
        rows = pv.Add(subject.vectors[0], coeff=subject.coeffs.tolist(), **aim)

        def run(plan: pv.Plan) -> Reply:
            with model.arm(plan) as seen:
                tokens = torch.stack(model.generate_ids(prompts, **subject.settings))
            traits = seen.traits
            return Reply(
                tokens=tokens,
                scores=lambda: torch.stack([seen[trait].steps for trait in traits], dim=-1),
            )

        return {
            "steer": lambda: run(pv.Plan(add)),
            "watch": lambda: run(pv.Plan(monitor=bank)),
            "both": lambda: run(pv.Plan(add, monitor=bank)),
            "rows": lambda: run(pv.Plan(rows)),
        }


class TorchHook:
    """The same jobs in hooks of plain torch: the bar."""

    def arms(self, subject: Subject) -> Mapping[Kind, Arm]:
        return {
            "steer": lambda: subject.reference("steer"),
            "watch": lambda: subject.reference("watch"),
            "both": lambda: subject.reference("both"),
            "rows": lambda: subject.reference("rows"),
        }


class Nnsight:
    def arms(self, subject: Subject) -> Mapping[Kind, Arm]:
        import nnsight

        model = nnsight.NNsight(subject.fresh())
        turned = subject.units.mT.contiguous()
        one = subject.coeff * subject.raw
        several = subject.coeffs[:, None, None] * subject.raw

        def run(delta: Tensor | None, watching: bool) -> Reply:
            layers = model.model.layers
            with torch.no_grad():  # noqa: SIM117 - nnsight reads a `with` of its own line
                with model.trace(subject.ids, fn="generate", **subject.settings) as tracer:
                    made = nnsight.save([])
                    for _ in tracer.iter[: subject.size.new_tokens]:
                        for layer in range(len(turned)):
                            if layer == subject.layer and delta is not None:
                                layers[layer].output = layers[layer].output + delta
                            if watching:
                                made.append(layers[layer].output[:, -1] @ turned[layer])
                    out = tracer.result.save()
            tokens = out[:, subject.ids.shape[1] :]
            return Reply(tokens=tokens, scores=lambda: subject.table(made))

        return {
            "steer": lambda: run(one, False),
            "watch": lambda: run(None, True),
            "both": lambda: run(one, True),
            "rows": lambda: run(several, False),
        }


class TransformerLens:
    def arms(self, subject: Subject) -> Mapping[Kind, Arm]:
        bridge = self._booted(subject)
        turned = subject.units.mT.contiguous()
        one = subject.coeff * subject.raw
        several = subject.coeffs[:, None, None] * subject.raw

        def run(delta: Tensor | None, watching: bool) -> Reply:
            made: list[Tensor] = []

            def watch(layer: int) -> Any:
                return lambda h, hook: made.append(h[:, -1] @ turned[layer])

            hooks: list[Any] = []
            for layer in range(len(turned)):
                if layer == subject.layer and delta is not None:
                    hooks.append((f"blocks.{layer}.hook_out", lambda h, hook: h + delta))
                if watching:
                    hooks.append((f"blocks.{layer}.hook_out", watch(layer)))
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

        return {
            "steer": lambda: run(one, False),
            "watch": lambda: run(None, True),
            "both": lambda: run(one, True),
            "rows": lambda: run(several, False),
        }

    def _booted(self, subject: Subject) -> Any:
        from transformer_lens.model_bridge import TransformerBridge

        tokenizer = _numbers(subject.size.shape.vocabulary)
        return TransformerBridge.boot_transformers(
            "random", hf_model=subject.fresh(), tokenizer=tokenizer, device="cpu"
        )


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
        vector = SteeringVector({subject.layer: subject.raw}, "decoder_block")
        turned = subject.units.mT.contiguous()

        def run(steering: bool, watching: bool) -> Reply:
            with ExitStack() as stack:
                if steering:
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
            "steer": lambda: run(True, False),
            "watch": lambda: run(False, True),
            "both": lambda: run(True, True),
        }


class Repeng:
    def arms(self, subject: Subject) -> Mapping[Kind, Arm]:
        import numpy

        # repeng 0.4.0 names a type that NumPy 2 has renamed.
        if not hasattr(numpy, "float_"):
            vars(numpy)["float_"] = numpy.float64
        from repeng import ControlModel

        hf = subject.fresh()
        model = ControlModel(hf, [subject.layer])
        model.set_raw_control({subject.layer: subject.coeff * subject.raw})
        return {"steer": lambda: Reply(tokens=subject.generate(model))}


class Pyvene:
    def arms(self, subject: Subject) -> Mapping[Kind, Arm]:
        one = subject.coeff * subject.raw
        several = subject.coeffs[:, None, None] * subject.raw
        return {"steer": self._arm(subject, one), "rows": self._arm(subject, several)}

    def _arm(self, subject: Subject, delta: Tensor) -> Arm:
        import pyvene

        class Adding(pyvene.ConstantSourceIntervention):  # type: ignore[misc]
            """Adds a fixed row to every position."""

            def forward(self, base: Tensor, *_: Any, **__: Any) -> Tensor:
                return base + delta

        adding = Adding(embed_dim=subject.size.shape.hidden, keep_last_dim=True)
        place = {"component": f"model.layers[{subject.layer}].output", "intervention": adding}
        model = pyvene.IntervenableModel([place], model=subject.fresh())

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
            "random", hf_model=hf, tokenizer=_numbers(subject.size.shape.vocabulary), device="cpu"
        )
        specs = [SteerSpec(vector=subject.raw, layer=subject.layer, coeff=subject.coeff)]
        turned = subject.units.mT.contiguous()

        def run(steering: bool, watching: bool) -> Reply:
            made: list[Tensor] = []
            with ExitStack() as stack:
                if steering:
                    stack.enter_context(steer(model, specs))
                for layer, block in enumerate(find_decoder(hf).blocks if watching else ()):
                    hook = block.register_forward_hook(_last_row(made, turned[layer]))
                    stack.callback(hook.remove)
                tokens = subject.generate(hf)
            return Reply(tokens=tokens, scores=lambda: subject.table(made))

        return {"steer": lambda: run(True, False), "both": lambda: run(True, True)}


def _last_row(made: list[Tensor], turned: Tensor) -> Any:
    return lambda _module, _args, output: made.append(output[:, -1] @ turned)


class ActivationSteerer:
    """The context manager of the paper's scripts, written anew from their description: a hook on
    one block that adds `coeff * vector` to all positions."""

    def arms(self, subject: Subject) -> Mapping[Kind, Arm]:
        hf = subject.fresh()
        first = next(hf.parameters())
        vector = subject.raw.to(first.device, first.dtype)

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

        return {"steer": run}


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """An adapter, how tables call it, and what it needs beside pvcore's own environment."""

    adapter: type[Peer]
    title: str
    packages: tuple[str, ...] = ()


# What steering-vectors and repeng import of scikit-learn, without their old bounds on NumPy.
_LEARN = ("scikit-learn", "scipy", "joblib", "threadpoolctl", "narwhals")
PEERS: Mapping[str, Entry] = {
    "pvcore": Entry(adapter=Pvcore, title="pvcore"),
    "torch-hook": Entry(adapter=TorchHook, title="torch hook"),
    "paper": Entry(adapter=ActivationSteerer, title="the paper's steerer"),
    "nnsight": Entry(adapter=Nnsight, title="nnsight 0.8.1 trace"),
    "transformer-lens": Entry(adapter=TransformerLens, title="TransformerLens 4.3.0 bridge"),
    "steering-vectors": Entry(
        adapter=SteeringVectors,
        title="steering-vectors 0.12.2",
        packages=("steering-vectors==0.12.2", *_LEARN),
    ),
    "repeng": Entry(
        adapter=Repeng, title="repeng 0.4.0", packages=("repeng==0.4.0", "gguf", *_LEARN)
    ),
    "pyvene": Entry(adapter=Pyvene, title="pyvene 0.1.8", packages=("pyvene==0.1.8",)),
    "interp-engine": Entry(
        adapter=InterpEngine,
        title="interp-engine 1.14.2, eager",
        packages=("interp-engine==1.14.2",),
    ),
}
