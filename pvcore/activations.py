"""Activations: reading residuals out of conversations in batches that stop at the deepest site."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

import pvcore_kernels as kernels
from pvcore.blocks import is_sharded
from pvcore.chats import Batch, Encoded, length_buckets, pad, span_range
from pvcore.errors import ModelError, SiteError, SpanError
from pvcore.frames import Call, Frame, Outcome
from pvcore.heap import keep_freed
from pvcore.moments import Moments
from pvcore.sessions import ForwardStopped, Reader, Take
from pvcore.sites import Site
from pvcore.spans import Span
from pvcore.taps import Taps
from pvcore_kernels.reference import accumulator

Reduction = Literal["mean", "last", "none", "moments"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Activations:
    """Residuals of chats at sites, in the order of the chats.

    `values` is `[site, chat, d_model]`, or `[site, chat, pos, d_model]` for `reduce="none"`, where
    positions past a chat's own span are NaN, or None for `reduce="moments"`. `lengths` counts the
    tokens of each chat's span.
    """

    values: Float[Tensor, "site chat *pos d_model"] | None
    sites: tuple[Site, ...]
    span: Span
    lengths: Int[Tensor, " chat"]
    moments: Moments | None = None

    def __getitem__(self, site: Site) -> Float[Tensor, "chat *pos d_model"]:
        if site not in self.sites:
            raise SiteError(f"got {site}; these activations hold {', '.join(map(str, self.sites))}")
        if self.values is None:
            raise SiteError("got activations reduced to moments; read .moments instead")
        return self.values[self.sites.index(site)]


class _Pool:
    """Takes the wanted span of every row of one batch at every site."""

    def __init__(
        self,
        sites: Sequence[Site],
        ranges: Sequence[tuple[int, int]],
        reduce: Reduction,
        before: bool,
    ) -> None:
        self._sites, self._before = tuple(sites), before
        self.ranges, self.reduce = ranges, reduce
        self.taken: dict[Site, Any] = {}
        self.dtype = torch.float32

    @property
    def sites(self) -> tuple[Site, ...]:
        return self._sites

    @property
    def before(self) -> bool:
        return self._before

    def begin(self, frame: Frame) -> Take:
        """Nothing to prepare: ranges were worked out from the tokens."""
        return self._take

    def _take(self, place: int, h: Float[Tensor, "batch pos d_model"]) -> None:
        site, h = self._sites[place], h.detach()
        self.dtype = accumulator(h.dtype)
        starts, ends = zip(*self.ranges, strict=True)
        if self.reduce == "mean":
            self.taken[site] = kernels.segment_mean(h, starts, ends)
        elif self.reduce == "last":
            self.taken[site] = h[torch.arange(len(ends)), torch.tensor(ends) - 1]
        elif self.reduce == "none":
            # Cloned, because a view would keep the whole batch alive.
            self.taken[site] = [
                row[s:e].clone() for row, (s, e) in zip(h, self.ranges, strict=True)
            ]
        else:
            rows = torch.cat([row[s:e] for row, (s, e) in zip(h, self.ranges, strict=True)])
            self.taken[site] = Moments.zeros(rows.shape[1:]).add(rows)

    def end(self, frame: Frame) -> None:
        """Nothing to close: each site was taken when it fired."""

    def close(self, call: Call, outcome: Outcome | None) -> None:
        """Nothing to close."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What to read of which chats; `run` does it batch by batch, all spans in one forward."""

    hf: nn.Module
    taps: Taps
    encoded: Sequence[Encoded]
    sites: tuple[Site, ...]
    spans: tuple[tuple[Span, Reduction], ...]
    batch_size: int
    before: bool
    pad_id: int
    device: torch.device
    first_batch: int = 0

    def __post_init__(self) -> None:
        size = self.batch_size
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise SpanError(f"got batch_size {size!r}; wanted a whole number of at least 1")
        for site in self.sites:
            self.taps.decoder.require(site)

    def run(self) -> Iterator[tuple[list[int], tuple[Activations, ...]]]:
        """Chat indices and their activations over each span, one length bucket after another."""
        ranges = [
            [self._range(index, span) for index in range(len(self.encoded))]
            for span, _ in self.spans
        ]
        keep_freed()
        group = object()
        for chosen in length_buckets(self.encoded, self.batch_size)[self.first_batch :]:
            batch = pad([self.encoded[i] for i in chosen], side="right", pad_id=self.pad_id)
            call = Call(
                rows=torch.tensor(chosen),
                n_chats=len(self.encoded),
                mask=batch.mask,
                last=torch.tensor([self.encoded[i].prompt_length - 1 for i in chosen]),
                generating=False,
                group=group,
            )
            pools = [
                _Pool(self.sites, [rows[i] for i in chosen], reduce, self.before)
                for rows, (_, reduce) in zip(ranges, self.spans, strict=True)
            ]
            self._forward(batch, call, pools)
            yield (
                chosen,
                tuple(
                    self._result(pool, span, chosen)
                    for pool, (span, _) in zip(pools, self.spans, strict=True)
                ),
            )

    def _range(self, index: int, span: Span) -> tuple[int, int]:
        try:
            return span_range(self.encoded[index], span)
        except SpanError as error:
            raise SpanError(f"chat {index}: {error}") from error

    def _forward(self, batch: Batch, call: Call, pools: Sequence[_Pool]) -> None:
        """One forward that ends at the deepest site, before logits are made."""
        # Where weights are shared out, a forward that ends early leaves them gathered and stale.
        deepest = None if is_sharded(self.hf) else max(self.sites)
        arming = self.taps.armed({}, readers=pools, stop_at=deepest)
        with arming, self.taps.calling(call), torch.no_grad(), contextlib.suppress(ForwardStopped):
            self.hf(
                input_ids=batch.ids.to(self.device),
                attention_mask=batch.mask.long().to(self.device),
                use_cache=False,
            )

    def _result(self, pool: _Pool, span: Span, chosen: Sequence[int]) -> Activations:
        lengths = torch.tensor([end - start for start, end in pool.ranges])
        taken = [pool.taken[site] for site in self.sites]
        if pool.reduce == "moments":
            moments = Moments(
                count=taken[0].count,
                mean=torch.stack([one.mean for one in taken]),
                scatter=torch.stack([one.scatter for one in taken]),
            )
            _require_finite(list(moments.mean[:, None]), self.sites, chosen)
            values = None
        elif pool.reduce == "none":
            for rows, site in zip(taken, self.sites, strict=True):
                _require_finite(rows, [site] * len(rows), chosen)
            longest = int(lengths.max())
            values = torch.stack(
                [torch.stack([_padded(r, longest) for r in rows]) for rows in taken]
            )
            moments = None
        else:
            # One copy from the device instead of one a site, where all sites are on one.
            one_device = len({rows.device for rows in taken}) == 1
            held = torch.stack(taken) if one_device else torch.stack([t.cpu() for t in taken])
            values, moments = held.cpu(), None
            _require_finite(list(values), self.sites, chosen)
        if values is not None:
            values = values.to("cpu", pool.dtype)
        return Activations(
            values=values, sites=self.sites, span=span, lengths=lengths, moments=moments
        )


def run_to_deepest(
    hf: nn.Module,
    taps: Taps,
    reader: Reader,
    ids: Int[Tensor, "batch pos"],
    lengths: Sequence[int],
    prompts: Sequence[int],
    device: torch.device,
) -> None:
    """One forward of rows padded on the right that ends at the reader's deepest site.

    No attention mask: causal attention never reaches padding that comes after a row's own tokens,
    and without a mask it takes its fastest path.
    """
    call = Call(
        rows=torch.arange(len(ids)),
        n_chats=len(ids),
        mask=torch.arange(ids.shape[1]) < torch.tensor(lengths)[:, None],
        last=torch.tensor(prompts) - 1,
        generating=False,
    )
    deepest = None if is_sharded(hf) else max(reader.sites)
    arming = taps.armed({}, readers=[reader], stop_at=deepest)
    with arming, taps.calling(call), torch.no_grad(), contextlib.suppress(ForwardStopped):
        hf(input_ids=ids.to(device, non_blocking=True), use_cache=False)


def check_reduction(reduce: str) -> Reduction:
    """The reduction itself, or a `SpanError` that lists those there are."""
    for known in get_args(Reduction):
        if reduce == known:
            return cast(Reduction, known)
    raise SpanError(f"got reduce {reduce!r}; wanted one of {', '.join(get_args(Reduction))}")


def collect(reading: Reading, *, progress: bool) -> Activations:
    """All batches of a reading of one span together, chats in their own order."""
    # Imported here, because rich draws random numbers when it is imported.
    from rich.progress import Progress

    chats = len(reading.encoded)
    lengths = torch.zeros(chats, dtype=torch.long)
    values: Tensor | None = None
    moments: Moments | None = None
    with Progress(disable=not progress, transient=True) as bar:
        task = bar.add_task("reading", total=chats)
        for chosen, (part,) in reading.run():
            lengths[chosen] = part.lengths
            if part.moments is not None:
                moments = part.moments if moments is None else moments.merge(part.moments)
            else:
                assert part.values is not None
                values = _placed(values, part.values, chosen, chats)
            bar.advance(task, len(chosen))
    return Activations(
        values=values,
        sites=reading.sites,
        span=reading.spans[0][0],
        lengths=lengths,
        moments=moments,
    )


def _placed(values: Tensor | None, part: Tensor, chosen: Sequence[int], chats: int) -> Tensor:
    """`values` with a part's chats filled in, made or widened where needed."""
    if values is None:
        values = part.new_full((part.shape[0], chats, *part.shape[2:]), torch.nan)
    if part.ndim == 4:
        longest = max(values.shape[2], part.shape[2])
        values, part = (
            nn.functional.pad(t, (0, 0, 0, longest - t.shape[2]), value=torch.nan)
            for t in (values, part)
        )
    values[:, list(chosen)] = part
    return values


def _padded(rows: Tensor, longest: int) -> Tensor:
    return nn.functional.pad(rows, (0, 0, 0, longest - len(rows)), value=torch.nan)


def _require_finite(values: Sequence[Tensor], sites: Sequence[Site], chats: Sequence[int]) -> None:
    """Overflow in half precision spreads silently into every mean: name where it began."""
    for rows, site in zip(values, sites, strict=True):
        if not bool(rows.isfinite().all()):
            raise ModelError(
                f"got infinite or NaN residuals at {site} while reading chats "
                f"{', '.join(map(str, chats))}; load the model in bfloat16 or float32, or look at "
                "its weights"
            )
