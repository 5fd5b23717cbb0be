"""Frames: what one forward pass carries. Which rows, which columns, which of them are prompt.

A *call* knows the prompts: pvcore's own generate, stream and read declare theirs. For a forward
somebody else runs, the call is worked out from the forward's arguments, or refused where that
would be a guess. Columns count all positions since the start of the sequence, padding included.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from pvcore.errors import HookError, SpanError
from pvcore.spans import Span

Phase = Literal["prefill", "decode"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Call:
    """The prompts behind one or more forwards. All tensors live on the CPU.

    `rows` gives the chat of every batch row (beams and returned sequences repeat a chat), `mask`
    the real tokens among the given columns, `last` the column of each row's last prompt token.
    `steady` keeps what is worked out once for all decode steps. Calls of one `group` are parts of
    one request, whose rows belong in the order of their chats.
    """

    rows: Int[Tensor, " batch"]
    n_chats: int
    mask: Bool[Tensor, "batch given"]
    last: Int[Tensor, " batch"] | None
    generating: bool
    group: object = field(default_factory=object)
    steady: dict[object, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Outcome:
    """How a generation ended: where each returned sequence came from.

    Token `t` of sequence `s` was produced by batch row `rows[s, t]` in step `t`; `lengths[s]`
    counts its tokens, the end token included.
    """

    rows: Int[Tensor, "sequence step"]
    lengths: Int[Tensor, " sequence"]


def chat_order(calls: Sequence[Call], counts: Sequence[int]) -> list[int]:
    """Calls in the order they came; parts of one request in the order of its chats."""
    first: dict[object, int] = {}
    keys: list[tuple[int, int]] = []
    for number, (call, n_rows) in enumerate(zip(calls, counts, strict=True)):
        group = first.setdefault(call.group, number)
        keys += (
            [(group, int(chat)) for chat in call.rows]
            if not call.generating
            else ([(group, sequence) for sequence in range(n_rows)])
        )
    return sorted(range(len(keys)), key=keys.__getitem__)


# Under which a call keeps the columns its recurrent state has seen, its newest frame, and of a
# call that pvcore did not declare the newest frame's columns only.
_COUNTED, _NEWEST, _SPAN = object(), object(), object()
_NO_CALLS: Mapping[int, Call] = MappingProxyType({})
DECLARED: ContextVar[Mapping[int, Call]] = ContextVar("pvcore_declared", default=_NO_CALLS)
_FOREIGN: ContextVar[Mapping[int, Call]] = ContextVar("pvcore_foreign", default=_NO_CALLS)


@contextmanager
def running(owner: int, call: Call) -> Iterator[None]:
    """Declare the call that the forwards of decoder `owner` inside this block belong to."""
    token = DECLARED.set({**DECLARED.get(), owner: call})
    try:
        yield
    finally:
        DECLARED.reset(token)
        # What knows the call outlives it, and would keep the cache it filled.
        newest = call.steady.pop(_NEWEST, None)
        if newest is not None:
            newest.cache = None


class Frame:
    """One forward of `batch` rows over columns `start` to `start + width`."""

    __slots__ = (
        "_masks",
        "batch",
        "cache",
        "call",
        "declared",
        "notes",
        "recorded",
        "start",
        "steady",
        "trains",
        "width",
    )

    def __init__(self, call: Call, batch: int, start: int, width: int, declared: bool) -> None:
        self.call, self.batch, self.start, self.width = call, batch, start, width
        self.declared = declared
        self.cache: Any = None
        self.steady = width == 1 and start >= call.mask.shape[1]
        # Whether autograd records this forward, and whether it does for a training step. Blocks
        # that reentrant checkpointing runs see gradients turned off in either.
        self.recorded = torch.is_grad_enabled()
        self.trains = False
        self._masks: dict[Span, Tensor | bool] = {}
        # What each reader keeps of this forward; gone with it if it fails.
        self.notes: dict[object, Any] = {}

    def select(self, span: Span | None) -> Bool[Tensor, "batch pos"] | bool:
        """The tokens of a span in this frame: True for every one, False for none, or a mask.

        None is the default of interventions: `response` while generating, else `all`.
        """
        if span is None:
            span = "response" if self.call.generating else "all"
        if self.steady:
            return span in ("all", "response")
        if span not in self._masks:
            mask = self._mask(span)
            everything, nothing = bool(mask.all()), not bool(mask.any())
            self._masks[span] = everything if everything or nothing else mask
        return self._masks[span]

    def _mask(self, span: Span) -> Bool[Tensor, "batch pos"]:
        columns = torch.arange(self.start, self.start + self.width)
        real = self.real()
        if span == "all":
            return real
        if self.call.last is None:
            raise SpanError(
                f"got span {span!r} in a forward that does not say where its prompts end; use "
                "span='all', or run it through model.generate(...) or model.read(...)"
            )
        last = self.call.last[:, None]
        if span == "prompt":
            return real & (columns <= last)
        if span == "last_prompt_token":
            return columns == last
        return real & (columns >= last)

    def real(self) -> Bool[Tensor, "batch pos"]:
        """Tokens that are no padding; generated columns count as real."""
        given = self.call.mask[:, self.start : self.start + self.width]
        generated = torch.ones(self.batch, self.width - given.shape[1], dtype=torch.bool)
        return torch.cat([given, generated], dim=1)


def tokens_of(given: Mapping[str, Any]) -> Tensor | None:
    """The ids or embeddings that a decoder is called with."""
    ids: Tensor | None = given.get("input_ids")
    return given.get("inputs_embeds") if ids is None else ids


def begin_frame(
    owner: int, given: Mapping[str, Any], *, training: bool, packed: bool = False
) -> Frame:
    """The frame of a forward of decoder `owner`, from the arguments it is called with.

    `packed` allows several conversations behind each other in one row, which count as one.
    """
    tokens = tokens_of(given)
    if tokens is None or "block_table" in given or ("cu_seq_lens_q" in given and not packed):
        raise HookError(
            "got a forward whose rows are packed or missing (continuous batching?); pvcore cannot "
            "tell its conversations apart: run it with one row per conversation"
        )
    batch, width = int(tokens.shape[0]), int(tokens.shape[1])
    call = DECLARED.get().get(owner)
    declared = call is not None
    cache = given.get("past_key_values", given.get("cache_params"))
    start = 0 if cache is None else _columns_in(cache, owner, call, width)
    if call is None:
        call = _foreign_call(owner, given.get("attention_mask"), batch, start, width, training)
    if len(call.rows) != batch:
        raise HookError(
            f"got a forward of {batch} rows inside a call of {len(call.rows)}; assisted or "
            "contrastive decoding reorders rows: use greedy, sampling or beam search"
        )
    frame = Frame(call, batch, start, width, declared)
    frame.cache = cache
    if declared:
        _check_columns(frame)
    elif call.generating and call is _FOREIGN.get().get(owner):
        _check_foreign(frame)
    frame.trains = training and frame.recorded
    return frame


def _check_columns(frame: Frame) -> None:
    """Whether a forward of a declared call goes on where the one before ended.

    Prompt tuning brings columns of its own, and guidance runs forwards that are no steps: neither
    can be told apart from the chats later on.
    """
    call = frame.call
    end, before = frame.start + frame.width, call.steady.get(_NEWEST)
    if before is None:
        given = call.mask.shape[1]
        if frame.start >= given:
            raise HookError(
                "got a plan armed in the middle of a generation, whose steps before it were not "
                "seen; arm it before, or give the monitor on_alarm and standby"
            )
        if end > given:
            raise HookError(
                f"got a forward of {end} columns for chats of {given}; the model adds tokens of "
                "its own (prompt or prefix tuning?), whose positions pvcore cannot tell apart"
            )
    else:
        _check_step(frame, before.start, before.width)
    call.steady[_NEWEST] = frame


def _check_step(frame: Frame, start: int, width: int) -> None:
    """Whether a forward goes on where the one before ended, or repeats it with one token more."""
    if frame.start != start + width and (frame.start > 0 or frame.width != width + 1):
        raise HookError(
            f"got a forward over columns {frame.start} to {frame.start + frame.width} after one "
            f"that ended at {start + width}; something runs forwards that are no steps of this "
            "generation (guidance, drafted tokens, a logits processor): run it with nothing armed, "
            "or take it out"
        )


def _check_foreign(frame: Frame) -> None:
    """The same for a generation that pvcore did not start, of which only the columns are kept."""
    before = frame.call.steady.get(_SPAN)
    if before is not None:
        _check_step(frame, *before)
    frame.call.steady[_SPAN] = frame.start, frame.width


def goes_on(frame: Frame, owner: int, given: Mapping[str, Any]) -> bool:
    """Whether a forward is the decode step after `frame`, a step of the same declared call."""
    tokens = given.get("input_ids")
    return (
        frame.steady
        and frame.declared
        and tokens is not None
        and tokens.shape == (frame.batch, 1)
        and given.get("past_key_values", given.get("cache_params")) is frame.cache
        and DECLARED.get().get(owner) is frame.call
    )


def columns_run(call: Call) -> int:
    """How many columns the forwards of a declared call were seen to run, from the start on."""
    newest = call.steady.get(_NEWEST)
    return 0 if newest is None else newest.start + newest.width


def columns_unseen(frame: Frame) -> int:
    """How many columns came into a frame's cache behind its own, in forwards that were not seen.

    None are counted of a declared call, which whoever declared it answers for.
    """
    if frame.cache is None or frame.declared:
        return 0
    try:
        held = int(frame.cache.get_seq_length())
    except ValueError:  # a recurrent state does not say
        return 0
    return max(held - frame.start - frame.width, 0)


def _columns_in(cache: Any, owner: int, call: Call | None, width: int) -> int:
    """How many columns a cache holds. A recurrent state does not say, so its calls are counted."""
    try:
        return int(cache.get_seq_length())
    except ValueError:
        pass
    if call is None and _generation_phase() == "decode":
        call = _FOREIGN.get().get(owner)
    if not cache.has_previous_state():
        start = 0
    elif call is None:
        raise HookError(
            "got a forward on a recurrent state that was filled elsewhere, which does not say how "
            "many tokens it has seen; run the model through model.generate(...)"
        )
    else:
        start = call.steady.get(_COUNTED, call.mask.shape[1])
    if call is not None:
        call.steady[_COUNTED] = start + width
    return start


def _foreign_call(
    owner: int, mask: Any, batch: int, start: int, width: int, training: bool
) -> Call:
    """The call of a forward that pvcore did not start."""
    phase = _generation_phase()
    if phase == "decode":
        known = _FOREIGN.get().get(owner)
        if known is not None and len(known.rows) == batch:
            return known
        if start == 0:
            raise HookError(
                "got a generation that does not run its prompt by itself (drafted tokens?), whose "
                "prompt and reply cannot be told apart; use greedy, sampling or beam search, or "
                "run it with nothing armed"
            )
    if start > 0:
        if phase == "prefill":
            _FOREIGN.set({key: one for key, one in _FOREIGN.get().items() if key != owner})
        return _continued(batch, start, width, phase)
    real = _real_columns(mask, batch, width)
    columns = torch.arange(width).expand(batch, width)
    last = None if training else columns.masked_fill(~real, -1).amax(1)
    call = Call(
        rows=torch.arange(batch), n_chats=batch, mask=real, last=last, generating=phase is not None
    )
    if phase is not None:
        _FOREIGN.set({**_FOREIGN.get(), owner: call})
    return call


def _continued(batch: int, start: int, width: int, phase: Phase | None) -> Call:
    """A forward on a cache filled elsewhere: one token is a reply's, more are unclear."""
    given = 0 if width == 1 and phase != "prefill" else start + width
    return Call(
        rows=torch.arange(batch),
        n_chats=batch,
        mask=torch.ones(batch, given, dtype=torch.bool),
        last=None,
        generating=phase is not None,
    )


def _real_columns(mask: Any, batch: int, width: int) -> Bool[Tensor, "batch pos"]:
    """Real tokens of a first forward, from a 2-D mask or from the 4-D masks transformers makes."""
    if isinstance(mask, Mapping):
        mask = mask.get("full_attention", next(iter(mask.values())))
    if mask is None:
        return torch.ones(batch, width, dtype=torch.bool)
    if mask.ndim == 2:
        return torch.as_tensor(mask[:, -width:]).bool().cpu()
    # A token attends to itself exactly when it is no padding.
    diagonal = mask[:, 0, torch.arange(width), torch.arange(width)].cpu()
    real: Tensor = diagonal if diagonal.dtype == torch.bool else diagonal > -1
    return real.expand(batch, width)


def _generation_phase() -> Phase | None:
    """Whether transformers' own `generate` is running this forward, and in which phase.

    The arguments of a forward do not tell a prompt's chunk from a reply's tokens, nor an uncached
    decode step from a new prompt; the call stack does.
    """
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_name
        if name in ("_prefill", "generate") and frame.f_globals.get("__name__") == (
            "transformers.generation.utils"
        ):
            return "prefill" if name == "_prefill" else "decode"
        frame = frame.f_back  # type: ignore[assignment]
    return None
