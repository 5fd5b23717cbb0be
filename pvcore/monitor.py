"""Monitoring: projections on every vector of a bank while a model reads and generates.

In a prompt each site is scored as it is reached, because keeping every layer's rows would hold
gigabytes; the scores leave an accelerator as they are made. In decode the newest rows are collected
and all layers are scored at once: step by step on an accelerator, and on a CPU, where the call
costs more than the arithmetic, several steps together unless somebody asks for the newest.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

import pvcore_kernels as kernels
from pvcore.errors import HookError, VectorError
from pvcore.frames import Call, Frame, Outcome, chat_order
from pvcore.outflow import PIECE_BYTES, Outflow, leaves
from pvcore.sessions import Columns, Copies, Take
from pvcore.sites import Site
from pvcore.step_tables import beside_each_other, ragged
from pvcore.summaries import Summary, TraitSummary, beside
from pvcore.vectors import VectorBank
from pvcore_kernels import paths
from pvcore_kernels.reference import accumulator

WAITING_BYTES = 4 << 20
WAITING_STEPS = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class TraitScores:
    """Projections `<h, v/|v|>` of one trait, in units of the residual.

    Layers follow the bank's sites, chats are the returned sequences. Step `t` is the position that
    produced token `t`: step 0 is the last prompt token. Steps after a sequence's end are NaN.
    `prompt` counts each chat's own tokens from 0, NaN after its last.
    """

    last_prompt_token: Float[Tensor, "layer chat"]
    steps: Float[Tensor, "step layer chat"]
    prompt: Float[Tensor, "position layer chat"]


@dataclass(slots=True, kw_only=True, eq=False)
class _Record:
    """What one call showed, as it comes in. Scores are `[batch, column, n_vec]` per site."""

    call: Call
    given: dict[Site, list[Tensor]] = field(default_factory=dict)
    # For each site the rows of steps that are not scored yet, and how many of them may be kept.
    columns: Columns
    patience: int = 0
    steps: list[Float[Tensor, "site batch n_vec"]] = field(default_factory=list)
    # Where scores leave the device, and how many of the newest steps have not yet.
    outflow: Outflow = field(default_factory=Outflow)
    staying: int = 0
    # Brings what an engine has scored and not handed over; None when nothing is under way.
    fetch: Callable[[], None] | None = None
    outcome: Outcome | None = None
    # Takes the scores where nothing else is to be kept of them.
    summary: Summary | None = None
    # Steps and prompt of all traits as they were last put together, and of how much.
    tables: tuple[Tensor, Tensor] | None = None
    told: tuple[int, int, bool] = (0, 0, False)

    # The residuals of the first step, with their versions, and whether they have been looked at.
    met: list[tuple[Tensor, int | None]] = field(default_factory=list)
    looked: bool = False

    def look(self, place: int, h: Tensor) -> None:
        """Keep a row of the first step, and note whether its memory is written to again."""
        self.met.append((h, None if h.is_inference() else h._version))
        self.columns.rows[place].append(h[:, -1:].clone())

    def settle_rows(self) -> None:
        """Keep copies from now on where the model updates its residual in place."""
        if self.met:
            places = {h.data_ptr() for h, _ in self.met}
            moved = any(version is not None and h._version != version for h, version in self.met)
            if moved or len(places) < len(self.met):
                self.columns.rows = [Copies(rows) for rows in self.columns.rows]
            self.met, self.looked = [], True

    def extent(self) -> tuple[int, int, bool]:
        """How much came in: more of it makes other tables."""
        return len(self.steps), sum(map(len, self.given.values())), self.outcome is not None

    def given_scores(self, sites: Sequence[Site]) -> Float[Tensor, "column site batch n_vec"]:
        self.outflow.settle()
        per_site = [torch.cat(self.given[site], dim=1) for site in sites]
        return torch.stack(per_site).permute(2, 0, 1, 3)

    def keep(self, steps: Sequence[Float[Tensor, "site batch n_vec"]]) -> None:
        """Add the scores of new steps; many leave their device together."""
        if self.summary is not None:
            self.summary.add(steps)
            return
        self.steps += steps
        if not leaves(steps[0].device):
            return
        self.staying += len(steps)
        if self.staying * steps[0].nbytes >= PIECE_BYTES:
            newest = torch.stack(self.steps[-self.staying :])
            host = torch.empty(newest.shape, dtype=newest.dtype)
            self.outflow.send(host, newest)
            self.steps[-self.staying :] = host.unbind(0)
            self.staying = 0

    def last(self) -> Tensor:
        """Column of each row's last prompt token."""
        if self.call.last is not None:
            return self.call.last
        columns = torch.arange(self.call.mask.shape[1]).expand_as(self.call.mask)
        return columns.masked_fill(~self.call.mask, -1).amax(1)

    def newest(self, sites: Sequence[Site]) -> Float[Tensor, "site batch n_vec"]:
        """Scores of the step just made."""
        if self.summary is not None:
            return self.summary.newest()
        self.outflow.settle()
        if self.steps:
            return self.steps[-1].cpu()
        return torch.stack([self._last_given(self.given[site]) for site in sites])

    def _last_given(self, chunks: Sequence[Tensor]) -> Float[Tensor, "batch n_vec"]:
        """The last prompt tokens at one site; the whole prompt is put together only for padding
        on the right that is longer than the newest chunk.
        """
        last, before = self.last(), sum(chunk.shape[1] for chunk in chunks[:-1])
        scores = chunks[-1]
        if bool((last < before).any()):
            scores, before = torch.cat([*chunks], dim=1), 0
        return scores[torch.arange(len(last)), last - before]


class Seen:
    """What a monitor saw: `seen["evil"].last_prompt_token`, `.steps` and `.prompt`.

    Calls made inside one block follow each other along the chat axis.
    """

    before = False
    folds = False

    def __init__(self, bank: VectorBank | None) -> None:
        self._bank = bank
        self._records: dict[Call, _Record] = {}
        self._units: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        self._one_device: bool | None = None

    @property
    def sites(self) -> tuple[Site, ...]:
        return self._bank.sites if self._bank else ()

    @property
    def traits(self) -> tuple[str, ...]:
        return tuple(self._bank.traits) if self._bank else ()

    @property
    def n_vec(self) -> int:
        return len(self.traits)

    def __getitem__(self, trait: str) -> TraitScores:
        at, records = self._asked(trait)
        parts = [(steps[at], prompt[at]) for steps, prompt in map(self._tables, records)]
        order = chat_order([record.call for record in records], [p.shape[-1] for p, _ in parts])
        steps, prompt = (beside_each_other([part[k] for part in parts])[..., order] for k in (0, 1))
        return TraitScores(last_prompt_token=steps[0], steps=steps, prompt=prompt)

    def _asked(self, trait: str) -> tuple[int, list[_Record]]:
        """A trait's place in the bank, and all that has been seen so far."""
        if self._bank is None:
            raise VectorError(f"got {trait!r}, but this plan watches nothing: give it monitor=bank")
        if trait not in self.traits:
            raise VectorError(f"got trait {trait!r}; this monitor watches {', '.join(self.traits)}")
        if not self._records:
            raise HookError("got no forward to report yet; run the model inside the block first")
        records = list(self._records.values())
        for record in records:
            self._catch_up(record)
        return self.traits.index(trait), records

    def begin(self, frame: Frame) -> Take:
        if not frame.declared and (frame.call.generating or frame.start > 0):
            raise HookError(
                "got a generation that pvcore does not run, whose beams and ends cannot be known; "
                "monitor it with model.generate(...) or model.stream(...)"
            )
        record = self._records.get(frame.call) or self._new_record(frame.call)
        frame.notes[self] = record
        if not self._stepping(frame):
            return lambda place, h: self._score_given(record, place, h, frame.start)
        if not record.looked:
            record.met = []
            return record.look
        return lambda place, h: record.columns.rows[place].append(h[:, -1:])

    def _new_record(self, call: Call) -> _Record:
        record = _Record(call=call, columns=Columns(len(self.sites)))
        if self.folds:
            record.summary = Summary(call, record.last(), len(self.sites))
        return record

    def columns(self, frame: Frame) -> Columns:
        record: _Record = frame.notes[self]
        return record.columns

    def end(self, frame: Frame) -> None:
        record: _Record = frame.notes[self]
        self._records[frame.call] = record
        if record.summary is not None and not frame.call.generating:
            record.summary.close(None)  # one forward is all there is
        waiting = len(record.columns.rows[0])
        if waiting == 0:
            return
        record.settle_rows()
        if not record.patience:
            record.patience = _patience([column[0] for column in record.columns.rows])
        if waiting >= record.patience or frame.width > 1:
            self._score_waiting(record)

    def _score_given(
        self, record: _Record, place: int, h: Float[Tensor, "batch pos d_model"], start: int
    ) -> None:
        """Score a prompt, or a chunk of one, where it stands."""
        if record.summary is not None:
            record.summary.score(place, h.detach(), self._placed(h)[place], start)
            return
        site = self.sites[place]
        scores = record.outflow.project(h.detach(), self._placed(h)[place])
        if site not in record.given:
            # Columns that a cache handed over were never seen here.
            unseen = scores.new_full((len(scores), start, scores.shape[-1]), torch.nan)
            record.given[site] = [unseen]
        record.given[site].append(scores)

    def _catch_up(self, record: _Record) -> None:
        """Have the scores of every step made so far, whoever makes them."""
        if record.fetch is not None:
            record.fetch()
        self._score_waiting(record)

    def _score_waiting(self, record: _Record) -> None:
        """Score the steps that wait, all layers at once, or one by one where devices differ."""
        steps = record.columns.take()
        if not steps:
            return
        if self._one_device is None:
            self._one_device = len({row.device for row in steps[0]}) == 1
        with torch.no_grad():
            if not self._one_device:
                record.keep([self._scored_apart(rows) for rows in steps])
                return
            rows = torch.cat([row for step in steps for row in step], dim=1)
            by_step = rows.view(len(rows), len(steps), -1, rows.shape[-1]).permute(1, 2, 0, 3)
            units = self._placed(rows)
            # Kernels take rows as they lie; torch would multiply them by another way than in rows.
            if not paths.takes_kernels(rows.device, rows.dtype):
                by_step = by_step.contiguous()
            # Step by step, so that no sum depends on how many steps waited.
            record.keep([kernels.project_layers(one, units) for one in by_step])

    def _scored_apart(
        self, rows: Sequence[Float[Tensor, "batch 1 d_model"]]
    ) -> Float[Tensor, "site batch n_vec"]:
        scores = [
            kernels.project(row.squeeze(1), self._placed(row)[place]).cpu()
            for place, row in enumerate(rows)
        ]
        return torch.stack(scores)

    def close(self, call: Call, outcome: Outcome | None) -> None:
        if call in self._records:
            self._records[call].fetch = None
        if outcome is not None:
            self._score_waiting(record := self._records[call])
            record.outcome = outcome
            if record.summary is not None:
                record.summary.close(outcome)
        elif call.generating:
            # A generation that failed has no sequences whose rows could be reported.
            self._records.pop(call, None)

    def settle(self, call: Call, fetch: Callable[[], None]) -> None:
        """Wait for the prompt's scores on their way to the host."""
        record = self._records[call]
        record.outflow.settle()
        record.fetch = fetch

    def receive(self, call: Call, steps: Float[Tensor, "step site batch n_vec"]) -> None:
        """Scores of decode steps that an engine made without coming past `take`."""
        self._records[call].steps.extend(steps.unbind(0))

    def fold(self, call: Call, steps: Float[Tensor, "step site batch n_vec"]) -> None:
        """Scores of decode steps where an engine made them, in a ring of its own."""
        summary = self._records[call].summary
        assert summary is not None
        summary.fold(steps)

    def newest(self, call: Call | None = None) -> Float[Tensor, "site batch n_vec"]:
        """Scores of the step just made by a call, or by the one that runs now."""
        record = next(reversed(self._records.values())) if call is None else self._records[call]
        self._catch_up(record)
        return record.newest(self.sites)

    def _stepping(self, frame: Frame) -> bool:
        """Whether the frame's news is one reply token; an uncached step repeats the prompt too."""
        return frame.start + frame.width > frame.call.mask.shape[1]

    def _placed(self, like: Tensor) -> Float[Tensor, "site n_vec d_model"]:
        return self.units(like.device, accumulator(like.dtype))

    def units(
        self, device: torch.device, dtype: torch.dtype
    ) -> Float[Tensor, "site n_vec d_model"]:
        """The unit rows of the bank, copied once to each device and dtype they meet."""
        key = (device, dtype)
        if key not in self._units:
            assert self._bank is not None
            directions = self._bank.directions.double()
            units = directions / directions.norm(dim=-1, keepdim=True)
            self._units[key] = units.to(*key)
        return self._units[key]

    def _tables(self, record: _Record) -> tuple[Tensor, Tensor]:
        """Steps and prompt of every trait, `[trait, step, site, sequence]` and `[trait, position,
        ...]`, put together once for all that ask until more comes in.
        """
        if record.tables is None or record.told != record.extent():
            record.told = record.extent()
            record.tables = self._put_together(record)
        return record.tables

    def _put_together(self, record: _Record) -> tuple[Tensor, Tensor]:
        given = record.given_scores(self.sites).permute(3, 0, 1, 2).contiguous()
        mask, last = record.call.mask, record.last()
        prompts, replies = [], []
        for row in range(len(last)):
            own = mask[row].nonzero()[:, 0]
            prompts.append(given[..., row][:, own[own <= last[row]]])
            replies.append(given[..., row][:, own[own >= last[row]]])
        prompt, steps = ragged(prompts), ragged(replies)
        if record.outcome is None and not record.steps:
            return steps, prompt
        record.outflow.settle()
        made = steps[:, :1]
        if record.steps:
            later = torch.stack([step.cpu() for step in record.steps])
            made = torch.cat([made, later.permute(3, 0, 1, 2)], dim=1)
        if record.outcome is None:  # still under way: rows are those of the batch
            return made, prompt
        return self._sequences(record.outcome, made, prompt)

    def _sequences(self, outcome: Outcome, steps: Tensor, prompt: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of the batch followed into the returned sequences."""
        count = outcome.rows.shape[1]
        rows = steps[:, torch.arange(count)[:, None], :, outcome.rows.T]
        followed = rows.permute(2, 0, 3, 1).contiguous()
        over = torch.arange(count)[:, None] >= outcome.lengths
        return followed.masked_fill(over[:, None], torch.nan), prompt[..., outcome.rows[:, 0]]


class SeenSummary(Seen):
    """What a monitor saw that keeps no projection of any step: `seen["evil"]` is a `TraitSummary`.

    Calls made inside one block follow each other along the chat axis.
    """

    folds = True

    def __getitem__(self, trait: str) -> TraitSummary:  # type: ignore[override]
        at, records = self._asked(trait)
        parts = [one.summary.trait(at) for one in records if one.summary is not None]
        order = chat_order([one.call for one in records], [len(part.count) for part in parts])
        return beside(parts, order)


def _patience(rows: Sequence[Float[Tensor, "batch 1 d_model"]]) -> int:
    """How many steps may wait to be scored; rows that live elsewhere or in a graph may not."""
    if any(row.device.type != "cpu" or row.requires_grad for row in rows):
        return 1
    step = sum(row.numel() * row.element_size() for row in rows)
    return min(max(WAITING_BYTES // step, 1), WAITING_STEPS)
