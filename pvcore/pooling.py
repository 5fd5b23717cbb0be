"""Pooling: the means that vectors are made of, over the prompt and the reply, in one forward.

Three averages of each conversation are taken in the same pass (arXiv 2507.21509, A.3): over its
reply, over its prompt, and the last prompt token alone. Of these only running sums in float64 are
kept, so that memory depends on the model and not on how many conversations there are.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter

import safetensors
import safetensors.torch
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from pvcore import fingerprints
from pvcore.activations import Reduction
from pvcore.bootstrap import Intervals, Resamples
from pvcore.chats import Encoded
from pvcore.errors import WorkError
from pvcore.model import HookedModel
from pvcore.moments import Moments
from pvcore.sites import Site
from pvcore.spans import Span
from pvcore.vectors import VARIANTS, Variant

SPANS: Mapping[Variant, tuple[Span, Reduction]] = {
    "response_mean": ("response", "mean"),
    "prompt_mean": ("prompt", "mean"),
    "prompt_last": ("last_prompt_token", "last"),
}
Half = tuple[bool, int]  # whether positive, and which half of the pairs
HALVES: tuple[Half, ...] = ((False, 0), (False, 1), (True, 0), (True, 1))
_ROUNDING = 1e-6
_SAVING_SHARE = 0.1  # of the time at most, so that a kill costs about ten times one saving


class Pooled:
    """Running sums of one variant: moments of each side and half, and resamples of its pairs.

    Alternate pairs are in two halves. `rows` are `[n_sites, row, d_model]`.
    """

    def __init__(self, n_sites: int, d_model: int, *, resamples: int, seed: int) -> None:
        self.halves = {half: Moments.zeros([n_sites, d_model]) for half in HALVES}
        self.resamples = Resamples(resamples, n_sites, d_model, seed=seed)

    def add(
        self, rows: Float[Tensor, "n_sites row d_model"], pairs: list[int], positive: list[bool]
    ) -> None:
        """Count in the rows of one batch."""
        for side, half in HALVES:
            chosen = [
                at
                for at, (pair, one) in enumerate(zip(pairs, positive, strict=True))
                if (one, pair % 2) == (side, half)
            ]
            self.halves[side, half] = self.halves[side, half].add(rows[:, chosen].transpose(0, 1))
        self.resamples.add(rows, pairs, positive)

    @property
    def vector(self) -> Float64[Tensor, "n_sites d_model"]:
        """Mean of positive rows minus mean of negative ones."""
        return self._side(True).mean - self._side(False).mean

    @property
    def tells_sides_apart(self) -> bool:
        """Whether the vector is more at every site than what rounding leaves of equal sides."""
        least = _ROUNDING * self._side(True).mean.norm(dim=-1)
        return bool((self.vector.norm(dim=-1) > least).all())

    @property
    def split(self) -> tuple[Tensor, Tensor]:
        """The vector of each half of the pairs."""
        first, second = (
            self.halves[True, half].mean - self.halves[False, half].mean for half in (0, 1)
        )
        return first, second

    @property
    def spread(self) -> Float64[Tensor, " n_sites"]:
        """Root mean square distance of a row from the mean of its side."""
        sides = self._side(True).variance.sum(-1), self._side(False).variance.sum(-1)
        return ((sides[0] + sides[1]) / 2).sqrt()

    def intervals(self) -> Intervals | None:
        """What the resamples say; None where there are none."""
        return self.resamples.intervals(self.vector) if len(self.resamples.totals) else None

    def _side(self, positive: bool) -> Moments:
        return self.halves[positive, 0].merge(self.halves[positive, 1])

    def tensors(self) -> dict[str, Tensor]:
        """All sums by name, for a file."""
        named = {"sums": self.resamples.sums, "totals": self.resamples.totals}
        for (positive, half), moments in self.halves.items():
            name = f"{'positive' if positive else 'negative'} {half}"
            named |= {
                f"{name} count": torch.tensor(moments.count),
                f"{name} mean": moments.mean,
                f"{name} scatter": moments.scatter,
            }
        return named

    def restore(self, named: Mapping[str, Tensor]) -> None:
        """Take up the sums that `tensors` gave."""
        for positive, half in HALVES:
            name = f"{'positive' if positive else 'negative'} {half}"
            self.halves[positive, half] = Moments(
                count=int(named[f"{name} count"]),
                mean=named[f"{name} mean"],
                scatter=named[f"{name} scatter"],
            )
        self.resamples.sums.copy_(named["sums"])
        self.resamples.totals.copy_(named["totals"])


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """One pooling pass: conversations as token ids, positive sides first, pairs in one order."""

    model: HookedModel
    encoded: Sequence[Encoded]
    sites: tuple[Site, ...]
    batch_size: int
    resamples: int
    seed: int
    variants: tuple[Variant, ...] = VARIANTS

    def run(
        self,
        *,
        begun: bytes | None = None,
        save: Callable[[bytes], None] | None = None,
        shown: Callable[[range], Iterable[int]] | None = None,
    ) -> dict[Variant, Pooled]:
        """The sums over all conversations, going on from those `begun` if they are of these.

        `save` is given the sums so far, as often as a tenth of the time allows, and at the end.
        """
        pooled, rows = self._empty(), self._rows
        done = 0 if begun is None else _restored(begun, pooled, rows)
        batches = self._batches(done)
        last_saved, saving = perf_counter(), 0.0
        for batch in shown(range(done, self._n_batches)) if shown else range(done, self._n_batches):
            self._count(pooled, *next(batches))
            due = perf_counter() - last_saved >= saving / _SAVING_SHARE
            if save is not None and (due or batch == self._n_batches - 1):
                started = perf_counter()
                save(_written(batch + 1, pooled, rows))
                last_saved = perf_counter()
                saving = last_saved - started
        return pooled

    @property
    def _n_batches(self) -> int:
        return -(-len(self.encoded) // self.batch_size)

    @property
    def _rows(self) -> str:
        """What tells these conversations, in their order, from others."""
        return fingerprints.of_text(
            [[one.ids, one.prompt_length, one.reply] for one in self.encoded]
        )

    def _empty(self) -> dict[Variant, Pooled]:
        size = len(self.sites), self.model.d_model
        return {
            variant: Pooled(*size, resamples=self.resamples, seed=self.seed)
            for variant in self.variants
        }

    def _batches(self, done: int) -> Iterator[tuple[list[int], list[Tensor]]]:
        spans = [SPANS[variant] for variant in self.variants]
        reading = self.model.read_spans(
            self.encoded,
            sites=self.sites,
            spans=spans,
            batch_size=self.batch_size,
            first_batch=done,
        )
        for chosen, parts in reading:
            values = [part.values for part in parts if part.values is not None]
            assert len(values) == len(parts), "means and last tokens have values"
            yield chosen, values

    def _count(
        self, pooled: dict[Variant, Pooled], chosen: list[int], values: list[Tensor]
    ) -> None:
        n_pairs = len(self.encoded) // 2
        pairs = [index % n_pairs for index in chosen]
        positive = [index < n_pairs for index in chosen]
        for one, rows in zip(pooled.values(), values, strict=True):
            one.add(rows, pairs, positive)


def _written(batches: int, pooled: Mapping[Variant, Pooled], rows: str) -> bytes:
    tensors = {
        f"{variant} {name}": tensor.contiguous()
        for variant, one in pooled.items()
        for name, tensor in one.tensors().items()
    }
    return safetensors.torch.save(tensors, {"batches": str(batches), "rows": rows})


def _restored(begun: bytes, pooled: Mapping[Variant, Pooled], rows: str) -> int:
    """Fill the sums and return how many batches they are of: none where it is of other `rows`."""
    try:
        tensors = safetensors.torch.load(begun)
        header = json.loads(begun[8 : 8 + int.from_bytes(begun[:8], "little")])
        if header["__metadata__"]["rows"] != rows:
            return 0  # other replies were kept, as after another judging
        for variant, one in pooled.items():
            beginning = f"{variant} "
            named = {
                name.removeprefix(beginning): tensor
                for name, tensor in tensors.items()
                if name.startswith(beginning)
            }
            one.restore(named)
        return int(header["__metadata__"]["batches"])
    except (safetensors.SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise WorkError(
            f"got sums of a pooling pass that cannot be taken up ({error}); wanted those that "
            "pvcore wrote. The file was changed: remove it to pool anew"
        ) from None
