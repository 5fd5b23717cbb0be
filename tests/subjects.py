"""What the matrices run on: one hooked model a family, its oracle on a twin, and inputs."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

import pvcore as pv
from tests.families import D_MODEL, FAMILIES, build, tokenizer
from tests.oracle import Oracle, Point

NAMES = tuple(FAMILIES)


@dataclass(frozen=True, kw_only=True)
class Subject:
    """The model under test; the oracle reads another object with the same weights."""

    name: str
    model: pv.HookedModel
    oracle: Oracle

    @property
    def sites(self) -> list[pv.Site]:
        return [pv.Site(kind, layer) for kind, layer in self.oracle.points]  # type: ignore[arg-type]


def fresh(name: str) -> Subject:
    """A subject of one's own, for tests that leave marks on the model."""
    model = pv.HookedModel(build(name), tokenizer(), model_id=f"tiny/{name}")
    return Subject(name=name, model=model, oracle=Oracle(build(name), FAMILIES[name]))


@cache
def subject(name: str) -> Subject:
    """One subject per family and process; tests leave it as they found it."""
    return fresh(name)


def point(site: pv.Site) -> Point:
    return site.kind, site.layer


def prompts(lengths: Sequence[int], *, seed: int = 1) -> list[Tensor]:
    """Random prompts of letters, as token ids."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(5, 100, (length,), generator=generator) for length in lengths]


def conversations() -> list[list[dict[str, str]]]:
    """Three questions with replies of different lengths."""
    replies = ("Yes, of course.", "no", "I would rather not")
    return [
        [{"role": "user", "content": f"Is it {index}?"}, {"role": "assistant", "content": reply}]
        for index, reply in enumerate(replies)
    ]


@cache
def encoded() -> tuple[tuple[Tensor, int], ...]:
    """Ids of each conversation and the length of its prompt, straight from the template."""
    plain = tokenizer()
    both = []
    for chat in conversations():
        whole = plain.apply_chat_template(chat, return_dict=False)
        prompt = plain.apply_chat_template(chat[:-1], add_generation_prompt=True, return_dict=False)
        both.append((torch.tensor(whole), len(prompt)))
    return tuple(both)


def vector(
    trait: str, sites: Sequence[pv.Site], *, seed: int, model_id: str = "", scale: float = 1.0
) -> pv.PersonaVector:
    """A random raw vector per site, of norm about `8 * scale`."""
    generator = torch.Generator().manual_seed(seed)
    directions = scale * torch.randn(len(sites), D_MODEL, generator=generator)
    return pv.PersonaVector(
        trait=trait, sites=tuple(sites), directions=directions, model_id=model_id
    )


@cache
def trio(*sites: pv.Site) -> tuple[pv.PersonaVector, ...]:
    """Three raw vectors that are far from orthogonal and of unequal length."""
    shared = vector("shared", sites, seed=7, scale=0.3)
    lengths = {"evil": 1.0, "sycophancy": 0.5, "apathy": 2.0}
    return tuple(
        (length * (vector(trait, sites, seed=seed, scale=0.4) + shared)).rename(trait)
        for seed, (trait, length) in enumerate(lengths.items())
    )


def raw(vectors: Sequence[pv.PersonaVector], site: pv.Site) -> Tensor:
    """The raw rows `[n_vec, d_model]` of some vectors at one site."""
    return torch.stack([one.direction(site) for one in vectors])


@cache
def unit(one: pv.PersonaVector, site: pv.Site) -> Tensor:
    """The unit row of a vector at a site, in float64."""
    direction = one.direction(site).double()
    return direction / direction.norm()


def worst(got: Tensor, wanted: Tensor) -> float:
    """The largest absolute difference; infinite where only one of the two is NaN."""
    if got.shape != wanted.shape or not torch.equal(got.isnan(), wanted.isnan()):
        return float("inf")
    return float((got.double() - wanted.double()).nan_to_num().abs().max())
