"""HookedModel: a Hugging Face causal language model whose residual stream is in reach."""

from collections.abc import Iterable, Iterator, Sequence
from os import PathLike
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from pvcore import chats as chat_ids
from pvcore.activations import (
    Activations,
    Reading,
    Reduction,
    check_reduction,
    collect,
    run_to_deepest,
)
from pvcore.alarms import Alarms
from pvcore.arming import Arming
from pvcore.blocks import find_decoder, input_device, max_length, require_embedded
from pvcore.chats import Chats, Encoded
from pvcore.errors import ChatError, ModelError, PlanError
from pvcore.generation import Request
from pvcore.graph import Engine, Graph, GraphEngine, check_engine
from pvcore.guards import Guard, Reaction, Rules, Standby
from pvcore.plan import Plan
from pvcore.sessions import Reader
from pvcore.sites import Site, as_sites
from pvcore.spans import Span, check_span
from pvcore.stream import Step
from pvcore.streaming import steps
from pvcore.taps import taps_of
from pvcore.trace import Residuals, Tracing
from pvcore.vectors import VectorBank


class HookedModel(Arming):
    """Read, patch, steer and monitor a decoder-only transformers model.

    The model is used as it is: nothing is replaced or renamed, and `hf` stays usable on its own.
    Make it before `torch.compile`. `model_id` is compared with the id in vectors; by default it is
    the name the model was loaded under.
    """

    def __init__(
        self, hf: nn.Module, tokenizer: Any = None, *, model_id: str | None = None
    ) -> None:
        if hasattr(hf, "_orig_mod"):
            raise ModelError(
                "got a compiled model; make the HookedModel from the plain one first, then compile"
            )
        self.hf: Any = hf
        self.tokenizer = tokenizer
        self._decoder = find_decoder(hf)
        self._taps = taps_of(self._decoder)
        self._graphs = GraphEngine(hf, self._taps)
        self._tracing = Tracing(hf, self._decoder, self._taps.is_armed)
        name = getattr(getattr(hf, "config", None), "name_or_path", "") or ""
        self.model_id = str(name) if model_id is None else model_id

    @classmethod
    def from_pretrained(
        cls,
        name: str | PathLike[str],
        *,
        dtype: str | torch.dtype = "auto",
        device_map: Any = None,
        **settings: Any,
    ) -> "HookedModel":
        """Load model and tokenizer with transformers; `settings` go to the model's loader."""
        from transformers import AutoModelForCausalLM, AutoTokenizer

        hf = AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype, device_map=device_map, **settings
        )
        tokenizer = AutoTokenizer.from_pretrained(name, revision=settings.get("revision", "main"))
        return cls(hf, tokenizer, model_id=str(name))

    def __repr__(self) -> str:
        name = self.model_id or type(self.hf).__name__
        return f"HookedModel({name}, {self.n_layers} layers, d_model {self.d_model})"

    @property
    def n_layers(self) -> int:
        return self._decoder.n_layers

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return self._decoder.d_model

    @property
    def device(self) -> torch.device:
        """Where token ids go, also when later blocks live elsewhere."""
        return input_device(self.hf)

    @property
    def dtype(self) -> torch.dtype:
        """The embedding's dtype. The math follows each residual's own dtype, not this one."""
        dtype: torch.dtype = self.hf.get_input_embeddings().weight.dtype
        return dtype

    def trace(self, *inputs: Any, **settings: Any) -> Any:
        """nnsight's tracer: the `with` block reads and patches one forward as it runs.

        Inputs are chats, or what the model takes; `settings` go to its forward, or to its
        `generate` with `fn="generate"`. In the block `resid_pre`, `resid_mid` and `resid_post` give
        the residual stream, the tracer's own `tr.envoy` every module. One thread at a time traces
        a model (`TraceError`); other threads may run it meanwhile.
        """
        return self._tracing.open(self.tokenizer, inputs, settings, self.max_length)

    @property
    def resid_pre(self) -> Residuals:
        return Residuals("resid_pre", self._tracing)

    @property
    def resid_mid(self) -> Residuals:
        return Residuals("resid_mid", self._tracing)

    @property
    def resid_post(self) -> Residuals:
        return Residuals("resid_post", self._tracing)

    def read(
        self,
        chats: Chats,
        *,
        sites: Sequence[int | Site],
        span: Span | str = "response",
        reduce: Reduction | str = "mean",
        batch_size: int = 16,
        before: bool = False,
        progress: bool = False,
    ) -> Activations:
        """Residuals at `sites` over the `span` of each chat.

        Chats are batched by length and each forward ends at the deepest site, before logits.
        `reduce`: `mean` (summed in float64) and `last` give `[site, chat, d_model]`, `none`
        `[site, chat, pos, d_model]`, `moments` a running mean and variance over all span tokens.
        Values show what flows on after armed interventions; `before=True` what they were given.
        """
        reading = self._reading(self.encode(chats), sites, [(span, reduce)], batch_size, before)
        return collect(reading, progress=progress)

    def read_batches(
        self,
        chats: Chats,
        *,
        sites: Sequence[int | Site],
        span: Span | str = "response",
        reduce: Reduction | str = "mean",
        batch_size: int = 16,
        before: bool = False,
    ) -> Iterator[tuple[list[int], Activations]]:
        """Like `read`, one length bucket at a time: chat indices and their activations."""
        reading = self._reading(self.encode(chats), sites, [(span, reduce)], batch_size, before)
        return ((chosen, only) for chosen, (only,) in reading.run())

    def read_spans(
        self,
        encoded: Sequence[Encoded],
        *,
        sites: Sequence[int | Site],
        spans: Sequence[tuple[Span | str, Reduction | str]],
        batch_size: int = 16,
        first_batch: int = 0,
    ) -> Iterator[tuple[list[int], tuple[Activations, ...]]]:
        """Like `read_batches` for several spans of one forward, each with its reduction.

        `encoded` is what `encode` gave. The first so many batches can be left out.
        """
        return self._reading(encoded, sites, spans, batch_size, False, first_batch).run()

    def require(self, sites: Iterable[Site]) -> None:
        """Raise `SiteError` for a site that this model does not have."""
        for site in sites:
            self._decoder.require(site)

    def run_reader(
        self,
        reader: Reader,
        ids: Int[Tensor, "batch pos"],
        lengths: Sequence[int],
        prompts: Sequence[int],
    ) -> None:
        """Show a reader one batch, in a forward that ends at its deepest site, before logits.

        Rows are padded on the right: `lengths` counts each row's own tokens, `prompts` those
        before its reply.
        """
        self._tracing.refuse_inside("a read")
        run_to_deepest(self.hf, self._taps, reader, ids, lengths, prompts, self.device)

    def _reading(
        self,
        encoded: Sequence[Encoded],
        sites: Sequence[int | Site],
        spans: Sequence[tuple[Span | str, Reduction | str]],
        batch_size: int,
        before: bool,
        first_batch: int = 0,
    ) -> Reading:
        self._tracing.refuse_inside("a read")
        return Reading(
            hf=self.hf,
            taps=self._taps,
            encoded=encoded,
            sites=as_sites(sites),
            spans=tuple((check_span(span), check_reduction(reduce)) for span, reduce in spans),
            batch_size=batch_size,
            before=before,
            pad_id=chat_ids.pad_id(self.tokenizer),
            device=self.device,
            first_batch=first_batch,
        )

    def encode(self, chats: Chats, *, for_generation: bool = False) -> list[Encoded]:
        """Chats as the token ids that this model reads; `ChatError` for those it cannot."""
        encoded = chat_ids.encode_all(
            self.tokenizer, chats, max_length=self.max_length, for_generation=for_generation
        )
        require_embedded(self.hf, [one.ids for one in encoded])
        return encoded

    @property
    def max_length(self) -> int | None:
        """How many positions the model has, where it says so."""
        return max_length(self.hf)

    def generate(
        self, chats: Chats, *, engine: Engine | Graph | str = "eager", **settings: Any
    ) -> list[str]:
        """The replies to the chats, one text per returned sequence.

        `settings` are those of transformers' `generate`. `engine="graph"` decodes on a static cache
        with a compiled step (CUDA graphs on CUDA), under the same plans with the same results. The
        first call of each structure compiles, and threads take turns. `HookError` inside an open
        stream of that engine, which would never give its turn away.
        """
        if self.tokenizer is None:
            raise ChatError("got no tokenizer to write text with; use generate_ids for token ids")
        sequences = self._request(chats, settings, engine).run().sequences
        return [str(self.tokenizer.decode(ids, skip_special_tokens=True)) for ids in sequences]

    def generate_ids(
        self, chats: Chats, *, engine: Engine | Graph | str = "eager", **settings: Any
    ) -> list[Int[Tensor, " _"]]:
        """The new token ids of each returned sequence, up to and including its end token."""
        return list(self._request(chats, settings, engine).run().sequences)

    def _request(
        self, chats: Chats, settings: dict[str, Any], engine: Engine | Graph | str
    ) -> Request:
        graph = check_engine(engine)
        self._tracing.refuse_inside("a generation")
        encoded = self.encode(chats, for_generation=True)
        pad_id = chat_ids.pad_id(self.tokenizer)
        return Request(
            hf=self.hf,
            taps=self._taps,
            tokenizer=self.tokenizer,
            batch=chat_ids.pad(encoded, side="left", pad_id=pad_id),
            pad_id=pad_id,
            device=self.device,
            settings=settings,
            graph=None if graph is None else (self._graphs, graph),
        )

    def stream(
        self,
        chats: Chats,
        bank: VectorBank | None = None,
        *,
        alarms: Alarms | None = None,
        on_alarm: Reaction | str | None = None,
        standby: Standby = (),
        check_model: bool = True,
        engine: Engine | Graph | str = "eager",
        **settings: Any,
    ) -> Iterator[Step]:
        """Generate token by token, with projections and alarms.

        The next token is made only when the next step is asked for. `alarms`, `on_alarm` and
        `standby` are those of `monitor`: what they do to a reply begins with its next token.
        Leaving the loop stops the generation.
        """
        if self.tokenizer is None:
            raise ChatError("got no tokenizer to write text with; stream needs one")
        request = self._request(chats, settings, engine)
        if request.copies > 1:
            raise PlanError("got beams or several sequences per chat; stream follows one per chat")
        rules = Rules.of(bank, alarms, on_alarm, standby)
        if bank is None:
            return steps(request, self.tokenizer, None)
        plan = Plan(*rules.interventions, monitor=bank)
        self.check(plan, check_model=check_model)
        return steps(request, self.tokenizer, lambda: self._armed(plan, Guard(bank, rules)))
