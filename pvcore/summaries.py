"""Summaries: what a monitor keeps where nobody asks for its steps one by one.

A score is folded into a few running figures where it is made, and is gone. A batch computes past
the end of a row, and a figure cannot give such a score back: each step is folded only for rows
known to live in it. That is known in time, because stopping criteria are asked between two
forwards; the answers are added up on the device, so that no fold waits for it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple, Protocol, cast, get_args, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

import pvcore_kernels as kernels
from pvcore import outflow
from pvcore.errors import HookError, PlanError
from pvcore.frames import Call, Outcome

Keep = Literal["all", "summary"]

# How many steps of scores may wait on their device to be folded together.
WAITING_STEPS = 32
_REACH = object()


@dataclass(frozen=True, slots=True, kw_only=True)
class TraitSummary:
    """Projections `<h, v/|v|>` of one trait summed up, in units of the residual.

    Layers follow the bank's sites, chats are the returned sequences. `mean`, `highest` and `lowest`
    are over the chat's own steps, those that `TraitScores.steps` would hold: from the last prompt
    token to the position that produced its last token. `count` is how many they are. NaN for a chat
    that has none.
    """

    last_prompt_token: Float[Tensor, "layer chat"]
    count: Int[Tensor, " chat"]
    mean: Float[Tensor, "layer chat"]
    highest: Float[Tensor, "layer chat"]
    lowest: Float[Tensor, "layer chat"]


def check_keep(keep: object) -> Keep:
    """The choice itself, or a `PlanError` that lists those there are."""
    if not isinstance(keep, str) or keep not in get_args(Keep):
        wanted = " or ".join(map(repr, get_args(Keep)))
        raise PlanError(f"got keep={keep!r}; wanted {wanted}")
    return cast(Keep, keep)


class Reach:
    """How many steps of each row are its own, as far as a generation has come.

    Step 0 is every row's. A row that goes on after a token has one step more.
    """

    def __init__(self, call: Call) -> None:
        self.tokens = 0
        self.steps = torch.ones(len(call.rows), dtype=torch.long, device="cpu")
        call.steady[_REACH] = self

    def leave(self, call: Call) -> None:
        """The call is over."""
        call.steady.pop(_REACH, None)

    def note(self, done: Bool[Tensor, " batch"]) -> None:
        """A token was made of every row, with which the rows of `done` ended, or before."""
        self.tokens += 1
        self.steps = self.steps.to(done.device) + ~done


@runtime_checkable
class Ended(Protocol):
    """What knows which rows have ended, by criteria of the caller's own too."""

    done: Bool[Tensor, " batch"]


class Ending:
    """A stopping criterion that tells which rows have ended, called after all others.

    Without `ended`, a row ends with an end token, which is found on the device.
    """

    def __init__(self, reach: Reach, end_ids: Sequence[int], ended: Ended | None) -> None:
        self._reach, self._ended = reach, ended
        self._end_ids = torch.tensor(list(end_ids), dtype=torch.long, device="cpu")
        self._done: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        if self._ended is not None:
            done = self._ended.done.to(input_ids.device)
        else:
            self._end_ids = self._end_ids.to(input_ids.device)
            done = torch.isin(input_ids[:, -1], self._end_ids)
            if self._done is not None:
                done = done | self._done
            self._done = done
        self._reach.note(done)
        return done


@dataclass(frozen=True, slots=True, kw_only=True)
class _Figures:
    """Running figures of every row of a batch, on one device."""

    first: Float[Tensor, "site batch n_vec"]
    count: Int[Tensor, " batch"]
    total: Float[Tensor, "site batch n_vec"]
    highest: Float[Tensor, "site batch n_vec"]
    lowest: Float[Tensor, "site batch n_vec"]

    @classmethod
    def none_yet(
        cls, n_sites: int, batch: int, units: Float[Tensor, "n_vec d_model"], device: torch.device
    ) -> "_Figures":
        def full(value: float, dtype: torch.dtype) -> Tensor:
            shape = (n_sites, batch, len(units))
            return torch.full(shape, value, dtype=dtype, device=device)

        return cls(
            first=full(torch.nan, units.dtype),
            count=torch.zeros(batch, dtype=torch.long, device=device),
            total=full(0.0, torch.float64),
            highest=full(-torch.inf, units.dtype),
            lowest=full(torch.inf, units.dtype),
        )

    def on_host(self) -> "_Figures":
        return _Figures(**{one.name: getattr(self, one.name).cpu() for one in fields(self)})


class _Chosen(NamedTuple):
    """Rows of a piece of a prompt that are steps, their chats, and which are last prompt tokens."""

    at: Int[Tensor, " row"]
    chat: Int[Tensor, " row"]
    firsts: Int[Tensor, " first"]


class Summary:
    """The running figures of one call."""

    def __init__(self, call: Call, last: Int[Tensor, " batch"], n_sites: int) -> None:
        self._call, self._last, self._n_sites = call, last, n_sites
        self._figures: _Figures | None = None
        self._waiting: list[Float[Tensor, "site batch n_vec"]] = []
        self._newest: Tensor | None = None
        self._folded = 0
        # What is chosen of the newest forward over a prompt, the same at every site.
        self._chosen: dict[object, list[_Chosen | None]] = {}

    def score(
        self,
        place: int,
        h: Float[Tensor, "batch pos d_model"],
        units: Float[Tensor, "n_vec d_model"],
        start: int,
    ) -> None:
        """Score a prompt, or a chunk of one from column `start` on, and fold its steps.

        In the very pieces in which all scores would be kept, so that no bit differs.
        """
        whole = not outflow.leaves(h.device)
        rows = h.reshape(-1, h.shape[-1])
        bounds = [(0, len(rows))] if whole else list(outflow.pieces(rows, units))
        key = (start, h.shape[1], h.device, len(bounds))
        if key not in self._chosen:
            self._chosen = {key: list(self._choose(start, h.shape[1], bounds, h.device))}
        with torch.inference_mode():
            if self._figures is None:
                self._figures = _Figures.none_yet(self._n_sites, len(h), units, h.device)
            if place == 0:
                own = self._own(start, h.shape[1]).sum(1)
                self._figures.count.add_(own.to(self._figures.count.device))
            for (begin, end), chosen in zip(bounds, self._chosen[key], strict=True):
                if chosen is not None:
                    scores = kernels.project(h if whole else rows[begin:end], units)
                    _fold_rows(self._figures, place, scores.view(-1, len(units)), chosen)

    def _own(self, start: int, width: int) -> Bool[Tensor, "batch pos"]:
        """The columns of a forward that are steps."""
        columns = torch.arange(start, start + width)
        return self._call.mask[:, start : start + width] & (columns >= self._last[:, None])

    def _choose(
        self, start: int, width: int, bounds: Sequence[tuple[int, int]], device: torch.device
    ) -> Iterator[_Chosen | None]:
        """What to fold of each piece; None for one without a step, which nobody need score."""
        chat, column = self._own(start, width).nonzero().unbind(1)
        at = chat * width + column
        first = column + start == self._last[chat]
        for begin, end in bounds:
            here = (at >= begin) & (at < end)
            if not bool(here.any()):
                yield None
                continue
            yield _Chosen(
                at=(at[here] - begin).to(device),
                chat=chat[here].to(device),
                firsts=first[here].nonzero()[:, 0].to(device),
            )

    def add(self, steps: Sequence[Float[Tensor, "site batch n_vec"]]) -> None:
        """Take the scores of the next decode steps, to be folded by and by."""
        self._waiting += steps
        bytes_ = len(self._waiting) * steps[0].nbytes
        if len(self._waiting) >= WAITING_STEPS or bytes_ >= outflow.PIECE_BYTES:
            self.settle()

    def settle(self) -> None:
        """Fold what waits."""
        waiting, self._waiting = self._waiting, []
        if waiting:
            self.fold(torch.stack(waiting))

    def fold(self, steps: Float[Tensor, "step site batch n_vec"]) -> None:
        """Fold the scores of the next decode steps, which may be written over afterwards.

        Waits for nothing. `HookError` where nothing says which rows they are steps of.
        """
        first, self._folded = self._folded + 1, self._folded + len(steps)
        reach: Reach | None = self._call.steady.get(_REACH)
        if reach is None or reach.tokens < self._folded:
            raise HookError(
                f"got decode step {self._folded} and no word on which rows had ended before it; "
                "this way of generating asks its stopping criteria too late for a summary: use "
                'keep="all"'
            )
        assert self._figures is not None
        device = self._figures.total.device
        with torch.inference_mode():
            numbers = torch.arange(first, self._folded + 1, device=device)
            own = numbers[:, None] < reach.steps.to(device)
            at_once = max(outflow.PIECE_BYTES // steps[0].nbytes, 1)
            pieces = zip(torch.split(steps, at_once), torch.split(own, at_once), strict=True)
            for piece, here in pieces:
                _fold_steps(self._figures, piece.to(device), here)
            self._newest = steps[-1].clone()

    def newest(self) -> Float[Tensor, "site batch n_vec"]:
        """Scores of the step just made."""
        if self._waiting:
            return self._waiting[-1].cpu()
        assert self._figures is not None
        return (self._figures.first if self._newest is None else self._newest).cpu()

    def close(self, outcome: Outcome | None) -> None:
        """No more will come: the figures move to the host.

        `HookError` if they are not over the very steps that the sequences of `outcome` have.
        """
        self.settle()
        self._newest, self._chosen = None, {}
        if self._figures is None:
            return
        self._figures = self._figures.on_host()
        if outcome is not None and not torch.equal(self._figures.count, outcome.lengths):
            raise HookError(
                f"got sequences of {outcome.lengths.tolist()} tokens and summaries of "
                f"{self._figures.count.tolist()} steps; this way of generating ends rows that its "
                'stopping criteria do not know of: use keep="all"'
            )

    def trait(self, at: int) -> TraitSummary:
        """What is known of one trait so far, on the host; chats are the rows of the batch."""
        self.settle()
        assert self._figures is not None
        held = self._figures
        count = held.count.cpu()
        first, total, highest, lowest = (
            one[..., at].cpu() for one in (held.first, held.total, held.highest, held.lowest)
        )
        return TraitSummary(
            last_prompt_token=first,
            count=count,
            mean=(total / count).to(first.dtype),
            highest=highest.masked_fill(count == 0, torch.nan),
            lowest=lowest.masked_fill(count == 0, torch.nan),
        )


def _fold_rows(
    figures: _Figures, place: int, scores: Float[Tensor, "row n_vec"], chosen: _Chosen
) -> None:
    """Fold chosen rows of one site, of which a chat may have several."""
    device = figures.total.device
    picked = scores[chosen.at].to(device)
    chat, firsts = chosen.chat.to(device), chosen.firsts.to(device)
    figures.total[place].index_add_(0, chat, picked.double())
    index = chat[:, None].expand_as(picked)
    figures.highest[place].scatter_reduce_(0, index, picked, "amax")
    figures.lowest[place].scatter_reduce_(0, index, picked, "amin")
    figures.first[place].index_copy_(0, chat[firsts], picked[firsts])


def _fold_steps(
    figures: _Figures,
    steps: Float[Tensor, "step site batch n_vec"],
    own: Bool[Tensor, "step batch"],
) -> None:
    """Fold decode steps of all sites, each for the rows whose own it is."""
    lives = own[:, None, :, None]
    figures.count.add_(own.sum(0))
    figures.total.add_(steps.where(lives, 0.0).sum(0, dtype=torch.float64))
    highest = steps.where(lives, -torch.inf).amax(0)
    torch.maximum(figures.highest, highest, out=figures.highest)
    lowest = steps.where(lives, torch.inf).amin(0)
    torch.minimum(figures.lowest, lowest, out=figures.lowest)


def beside(parts: Sequence[TraitSummary], order: Sequence[int]) -> TraitSummary:
    """One trait of several calls, its chats in the order given, in memory of its own."""
    return TraitSummary(
        **{
            one.name: torch.cat([getattr(part, one.name) for part in parts], dim=-1)[..., order]
            for one in fields(TraitSummary)
        }
    )
