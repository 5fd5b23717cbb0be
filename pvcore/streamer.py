"""A streamer for transformers' own `generate`, which tells projections beside the text.

streamer = ProjectionStreamer(model, bank)
threading.Thread(target=hf.generate, kwargs={**inputs, "streamer": streamer}).start()
for step in streamer: ...
"""

import queue
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

import pvcore_kernels as kernels
from pvcore.errors import ChatError, HookError, PlanError
from pvcore.frames import Call, Frame, Outcome
from pvcore.model import HookedModel
from pvcore.monitor import Seen
from pvcore.numerals import Number
from pvcore.plan import Plan
from pvcore.sessions import Take
from pvcore.sites import Site
from pvcore.stream import Pieces, Step
from pvcore.vectors import VectorBank

T = TypeVar("T")

_OVER = object()


class _Newest:
    """A reader that keeps the scores of the newest row at every site of a bank."""

    before = False

    def __init__(self, bank: VectorBank) -> None:
        self._units = Seen(bank).units
        self._sites = bank.sites
        self.over = False
        self.scores: dict[Site, Tensor] = {}

    @property
    def sites(self) -> tuple[Site, ...]:
        return self._sites

    def begin(self, frame: Frame) -> Take:
        return self._take

    def _take(self, place: int, h: Float[Tensor, "batch pos d_model"]) -> None:
        row = h[:, -1].detach()
        wide = torch.float64 if row.dtype == torch.float64 else torch.float32
        units = self._units(row.device, wide)[place]
        self.scores[self._sites[place]] = kernels.project(row, units)

    def end(self, frame: Frame) -> None: ...

    def close(self, call: Call, outcome: Outcome | None) -> None: ...

    def take(self) -> Float[Tensor, "site batch n_vec"]:
        """The scores of the forward just made, once."""
        scores, self.scores = self.scores, {}
        if len(scores) < len(self._sites):
            raise HookError(
                "got a token whose forward did not come past all sites of the bank; give "
                "generate() the model that the streamer was made for, compiled after it was hooked"
            )
        return torch.stack([scores[site].cpu() for site in self._sites])


class _Feed:
    """The steps of one generation, for whoever iterates."""

    def __init__(self) -> None:
        self.steps: queue.Queue[Step | object] = queue.Queue()
        self.failed = False


class ProjectionStreamer:
    """Give it to `hf.generate(streamer=...)`, and iterate it for one `Step` a token.

    As with transformers' own streamers, one chat at a time, without beams. `on_step` is called in
    the thread that generates; without it, steps wait in a queue for whoever iterates, who may do
    so in another thread, and `timeout` seconds without a step are a `HookError`. Plans that are
    armed in the thread that generates act too. An object serves one generation after another, and
    each iteration follows one of them: leaving it early gives up the rest of that generation. A
    step that ends within a character comes with the next token, or at the end with what there is.
    """

    def __init__(
        self,
        model: HookedModel,
        bank: VectorBank,
        *,
        on_step: Callable[[Step], None] | None = None,
        timeout: Number | None = None,
        check_model: bool = True,
    ) -> None:
        if model.tokenizer is None:
            raise ChatError("got no tokenizer to write text with; a streamer needs one")
        self._plan = Plan(monitor=bank)
        model.check(self._plan, check_model=check_model)
        self._model, self._bank, self._check = model, bank, check_model
        self._on_step, self._timeout = on_step, timeout
        self._feeds: queue.Queue[_Feed] = queue.Queue()
        self._feed = _Feed()
        self._reader: _Newest | None = None
        self._release: Callable[[], None] | None = None
        self._pieces = Pieces(model.tokenizer)
        self._held: Step | None = None

    def put(self, value: Tensor) -> None:
        """Called by `generate`: first with the prompt, then with each token."""
        # Tokens have one axis: two are the prompt of another generation, after one that failed.
        if self._reader is None or value.ndim > 1:
            self.close()
            self._begin(value)
            return
        token = value.reshape(-1).cpu()
        scores = self._reader.take()
        step = Step(
            text=[self._pieces.push(int(token[0]))],
            token_ids=token,
            projections={trait: scores[..., k] for k, trait in enumerate(self._bank.traits)},
        )
        self._deliver()
        # Whether more of the character comes is known with the next token.
        self._held = step
        if not self._pieces.waits:
            self._deliver()

    def _deliver(self) -> None:
        step, self._held = self._held, None
        if step is not None:
            (self._on_step or self._feed.steps.put)(step)

    def _begin(self, prompt: Tensor) -> None:
        if prompt.ndim > 1 and len(prompt) > 1:
            raise PlanError(
                f"got {len(prompt)} chats in a streamer of transformers, which follows one; use "
                "model.stream(...) for several"
            )
        reader = _Newest(self._bank)
        self._pieces = Pieces(self._model.tokenizer)
        self._release = self._model.hold_reader(
            self._plan, reader, lapsed=lambda: reader.over, check_model=self._check
        )
        self._reader, self._feed = reader, _Feed()
        if self._on_step is None:
            self._feeds.put(self._feed)

    def end(self) -> None:
        """Called by `generate` when it is done: what is left of the text goes with its token."""
        if self._held is not None:
            self._held = replace(self._held, text=[self._pieces.rest()])
            self._deliver()
        self._feed.steps.put(_OVER)
        self._leave()

    def close(self) -> None:
        """Take the reader off; for a generation that failed, which never calls `end`."""
        if self._reader is not None:
            self._deliver()
            self._feed.failed = True
            self._feed.steps.put(_OVER)
        self._leave()

    def _leave(self) -> None:
        if self._reader is not None:
            self._reader.over = True
        if self._release is not None:
            self._release()
        self._reader = self._release = None

    def __iter__(self) -> Iterator[Step]:
        while (feed := self._wait(self._feeds)).failed:
            continue  # nobody had listened before it failed
        while isinstance(step := self._wait(feed.steps), Step):
            yield step
        if feed.failed:
            raise HookError(
                "got a generation that failed before its end; see the error where generate() ran"
            )

    def _wait(self, items: "queue.Queue[T]") -> T:
        try:
            return items.get(timeout=self._timeout)
        except queue.Empty:
            raise HookError(
                f"got no token for {self._timeout} seconds; the generation has failed, or was not "
                "given this streamer"
            ) from None
