"""Scoring: one truncated forward a batch of conversations, every vector at every site of a bank.

Batches hold conversations of similar length up to a budget of tokens, padding counted. They are
padded on the right and run without an attention mask: a causal model never looks to the right, so
that masking out the padding would only keep it from its fastest attention.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from numpy.typing import NDArray
from torch import Tensor

import pvcore_kernels as kernels
from pvcore.blocks import length_borders
from pvcore.flag_tokens import Sample
from pvcore.frames import Call, Frame, Outcome
from pvcore.heap import keep_freed
from pvcore.model import HookedModel
from pvcore.sessions import Take
from pvcore.sites import Site
from pvcore.vectors import VectorBank
from pvcore_kernels.reference import accumulator

RESPONSE_MEAN, LAST_PROMPT_TOKEN = 0, 1
# What a forward costs beside its tokens, as a share of their budget: it reads every weight, and
# small products run at a lower rate.
FORWARD = 1 / 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """A batch as the model takes it, and which samples its rows are."""

    places: tuple[int, ...]
    ids: Int64[Tensor, "batch pos"]
    lengths: tuple[int, ...]
    prompts: tuple[int, ...]
    replies: tuple[tuple[int, int], ...]


class Projections:
    """A reader that keeps two projections of every row at every site: reply mean and last prompt.

    `scores` holds them after the forward.
    """

    before = False

    def __init__(self, units: "Units", batch: Packed) -> None:
        self._units, self._batch = units, batch
        self._taken: list[Tensor | None] = [None] * len(units.sites)

    @property
    def sites(self) -> tuple[Site, ...]:
        return self._units.sites

    def begin(self, frame: Frame) -> Take:
        """Nothing to prepare: the rows were laid out with the batch."""
        return self._take

    def _take(self, place: int, h: Float[Tensor, "batch pos d_model"]) -> None:
        pooled = pool(h.detach(), self._batch.prompts, self._batch.replies)
        units = self._units.at(place, h.device, pooled.dtype)
        self._taken[place] = pooled @ units.mT

    def end(self, frame: Frame) -> None:
        """Nothing to close: each site was taken when it fired."""

    def close(self, call: Call, outcome: Outcome | None) -> None:
        """Nothing to close."""

    @property
    def scores(self) -> Float[Tensor, "site 2 batch n_vec"]:
        """Still on their device, which may not be done with them."""
        taken = [one for one in self._taken if one is not None]
        return torch.stack([one.to(taken[0].device, non_blocking=True) for one in taken])


class Units:
    """The unit rows of a bank, on every device they have been asked for on."""

    def __init__(self, bank: VectorBank) -> None:
        self.sites = bank.sites
        exact = bank.directions.double()
        self._rows = exact / exact.norm(dim=-1, keepdim=True)
        self._placed: dict[tuple[int, torch.device, torch.dtype], Tensor] = {}

    def at(self, place: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        key = place, device, dtype
        if key not in self._placed:
            self._placed[key] = self._rows[place].to(device, dtype)
        return self._placed[key]


class Scorer:
    """Scores samples with one model and bank."""

    def __init__(self, model: HookedModel, bank: VectorBank, max_tokens: int) -> None:
        self._model, self._units, self._max_tokens = model, Units(bank), max_tokens
        self._borders = length_borders(model.hf)
        self.shape = (len(bank.sites), 2, len(bank))
        keep_freed()

    def __call__(self, samples: Sequence[Sample]) -> NDArray[Any]:
        """`[sample, site, 2, n_vec]`; the 2 are reply mean and last prompt token."""
        scored: list[tuple[Packed, Tensor]] = []
        with without_autocast():
            for batch in packed(samples, self._max_tokens, self._borders):
                reader = Projections(self._units, batch)
                self._model.run_reader(reader, batch.ids, batch.lengths, batch.prompts)
                scored.append((batch, reader.scores))
        # Fetched last, so that the device never waits for the host between two batches.
        dtype = np.float64 if scored and scored[0][1].dtype == torch.float64 else np.float32
        found = np.full((len(samples), *self.shape), np.nan, dtype=dtype)
        for batch, scores in scored:
            found[list(batch.places)] = scores.permute(2, 0, 1, 3).cpu().numpy()
        return found


@contextmanager
def without_autocast() -> Iterator[None]:
    """Run forwards in the type that the model was loaded in, whatever autocast is around them.

    A scan names that type and goes on in another process, where nobody knows of an autocast.
    """
    with ExitStack() as stack:
        for device in filter(torch.is_autocast_enabled, ("cpu", "cuda")):
            stack.enter_context(torch.autocast(device, enabled=False))
        yield


def pool(
    h: Float[Tensor, "batch pos d_model"],
    prompts: Sequence[int],
    replies: Sequence[tuple[int, int]],
) -> Float[Tensor, "2 batch d_model"]:
    """Mean over each reply and the last token of each prompt, in the accumulator's precision."""
    if h.device.type == "cpu":
        starts, ends = zip(*replies, strict=True)
        means = kernels.segment_mean(h, starts, ends)
        last = h[torch.arange(len(prompts)), torch.tensor(prompts) - 1]
        return torch.stack([means.to(accumulator(h.dtype)), last.to(accumulator(h.dtype))])
    return pool_packed(h, prompts, replies)


def pool_packed(
    h: Float[Tensor, "batch pos d_model"],
    prompts: Sequence[int],
    replies: Sequence[tuple[int, int]],
) -> Float[Tensor, "2 batch d_model"]:
    """The same in one launch: segments of the flat rows, of which every second pair is wanted."""
    from pvcore_kernels import ops  # registers the op, with Triton where there is a GPU

    width, bounds = h.shape[1], list[int]()
    for row, (prompt, (start, end)) in enumerate(zip(prompts, replies, strict=True)):
        first = row * width
        bounds += [first + prompt - 1, first + prompt, first + start, first + end]
    cuts = torch.tensor(bounds, device=h.device, dtype=torch.int32)
    means = ops.segment_mean(h.reshape(-1, h.shape[-1]), cuts)
    wanted = torch.stack([means[2::4], means[0::4]])
    return wanted.to(accumulator(h.dtype))


def packed(
    samples: Sequence[Sample], max_tokens: int, borders: Sequence[int] = ()
) -> Iterator[Packed]:
    """The samples in batches, longest first, each of at most so many tokens or of one sample.

    They are cut where that costs least: a batch costs its tokens, padding counted, and `FORWARD`.
    None holds samples on both sides of a border, where a row's numbers would be its neighbours'.
    """
    lengths = np.array([len(one.ids) for one in samples], dtype=np.int64)
    order = np.argsort(-lengths, kind="stable")
    longest = lengths[order]
    sides = -np.searchsorted(borders, longest)
    ends = np.searchsorted(sides, sides, side="right")
    # Worked out from the end: the least cost of what begins at each sample, and how many it takes.
    least = np.zeros(len(order) + 1)
    takes = np.ones(len(order), dtype=np.int64)
    for first in range(len(order) - 1, -1, -1):
        most = min(max(max_tokens // int(longest[first]), 1), int(ends[first]) - first)
        costs = longest[first] * np.arange(1, most + 1) + least[first + 1 : first + 1 + most]
        takes[first] = costs.argmin() + 1
        least[first] = costs.min() + FORWARD * max_tokens
    first = 0
    while first < len(order):
        yield _batch(samples, order[first : first + takes[first]].tolist())
        first += int(takes[first])


def _batch(samples: Sequence[Sample], places: Sequence[int]) -> Packed:
    chosen = [samples[at] for at in places]
    lengths = tuple(len(one.ids) for one in chosen)
    # Padding repeats a real token: what it is never matters, and every vocabulary has that one.
    ids = np.zeros((len(chosen), max(lengths)), dtype=np.int64)
    for row, one in zip(ids, chosen, strict=True):
        row[: len(one.ids)] = one.ids
        row[len(one.ids) :] = one.ids[-1]
    return Packed(
        places=tuple(places),
        ids=torch.from_numpy(ids),
        lengths=lengths,
        prompts=tuple(one.prompt_length for one in chosen),
        replies=tuple(one.reply for one in chosen),
    )
