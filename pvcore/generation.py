"""Generation: chats in, tokens out, through transformers' own `generate`.

Prompts are padded on the left whatever the tokenizer's habit, and the call is declared, so that
every forward knows its rows and where its prompts end.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from pvcore.chats import Batch
from pvcore.errors import HookError, ModelError, PlanError
from pvcore.frames import Call, Outcome, columns_run
from pvcore.graph import Graph, GraphEngine
from pvcore.guards import Guard
from pvcore.sessions import Folder, session_on
from pvcore.summaries import Ending, Reach
from pvcore.taps import Taps

_OURS = {"input_ids", "inputs", "inputs_embeds", "attention_mask", "return_dict_in_generate"}
# Decoding that feeds rows pvcore could not tell apart, or positions it takes back again.
_SEVERAL = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp")
_UNORDERED = (*_SEVERAL, "custom_generate", "penalty_alpha")

# Called after every token with the call, all ids, each row's number of tokens, and which rows are
# known to end with it.
Watcher = Callable[[Call, Tensor, Tensor, Tensor], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Generated:
    """New token ids of every returned sequence, cut after its end token."""

    sequences: tuple[Int[Tensor, " _"], ...]


class _Ends:
    """A stopping criterion that runs the caller's own and remembers where each row ended.

    transformers pads a finished row without saying so; only the criteria know that it ended.
    """

    def __init__(self, criteria: Sequence[Any], end_ids: Sequence[int], batch: int) -> None:
        # On the CPU, whatever the default device is.
        self.criteria = criteria
        self.end_ids = torch.tensor(list(end_ids), dtype=torch.long, device="cpu")
        self.lengths = torch.zeros(batch, dtype=torch.long, device="cpu")
        self.done = torch.zeros(batch, dtype=torch.bool, device="cpu")

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.lengths += ~self.done
        stop = torch.isin(input_ids[:, -1].cpu(), self.end_ids)
        for criterion in self.criteria:
            stop = stop | torch.as_tensor(criterion(input_ids, scores, **kwargs)).cpu()
        self.done |= stop
        return self.done.to(input_ids.device)


class _Watch:
    """A stopping criterion: shows every step to guards and a watcher, and ends what they end."""

    def __init__(
        self,
        call: Call,
        guards: Sequence[Guard],
        watcher: Watcher | None,
        ends: _Ends,
        most: int | None,
    ) -> None:
        self.call, self.guards, self.watcher, self.ends = call, guards, watcher, ends
        self.most = most  # columns at which transformers ends every row

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        lengths = self.ends.lengths
        for guard in self.guards:
            guard.watch(self.call, lengths)
        if self.watcher is not None:
            done = self.ends.done | (self.most is not None and input_ids.shape[1] >= self.most)
            for guard in self.guards:
                done = done | guard.stopped(self.call)
            self.watcher(self.call, input_ids, lengths, done)
        for guard in self.guards:
            self.ends.done |= guard.stopped(self.call)
        return self.ends.done.to(input_ids.device)


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One `generate` call over a batch of prompts."""

    hf: Any
    taps: Taps
    tokenizer: Any
    batch: Batch
    pad_id: int
    device: torch.device
    settings: dict[str, Any]
    graph: tuple[GraphEngine, Graph] | None = None

    def __post_init__(self) -> None:
        ours = sorted(_OURS & set(self.settings))
        if ours:
            raise PlanError(
                f"got {', '.join(ours)} as a generation setting; chats are the input, and pvcore "
                "fills these in itself"
            )
        if not hasattr(self.hf, "generation_config"):
            raise ModelError(
                f"got a {type(self.hf).__name__}, which has no head to generate with; load it with "
                "AutoModelForCausalLM"
            )
        if self.graph is not None or self.taps.is_armed():
            self._refuse_unordered()

    def _refuse_unordered(self) -> None:
        unordered = [name for name in _UNORDERED if self._setting(name) not in (None, False)]
        if self._setting("guidance_scale") not in (None, 1):
            unordered.append("guidance_scale")
        if unordered:
            raise PlanError(
                f"got {', '.join(unordered)} while a plan is armed, in a stream or with "
                "engine='graph'; such decoding takes positions back, or runs forwards that are no "
                "steps: use greedy, sampling or beam search"
            )

    def _setting(self, name: str) -> Any:
        """A setting as transformers will see it: argument, given config, then the model's own."""
        if name in self.settings:
            return self.settings[name]
        configs = (self.settings.get("generation_config"), self.hf.generation_config)
        values = (getattr(config, name, None) for config in configs)
        return next((value for value in values if value is not None), None)

    @property
    def copies(self) -> int:
        """How many rows of the batch one chat takes."""
        return max(self._setting("num_beams") or 1, self._setting("num_return_sequences") or 1)

    @property
    def _end_ids(self) -> list[int]:
        ends = self._setting("eos_token_id")
        if ends is None:
            return []
        return [int(one) for one in torch.as_tensor(ends).reshape(-1)]

    @property
    def _most_columns(self) -> int | None:
        """How many columns a row may have, prompt included, where a setting says so."""
        new = self._setting("max_new_tokens")
        longest = self._setting("max_length") if new is None else self.batch.ids.shape[1] + new
        return None if longest is None else int(longest)

    def run(self, watcher: Watcher | None = None) -> Generated:
        """Generate, and report the outcome to everything that watched."""
        if watcher is not None or self.taps.is_armed():
            self._refuse_unordered()
        chats, copies = len(self.batch.ids), self.copies
        call = Call(
            rows=torch.arange(chats).repeat_interleave(copies),
            n_chats=chats,
            mask=self.batch.mask.repeat_interleave(copies, 0),
            last=torch.full((chats * copies,), self.batch.ids.shape[1] - 1),
            generating=True,
        )
        armed = self.taps.is_armed()
        reach = Reach(call) if self._sums_up() else None
        guards = self._guards(watcher is not None)
        settings, ends = self._prepared(call, guards, watcher, reach)
        with self.taps.calling(call) as outcomes:
            output = self._generate(call, watcher is not None)(
                input_ids=self.batch.ids.to(self.device),
                attention_mask=self.batch.mask.long().to(self.device),
                return_dict_in_generate=True,
                **settings,
            )
            new = output.sequences[:, self.batch.ids.shape[1] :].cpu()
            if armed and self.graph is None and self.taps.is_armed():
                self._require_steps(call, new.shape[1])
            beams = getattr(output, "beam_indices", None)
            lengths = ends.lengths if ends else self._lengths(new)
            rows = torch.arange(len(new))[:, None].expand(-1, new.shape[1])
            if beams is not None:
                beams = beams.cpu()
                lengths, rows = (beams >= 0).sum(1), beams.clamp(min=0)
            outcomes.append(Outcome(rows=rows, lengths=lengths))
        if reach is not None:
            reach.leave(call)
        return Generated(
            sequences=tuple(row[:n] for row, n in zip(new, lengths.tolist(), strict=True))
        )

    def _require_steps(self, call: Call, n_tokens: int) -> None:
        """`HookError` unless the plan acted in the step of every token."""
        wanted = self.batch.ids.shape[1] + n_tokens - 1
        got = columns_run(call)
        if n_tokens and got < wanted:
            raise HookError(
                f"got {n_tokens} tokens, {wanted - got} of them from steps that passed no tap: "
                "transformers runs a step that it compiled before this model was hooked (for "
                "it or for another of its class); use engine='graph', or disable_compile=True, or "
                "call torch.compiler.reset() first"
            )

    def _sums_up(self) -> bool:
        """Whether an armed monitor keeps summaries; `PlanError` where they would be wrong."""
        session = session_on(self.taps.key)
        readers = session.readers if session else ()
        sums_up = any(isinstance(reader, Folder) and reader.folds for reader in readers)
        if sums_up and (self._setting("num_beams") or 1) > 1:
            raise PlanError(
                'got beams under a monitor with keep="summary": which steps a returned sequence '
                'came through is known only when the search ends; use keep="all", or greedy or '
                "sampling"
            )
        return sums_up

    def _guards(self, streams: bool) -> list[Guard]:
        """The armed guards that each token waits for.

        All with alarms in a stream, or where scores are gone before they could be looked back at.
        """
        session = session_on(self.taps.key)
        guards = [
            reader
            for reader in (session.readers if session else ())
            if isinstance(reader, Guard)
            and (reader.acts or (reader.sounds and (streams or reader.folds)))
        ]
        if guards and (self._setting("num_beams") or 1) > 1:
            raise PlanError(
                "got beams under a monitor that acts on alarms: a beam is no reply until the "
                "search ends; use greedy or sampling, or leave on_alarm out"
            )
        return guards

    def _generate(self, call: Call, streams: bool) -> Callable[..., Any]:
        if self.graph is None:
            generate: Callable[..., Any] = self.hf.generate
            return generate
        engine, graph = self.graph
        return partial(engine.generate, graph, call, self._setting, streams)

    def _prepared(
        self,
        call: Call,
        guards: Sequence[Guard],
        watcher: Watcher | None,
        reach: Reach | None,
    ) -> tuple[dict[str, Any], _Ends | None]:
        """Settings for transformers, with the criteria that know where a row ended."""
        from transformers import StoppingCriteriaList

        settings = dict(self.settings)
        settings.setdefault("pad_token_id", self._setting("pad_token_id"))
        if settings["pad_token_id"] is None:
            settings["pad_token_id"] = self.pad_id
        if self._setting("stop_strings") is not None:
            settings.setdefault("tokenizer", self.tokenizer)
        criteria = list(settings.pop("stopping_criteria", None) or ())
        beams = (self._setting("num_beams") or 1) > 1
        ends: _Ends | None = None
        watched = bool(guards) or watcher is not None
        # Drafted tokens come several at once, in a batch of one, whose end is that of its ids.
        drafted = any(self._setting(name) not in (None, False) for name in _SEVERAL)
        stops = bool(criteria) or self._setting("stop_strings") is not None
        if not beams and (watched or (stops and not drafted)):
            ends = _Ends([*criteria, *self._stop_strings()], self._end_ids, len(call.rows))
            watch = _Watch(call, guards, watcher, ends, self._most_columns)
            criteria = [ends, watch] if watched else [ends]
        if reach is not None:
            criteria.append(Ending(reach, self._end_ids, ends))
        if criteria:
            settings["stopping_criteria"] = StoppingCriteriaList(criteria)
        return settings, ends

    def _stop_strings(self) -> list[Any]:
        from transformers import StopStringCriteria

        strings = self._setting("stop_strings")
        if strings is None:
            return []
        tokenizer = self.settings.get("tokenizer", self.tokenizer)
        if tokenizer is None:
            raise PlanError(
                "got stop_strings and a model without a tokenizer, which tells where a text ends; "
                "give the model its tokenizer"
            )
        return [StopStringCriteria(tokenizer, strings)]

    def _lengths(self, new: Int[Tensor, "sequence step"]) -> Int[Tensor, " sequence"]:
        """Tokens up to and including the first end token."""
        ended = torch.isin(new, torch.tensor(self._end_ids, dtype=new.dtype, device=new.device))
        first = torch.where(ended.any(1), ended.int().argmax(1), new.shape[1] - 1)
        return first + 1
