"""What every peer is given: the same random model, prompts, vectors and reference results."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

import pvcore as pv
from benches.arms import by_step
from benches.loading import loaded
from benches.random_models import Shape, random_prompts, random_vectors, twin
from pvcore.blocks import find_decoder

Kind = Literal["steer", "everywhere", "watch", "both", "rows", "extract"]
KINDS: Mapping[Kind, str] = {
    "steer": "steer one layer",
    "everywhere": "steer all layers",
    "watch": "watch all vectors at all layers",
    "both": "steer and watch",
    "rows": "a coefficient per row",
    "extract": "mean of each sample at all layers but the last",
}


# So small that whatever a library costs beside the model itself shows.
SMALL = Shape(hidden=256, layers=8, vocabulary=512)


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """How much is generated. Prompts are equally long: not every peer knows of padding.

    `configurations` says how many different coefficients a batch has, by default one per row, and
    `samples` how many texts are read, in batches of 32. `model` is loaded in place of `shape`.
    """

    shape: Shape = SMALL
    model: str | None = None
    batch: int = 1
    prompt_tokens: int = 16
    new_tokens: int = 48
    vectors: int = 7
    configurations: int | None = None
    samples: int = 0
    seed: int = 0


READ_AT_ONCE = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """New tokens, and for watching jobs the projections, made into a table when asked for; means
    where texts are read and nothing is generated.
    """

    tokens: Int[Tensor, "row step"]
    scores: Callable[[], Float[Tensor, "step layer row n_vec"]] | None = None
    means: Float[Tensor, "layer sample d_model"] | None = None


def read_means(made: list[list[Float[Tensor, "row d_model"]]]) -> Reply:
    """A reply of means, collected layer by layer for each batch of samples."""
    means = torch.cat([torch.stack(batch) for batch in made], dim=1)
    return Reply(tokens=torch.empty(0, 0, dtype=torch.long), means=means)


Arm = Callable[[], Reply]


class Peer(Protocol):
    """A library under measurement. `arms` gives the jobs it can do, each on a model of its own."""

    def arms(self, subject: "Subject") -> Mapping[Kind, Arm]: ...


class Subject:
    """One model and its inputs. `plain` is for reference; a peer works on `fresh()`."""

    def __init__(self, size: Size) -> None:
        self.size = size
        self.plain: Any = loaded(size.model, size.shape, seed=size.seed)
        config = self.plain.config.get_text_config()
        self.n_layers, self.d_model = int(config.num_hidden_layers), int(config.hidden_size)
        self.n_vocabulary = int(config.vocab_size)
        layers = range(self.n_layers)
        traits = [f"trait {number}" for number in range(size.vectors)]
        self.vectors = random_vectors(self.d_model, layers, traits=traits, seed=size.seed)
        self.units: Float[Tensor, "layer n_vec d_model"] = pv.VectorBank(self.vectors).units.float()
        self.layer = self.n_layers // 2
        self.ids = self._drawn(size.batch)
        self.samples = torch.split(self._drawn(size.samples), READ_AT_ONCE) if size.samples else ()
        self.coeff = self._visible()

    def _drawn(self, count: int) -> Int[Tensor, "row token"]:
        lengths = [self.size.prompt_tokens] * count
        return torch.stack(random_prompts(lengths, self.n_vocabulary, seed=self.size.seed))

    def fresh(self) -> Any:
        """A copy on the same weights that a peer may wrap or change."""
        return twin(self.plain)

    @property
    def coeffs(self) -> Float[Tensor, " row"]:
        """A coefficient for every row, from none to twice the common one; one alone is common."""
        kinds = self.size.configurations or self.size.batch
        several = torch.linspace(0, 2, kinds) if kinds > 1 else torch.ones(1)
        return self.coeff * several[torch.arange(self.size.batch) % kinds]

    def raw(self, layer: int | None = None) -> Float[Tensor, " d_model"]:
        """The vector that steers at a layer, by default the one that is steered."""
        return self.vectors[0].direction(pv.resid_post(self.layer if layer is None else layer))

    def deltas(self, kind: Kind) -> dict[int, Float[Tensor, "*row d_model"]]:
        """What a job adds, by layer."""
        if kind == "everywhere":
            return {layer: self.coeff * self.raw(layer) for layer in range(self.n_layers)}
        if kind == "rows":
            return {self.layer: self.coeffs[:, None, None] * self.raw()}
        return {self.layer: self.coeff * self.raw()} if kind in ("steer", "both") else {}

    @property
    def settings(self) -> dict[str, Any]:
        return {"max_new_tokens": self.size.new_tokens, "do_sample": False, "pad_token_id": 0}

    def generate(self, hf: Any, **extra: Any) -> Int[Tensor, "row step"]:
        """transformers' own generation; the new tokens."""
        mask = torch.ones_like(self.ids)
        output: Tensor = hf.generate(self.ids, attention_mask=mask, **self.settings, **extra)
        return output[:, self.ids.shape[1] :]

    @torch.no_grad()
    def read(self, hf: Any) -> None:
        """A bare forward over the samples, without logits."""
        for ids in self.samples:
            hf.base_model(ids, use_cache=False)

    def table(
        self, made: list[Float[Tensor, "row n_vec"]]
    ) -> Float[Tensor, "step layer row n_vec"]:
        """Scores collected block after block, step after step."""
        return by_step(made, self.n_layers)

    def reference(self, kind: Kind) -> Reply:
        """The job done by hooks of plain torch; the layer that steers is watched after it."""
        return self.hooked(kind, self.plain)()

    def hooked(self, kind: Kind, hf: Any) -> Arm:
        """The job in hooks of plain torch on a model; what can be made once is made here."""
        blocks, deltas = find_decoder(hf).blocks, self.deltas(kind)
        turned = self.units.mT.contiguous()

        def run() -> Reply:
            made: list[Tensor] = []
            with ExitStack() as stack:
                for layer, block in enumerate(blocks):
                    hooks = [_adding(deltas[layer])] if layer in deltas else []
                    if kind in ("watch", "both"):
                        hooks.append(_watch(made, turned[layer]))
                    if kind == "extract" and layer < self.n_layers - 1:
                        hooks.append(_mean(made))
                    for hook in hooks:
                        stack.callback(block.register_forward_hook(hook).remove)
                if kind == "extract":
                    self.read(hf)
                    by_batch = range(0, len(made), self.n_layers - 1)
                    return read_means([made[at : at + self.n_layers - 1] for at in by_batch])
                tokens = self.generate(hf)
            return Reply(tokens=tokens, scores=lambda: self.table(made))

        return run

    def _visible(self) -> float:
        """Twice the residual's own length changes a reply for certain."""
        rows: list[Tensor] = []
        block = find_decoder(self.plain).blocks[self.layer]
        hook = block.register_forward_hook(lambda _m, _a, output: rows.append(output))
        with torch.no_grad():
            self.plain(self.ids[:8])
        hook.remove()
        return 2.0 * float(rows[0].norm(dim=-1).mean()) / float(self.raw().norm())


def _adding(delta: Tensor) -> Any:
    return lambda _module, _args, output: output + delta


def _watch(made: list[Tensor], turned: Float[Tensor, "d_model n_vec"]) -> Any:
    return lambda _module, _args, output: made.append(output[:, -1] @ turned)


def _mean(made: list[Tensor]) -> Any:
    return lambda _module, _args, output: made.append(output.mean(1))
