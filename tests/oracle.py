"""The reference every executor is held to: raw torch hooks, float64 arithmetic, own bookkeeping.

Imports nothing of pvcore. A residual is taken where the model *reads* it: `resid_post.l` is the
input of block `l + 1`, or of the final norm. An edit rewrites that input. `resid_mid` is the
block's input plus what its attention module contributes. Edits name absolute columns row by row.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tests.families import PAD, Family

Point = tuple[str, int]
"""A site in the oracle's own words: ("resid_post", 2)."""

MODES: dict[str, dict[str, Any]] = {
    "cached": {},
    "uncached": {"use_cache": False},
    "static": {"cache_implementation": "static"},
    "chunked": {"prefill_chunk_size": 4},
    "beams": {"num_beams": 3},
}


@dataclass(frozen=True, kw_only=True)
class Ask:
    """A condition: the projection of the residual at `point` on a raw vector, above or below.

    `threshold` is per row. At the edit's own point it sees what the edit finds, at an earlier one
    what flowed on there. `answers` keeps what it said wherever the edit would act.
    """

    point: Point
    vector: Tensor
    threshold: Tensor
    above: bool = True
    answers: list[Tensor] = field(default_factory=list)

    def holds(self, h: Tensor) -> Tensor:
        """For rows `h [rows, width, d_model]`: one truth for each row and column."""
        unit = self.vector.double() / self.vector.double().norm()
        beyond = h.double() @ unit - self.threshold.double()[:, None]
        return beyond > 0 if self.above else beyond < 0


@dataclass(frozen=True, kw_only=True)
class Edit:
    """One intervention: raw float64 `vectors [n_vec, d_model]`, amounts per row, where to act.

    `where [rows, columns]` marks absolute columns; `coeff`, `lower` and `upper` are per row. All of
    `when` must hold.
    """

    kind: Literal["add", "ablate", "cap"]
    point: Point
    vectors: Tensor
    where: Tensor
    coeff: Tensor | None = None
    lower: Tensor | None = None
    upper: Tensor | None = None
    when: tuple[Ask, ...] = ()

    def delta(self, h: Tensor) -> Tensor:
        """What to add to float64 rows `h [rows, width, d_model]`, regardless of `where`."""
        if self.kind == "add":
            assert self.coeff is not None
            return self.coeff.double()[:, None, None] * self.vectors.double().sum(0)
        units = self.vectors.double()
        units = units / units.norm(dim=-1, keepdim=True)
        scores = h @ units.T
        wanted = torch.zeros_like(scores)
        if self.kind == "cap":
            low, high = (_bound(limit) for limit in (self.lower, self.upper))
            wanted = scores.clone()
            wanted = wanted if low is None else wanted.maximum(low)
            wanted = wanted if high is None else wanted.minimum(high)
        # The pseudo-inverse gives the smallest change with the wanted effect on all projections.
        return (wanted - scores) @ torch.linalg.pinv(units).T

    def expanded(self, times: int) -> "Edit":
        """The same edit for a batch whose rows generate() repeated."""

        def repeat(value: Tensor | None) -> Tensor | None:
            return None if value is None else value.repeat_interleave(times, 0)

        return Edit(
            kind=self.kind,
            point=self.point,
            vectors=self.vectors,
            where=self.where.repeat_interleave(times, 0),
            coeff=repeat(self.coeff),
            lower=repeat(self.lower),
            upper=repeat(self.upper),
            when=tuple(
                replace(ask, threshold=ask.threshold.repeat_interleave(times, 0))
                for ask in self.when
            ),
        )


def _bound(limit: Tensor | None) -> Tensor | None:
    return None if limit is None else limit.double()[:, None, None]


@dataclass(kw_only=True)
class Frame:
    """One forward pass: its first absolute column and every residual it computed."""

    start: int
    width: int
    residuals: dict[Point, Tensor] = field(default_factory=dict)


@dataclass(kw_only=True)
class Tape:
    """The forward passes of one run, in order."""

    cached: bool
    frames: list[Frame] = field(default_factory=list)

    def prompt(self, point: Point, length: int) -> Tensor:
        """Residuals of the first `length` columns as the prefill computed them."""
        parts, end = [], 0
        for frame in self.frames:
            if end >= length:
                break
            parts.append(frame.residuals[point])
            end = frame.start + frame.width
        return torch.cat(parts, 1)[:, :length]

    def step(self, point: Point, length: int, step: int) -> Tensor:
        """Residuals `[row, d_model]` of the column that produced token `step`."""
        wanted = length - 1 + step
        last = [frame for frame in self.frames if frame.start + frame.width - 1 == wanted]
        assert len(last) == 1, f"column {wanted} ended {len(last)} forwards"
        return last[0].residuals[point][:, -1]


@dataclass(frozen=True, kw_only=True)
class Generated:
    """Returned sequences without the prompt, their tape, and the tape row of each token."""

    tokens: Tensor
    tape: Tape
    rows: Tensor


class Oracle:
    """Raw hooks on one model of a known family."""

    def __init__(self, hf: nn.Module, family: Family) -> None:
        self.hf, self.family = hf, family
        self.blocks = list(hf.get_submodule(family.blocks).children())
        self.final_norm = hf.get_submodule(family.final_norm)
        last = len(self.blocks) - 1
        self.points: list[Point] = []
        for layer in range(last + 1):
            mid = [("resid_mid", layer)] if family.attention else []
            self.points += [("resid_pre", layer), *mid, ("resid_post", layer)]

    @contextmanager
    def hooked(
        self, edits: Sequence[Edit] = (), *, cached: bool = False, repeat: int = 1
    ) -> Iterator[Tape]:
        """Record every residual of every forward inside, with the edits applied in order."""
        run = _Run(Tape(cached=cached), [edit.expanded(repeat) for edit in edits])
        with ExitStack() as stack:
            for layer, block in enumerate(self.blocks):
                before = [("resid_post", layer - 1)] if layer else []
                entry = run.entering([*before, ("resid_pre", layer)], first=layer == 0)
                stack.callback(block.register_forward_pre_hook(entry, with_kwargs=True).remove)
                if self.family.attention:
                    module = block.get_submodule(self.family.attention)
                    middle = run.between(("resid_mid", layer), self.family.adds_residual)
                    stack.callback(module.register_forward_hook(middle).remove)
            leaving = run.entering([("resid_post", len(self.blocks) - 1)], first=False)
            handle = self.final_norm.register_forward_pre_hook(leaving, with_kwargs=True)
            stack.callback(handle.remove)
            yield run.tape

    @torch.no_grad()
    def forward(
        self, ids: Tensor, mask: Tensor | None = None, edits: Sequence[Edit] = ()
    ) -> tuple[Tensor, Tape]:
        """Logits and residuals of one forward; padding gets explicit positions."""
        extra: dict[str, Tensor] = {}
        if mask is not None:
            extra["attention_mask"] = mask
            if self.family.takes_positions:
                extra["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
        with self.hooked(edits) as tape:
            logits = self.hf(ids, **extra).logits
        return logits, tape

    @torch.no_grad()
    def generate(
        self,
        ids: Tensor,
        mask: Tensor,
        edits: Sequence[Edit] = (),
        *,
        mode: str = "cached",
        **settings: Any,
    ) -> Generated:
        """Run the model's own generate() on left-padded ids under raw hooks."""
        settings = {"do_sample": False, **MODES[mode], **settings}
        beams, returned = settings.get("num_beams", 1), settings.get("num_return_sequences", 1)
        cached = settings.get("use_cache", True)
        with self.hooked(edits, cached=cached, repeat=max(beams, returned)) as tape:
            out = self.hf.generate(
                ids, attention_mask=mask, return_dict_in_generate=True, **settings
            )
        tokens = out.sequences[:, ids.shape[1] :]
        own = torch.arange(len(tokens))[:, None].expand(tokens.shape)
        return Generated(tokens=tokens, tape=tape, rows=out.beam_indices if beams > 1 else own)


class _Run:
    """The hooks of one `hooked` block and the stream as it stands inside the current forward."""

    def __init__(self, tape: Tape, edits: Sequence[Edit]) -> None:
        self.tape, self.edits = tape, edits
        self.stream: Tensor | None = None

    def _arrive(self, width: int) -> None:
        frames = self.tape.frames
        start = frames[-1].start + frames[-1].width if self.tape.cached and frames else 0
        frames.append(Frame(start=start, width=width))

    def _pass(self, point: Point, h: Tensor) -> Tensor:
        """The residual as it leaves a site: edited where an edit says so, and recorded."""
        frame = self.tape.frames[-1]
        for edit in self.edits:
            if edit.point == point:
                where = edit.where[:, frame.start : frame.start + frame.width, None]
                for ask in edit.when:
                    seen = h if ask.point == point else frame.residuals[ask.point]
                    held = ask.holds(seen)[..., None]
                    ask.answers.append(held[where.expand_as(held)])
                    where = where & held
                edited = (h.double() + edit.delta(h.double())).to(h.dtype)
                h = torch.where(where, edited, h)
        frame.residuals[point] = h.detach().clone()
        return h

    def entering(self, points: Sequence[Point], *, first: bool) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            h = args[0] if args else kwargs["hidden_states"]
            if first:
                self._arrive(h.shape[1])
            for point in points:
                h = self._pass(point, h)
            self.stream = h
            if args:
                return (h, *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": h}

        return hook

    def between(self, point: Point, adds_residual: bool) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            attended = output if torch.is_tensor(output) else output[0]
            assert self.stream is not None
            before = attended if adds_residual else self.stream + attended
            after = self._pass(point, before)
            if all(edit.point != point for edit in self.edits):
                return None
            given = after if adds_residual else after - self.stream
            return given if torch.is_tensor(output) else (given, *output[1:])

        return hook


def padded(rows: Sequence[Tensor], *, side: str) -> tuple[Tensor, Tensor]:
    """Ids and attention mask of a batch padded on one side."""
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), PAD)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        place = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[index, place], mask[index, place] = row, 1
    return ids, mask


def covers(span: str, lengths: Sequence[int], width: int, total: int) -> Tensor:
    """Columns `[rows, total]` of a left-padded generation that a span covers.

    Prompts of `lengths` end at column `width - 1`, which produces the first token and so belongs
    to both `prompt` and `response`.
    """
    column = torch.arange(total)[None]
    start = torch.tensor([width - length for length in lengths])[:, None]
    own = column >= start
    return {
        "all": own,
        "prompt": own & (column < width),
        "response": (column >= width - 1).expand(len(lengths), total),
        "last_prompt_token": (column == width - 1).expand(len(lengths), total),
    }[span]
