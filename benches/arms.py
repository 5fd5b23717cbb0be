"""The arms of the overhead measurement: one generation, run in every way that is compared."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

import pvcore as pv
from benches.bare_hooks import steering, watching
from benches.random_models import random_prompts, random_vectors, twin
from pvcore.blocks import find_decoder
from pvcore.chats import as_chats, encode_all, pad


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """New tokens, and the watched projections as tables made only when asked for.

    `prompt` counts each chat's own tokens from 0.
    """

    tokens: Int[Tensor, "chat step"]
    scores: Callable[[], Float[Tensor, "step layer chat n_vec"]] | None = None
    prompt: Callable[[], Float[Tensor, "position layer chat n_vec"]] | None = None


Run = Callable[..., Reply]


def by_step(
    made: Sequence[Float[Tensor, "chat width"]], layers: int
) -> Float[Tensor, "step layer chat width"]:
    """What hooks collected block after block, step after step."""
    stacked = torch.stack(list(made))
    return stacked.reshape(-1, layers, *stacked.shape[1:])


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What is generated. `plain` never met pvcore; `model` holds a twin on the same weights."""

    plain: Any
    model: pv.HookedModel
    vectors: Sequence[pv.PersonaVector]
    prompts: Sequence[Tensor]
    new_tokens: int
    layer: int
    coeff: float
    bank: pv.VectorBank = field(init=False)
    given: Mapping[str, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "bank", pv.VectorBank(self.vectors))
        encoded = encode_all(None, as_chats(list(self.prompts)), for_generation=True)
        batch = pad(encoded, side="left", pad_id=0)
        given = {"input_ids": batch.ids, "attention_mask": batch.mask.long()}
        placed = {name: tensor.to(self.model.device) for name, tensor in given.items()}
        object.__setattr__(self, "given", placed)

    @classmethod
    def of(
        cls,
        plain: Any,
        model: pv.HookedModel,
        traits: Sequence[str],
        *,
        batch: int,
        prompt_tokens: int,
        new_tokens: int,
        seed: int,
    ) -> "Task":
        """Random prompts of different lengths, random vectors at every layer, one add midway."""
        vectors = random_vectors(model.d_model, range(model.n_layers), traits=traits, seed=seed)
        lengths = [prompt_tokens - row % 4 for row in range(batch)]
        vocabulary = int(model.hf.config.get_text_config().vocab_size)
        prompts = random_prompts(lengths, vocabulary, seed=seed)
        site = pv.resid_post(model.n_layers // 2)
        rows = model.read(prompts[:8], sites=[site], span="all")[site]
        return cls(
            plain=plain,
            model=model,
            vectors=vectors,
            prompts=prompts,
            new_tokens=new_tokens,
            layer=site.layer,
            # Twice the residual's own length changes a reply for certain.
            coeff=2.0 * float(rows.norm(dim=-1).mean()) / float(vectors[0].direction(site).norm()),
        )

    @property
    def settings(self) -> dict[str, Any]:
        return {"max_new_tokens": self.new_tokens, "do_sample": False, "pad_token_id": 0}

    @property
    def blocks(self) -> tuple[nn.Module, ...]:
        """Blocks of the model that pvcore never met."""
        return find_decoder(self.plain).blocks

    @property
    def units(self) -> Float[Tensor, "layer n_vec d_model"]:
        """Unit vectors as a hook wants them: in float32, on the model's device."""
        return self.bank.units.float().to(self.model.device)

    @property
    def delta(self) -> Float[Tensor, " d_model"]:
        """What steering adds."""
        raw = self.vectors[0].direction(pv.resid_post(self.layer))
        return self.coeff * raw.float().to(self.model.device)

    def plainly(self, hf: Any, extra: Mapping[str, Any]) -> Tensor:
        """transformers' own generate; the new tokens."""
        output: Tensor = hf.generate(**self.given, **self.settings, **extra)
        return output[:, self.given["input_ids"].shape[1] :].cpu()

    def unhooked(self, hf: Any, extra: Mapping[str, Any]) -> Reply:
        """Nothing armed and no hooks of the bench's own."""
        return Reply(tokens=self.plainly(hf, extra))

    def armed(
        self, arming: AbstractContextManager[pv.Seen] | None, extra: Mapping[str, Any]
    ) -> Reply:
        """pvcore's generation, inside the block of a plan or of none."""
        with ExitStack() as stack:
            seen = None if arming is None else stack.enter_context(arming)
            tokens = self.model.generate_ids(list(self.prompts), **self.settings, **extra)
        if seen is None or not seen.traits:
            return Reply(tokens=torch.stack(tokens))
        return Reply(
            tokens=torch.stack(tokens),
            scores=lambda: torch.stack([seen[name].steps for name in seen.traits], dim=-1),
        )

    def hooked(self, *, steers: bool, watches: bool) -> Run:
        """transformers' generation under bare hooks, on a twin that no other arm generates with."""
        hf, units, delta = twin(self.plain), self.units, self.delta
        blocks = find_decoder(hf).blocks

        def run(**extra: Any) -> Reply:
            with ExitStack() as stack:
                if steers:
                    stack.enter_context(steering(blocks[self.layer], delta))
                made = stack.enter_context(watching(blocks, units)) if watches else None
                tokens = self.plainly(hf, extra)
            if made is None:
                return Reply(tokens=tokens)
            return Reply(
                tokens=tokens,
                scores=lambda: by_step([scores[:, -1].cpu() for scores in made], len(blocks)),
            )

        return run

    def arms(self) -> dict[str, Run]:
        """Every way by name; settings given to a run go to `generate`.

        Whatever a user would make once for many generations is made here, outside the timing.
        """
        plain, model, bank = self.plain, self.model, self.bank
        add = pv.Add(self.vectors[0], coeff=self.coeff, layers=[self.layer])
        both = pv.Plan(add, monitor=bank)
        hooked = self.hooked(steers=False, watches=True)
        return {
            "plain": lambda **extra: self.unhooked(plain, extra),
            "again": lambda **extra: self.unhooked(plain, extra),
            "idle": lambda **extra: self.unhooked(model.hf, extra),
            "unarmed": lambda **extra: self.armed(None, extra),
            "monitor": lambda **extra: self.armed(model.monitor(bank), extra),
            "read": lambda **extra: _read(self.armed(model.monitor(bank), extra)),
            "steer": lambda **extra: self.armed(model.steer(add), extra),
            "both": lambda **extra: self.armed(model.arm(both), extra),
            "hook monitor": hooked,
            "hook read": lambda **extra: _read(hooked(**extra)),
            "hook steer": self.hooked(steers=True, watches=False),
            "hook both": self.hooked(steers=True, watches=True),
        }


def _read(reply: Reply) -> Reply:
    """The reply with its scores made, as whoever looks at them has them made."""
    assert reply.scores is not None
    scores = reply.scores()
    return Reply(tokens=reply.tokens, scores=lambda: scores)
