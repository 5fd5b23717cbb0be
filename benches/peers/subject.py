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
from benches.random_models import Shape, random_prompts, random_qwen2, random_vectors, twin
from pvcore.blocks import find_decoder

Kind = Literal["steer", "watch", "both", "rows"]
KINDS: Mapping[Kind, str] = {
    "steer": "steer one layer",
    "watch": "watch all vectors at all layers",
    "both": "steer and watch",
    "rows": "a coefficient per row",
}


# So small that whatever a library costs beside the model itself shows.
SMALL = Shape(hidden=256, layers=8, vocabulary=512)


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """How much is generated. Prompts are equally long: not every peer knows of padding.

    `configurations` says how many different coefficients a batch has, by default one per row.
    """

    shape: Shape = SMALL
    batch: int = 1
    prompt_tokens: int = 16
    new_tokens: int = 48
    vectors: int = 7
    configurations: int | None = None
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """New tokens, and for watching jobs the projections, made into a table when asked for."""

    tokens: Int[Tensor, "row step"]
    scores: Callable[[], Float[Tensor, "step layer row n_vec"]] | None = None


Arm = Callable[[], Reply]


class Peer(Protocol):
    """A library under measurement. `arms` gives the jobs it can do, each on a model of its own."""

    def arms(self, subject: "Subject") -> Mapping[Kind, Arm]: ...


class Subject:
    """One model and its inputs. `plain` is for reference; a peer works on `fresh()`."""

    def __init__(self, size: Size) -> None:
        from transformers import GenerationConfig

        self.size = size
        self.plain: Any = random_qwen2(size.shape, seed=size.seed)
        self.plain.generation_config = GenerationConfig(pad_token_id=0)
        layers = range(size.shape.layers)
        traits = [f"trait {number}" for number in range(size.vectors)]
        self.vectors = random_vectors(size.shape.hidden, layers, traits=traits, seed=size.seed)
        self.layer = size.shape.layers // 2
        lengths = [size.prompt_tokens] * size.batch
        self.ids = torch.stack(random_prompts(lengths, size.shape.vocabulary, seed=size.seed))
        self.coeff = self._visible()

    def fresh(self) -> Any:
        """A copy on the same weights that a peer may wrap or change."""
        return twin(self.plain)

    @property
    def coeffs(self) -> Float[Tensor, " row"]:
        """A coefficient for every row, from none to twice the common one; one alone is common."""
        kinds = self.size.configurations or self.size.batch
        several = torch.linspace(0, 2, kinds) if kinds > 1 else torch.ones(1)
        return self.coeff * several[torch.arange(self.size.batch) % kinds]

    @property
    def raw(self) -> Float[Tensor, " d_model"]:
        """The vector that steers."""
        return self.vectors[0].direction(pv.resid_post(self.layer)).float()

    @property
    def units(self) -> Float[Tensor, "layer n_vec d_model"]:
        return pv.VectorBank(self.vectors).units.float()

    @property
    def settings(self) -> dict[str, Any]:
        return {"max_new_tokens": self.size.new_tokens, "do_sample": False, "pad_token_id": 0}

    def generate(self, hf: Any, **extra: Any) -> Int[Tensor, "row step"]:
        """transformers' own generation; the new tokens."""
        mask = torch.ones_like(self.ids)
        output: Tensor = hf.generate(self.ids, attention_mask=mask, **self.settings, **extra)
        return output[:, self.ids.shape[1] :]

    def table(
        self, made: list[Float[Tensor, "row n_vec"]]
    ) -> Float[Tensor, "step layer row n_vec"]:
        """Scores collected block after block, step after step."""
        return by_step(made, self.size.shape.layers)

    def reference(self, kind: Kind) -> Reply:
        """The job done by hooks of plain torch; the layer that steers is watched after it."""
        delta = self.coeffs[:, None, None] * self.raw if kind == "rows" else self.coeff * self.raw
        made: list[Tensor] = []
        with ExitStack() as stack:
            for layer, block in enumerate(find_decoder(self.plain).blocks):
                if layer == self.layer and kind != "watch":
                    hook = block.register_forward_hook(lambda _m, _a, output: output + delta)
                    stack.callback(hook.remove)
                if kind in ("watch", "both"):
                    hook = block.register_forward_hook(_watch(made, self.units[layer]))
                    stack.callback(hook.remove)
            tokens = self.generate(self.plain)
        return Reply(tokens=tokens, scores=lambda: self.table(made))

    def _visible(self) -> float:
        """Twice the residual's own length changes a reply for certain."""
        rows: list[Tensor] = []
        block = find_decoder(self.plain).blocks[self.layer]
        hook = block.register_forward_hook(lambda _m, _a, output: rows.append(output))
        with torch.no_grad():
            self.plain(self.ids)
        hook.remove()
        return 2.0 * float(rows[0].norm(dim=-1).mean()) / float(self.raw.norm())


def _watch(made: list[Tensor], units: Float[Tensor, "n_vec d_model"]) -> Any:
    turned = units.mT.contiguous()
    return lambda _module, _args, output: made.append(output[:, -1] @ turned)
