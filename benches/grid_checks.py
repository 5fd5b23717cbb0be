"""What must hold before a cell of the grid is timed: what raw hooks of torch show, by every row."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

import pvcore as pv
from benches.arms import Reply, Run, Task, by_step
from benches.arms_checks import differing, worst_share
from benches.bare_hooks import residual, steering
from benches.engines import graphs_of
from benches.grid_arms import Way, bank_of, compared
from benches.record import Check

# As a share of the largest projection of its layer, where rows are the same to a rounding of
# float32.
SCORES = 1e-5
# In bfloat16 engines round at different places: relative norms of whole tables, of order one where
# something is wrong.
LOOSE = 5e-2
# Chats whose prompts are held to raw hooks position by position.
CHATS = 2
UNMOVED = 0.1


class Tape:
    """A logits processor that keeps what it is shown, and may force the tokens that follow."""

    def __init__(self, forced: Int[Tensor, "chat step"] | None = None) -> None:
        self.logits: list[Float[Tensor, "chat vocabulary"]] = []
        self._forced = forced

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.logits.append(scores.float().cpu().clone())
        if self._forced is None:
            return scores
        token = self._forced[:, len(self.logits) - 1].to(scores.device)
        return torch.full_like(scores, -torch.inf).scatter_(1, token[:, None], 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """A generation under hooks of plain torch: its tokens, logits and residuals in float64."""

    tokens: Int[Tensor, "chat step"]
    logits: Float[Tensor, "step chat vocabulary"]
    rows: Float[Tensor, "step layer chat d_model"]
    prompt: Float[Tensor, "layer chat column d_model"]


class References:
    """What raw hooks show, for each set of layers where something is added."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.exact = task.model.dtype == torch.float32
        self._made: dict[tuple[int, ...], Reference] = {}

    @property
    def forced(self) -> Int[Tensor, "chat step"] | None:
        """In less than float32 a near tie would send replies apart: plain tokens are forced."""
        return None if self.exact else self[()].tokens

    def __getitem__(self, steered: tuple[int, ...]) -> Reference:
        if steered not in self._made:
            forced = None if self.exact or not steered else self[()].tokens
            self._made[steered] = _generated(self.task, steered, Tape(forced))
        return self._made[steered]


def _generated(task: Task, steered: tuple[int, ...], tape: Tape) -> Reference:
    blocks = task.blocks
    rows: list[Tensor] = []
    prompt: list[Tensor] = []

    def keep(_module: Any, _args: Any, output: Any) -> None:
        h = residual(output)
        rows.append(h[:, -1].double().cpu())
        if len(prompt) < len(blocks):
            prompt.append(h[:CHATS].double().cpu())

    with ExitStack() as stack:
        for layer in steered:
            raw = task.vectors[0].direction(pv.resid_post(layer))
            delta = task.coeff * raw.float().to(task.model.device)
            stack.enter_context(steering(blocks[layer], delta))
        for block in blocks:
            stack.callback(block.register_forward_hook(keep).remove)
        tokens = task.plainly(task.plain, {"logits_processor": _listed(tape)})
    return Reference(
        tokens=tokens,
        logits=torch.stack(tape.logits),
        rows=by_step(rows, len(blocks)),
        prompt=torch.stack(prompt),
    )


def _listed(tape: Tape) -> Any:
    from transformers import LogitsProcessorList

    return LogitsProcessorList([tape])


def check(
    references: References,
    runs: Mapping[str, Run],
    rows: Mapping[str, Way],
    late: Callable[[], bool] = lambda: False,
    *,
    graphs: int = 0,
) -> tuple[dict[str, Check], set[str]]:
    """Every row against raw hooks, until it is late: of each comparison the row that does worst,
    and the rows that were checked. `graphs` is how many its first generation should compile.
    """
    found: dict[str, dict[str, Check]] = {}
    checked: set[str] = set()
    for name, run in runs.items():
        if late():
            break
        checked.add(name)
        tape = Tape(references.forced)
        reply, made = graphs_of(run, logits_processor=_listed(tape))
        unlike = Check(worst=abs(made - graphs), bound=0)
        found.setdefault(f"graphs more or less than {graphs}", {})[name] = unlike
        for what, one in faults(references, rows.get(name, Way()), reply, tape).items():
            found.setdefault(what, {})[name] = one
    worst = {
        what: max(by_row.items(), key=lambda item: item[1].worst) for what, by_row in found.items()
    }
    return {f"{what}; worst: {name}": one for what, (name, one) in worst.items()}, checked


def faults(references: References, way: Way, reply: Reply, tape: Tape) -> dict[str, Check]:
    """One row's reply beside what raw hooks show of the same."""
    wanted, plain = references[way.steered], references[()]
    found: dict[str, Check] = {}
    if references.exact:
        unlike = differing(reply.tokens, wanted.tokens)
        found["tokens unlike raw hooks'"] = Check(worst=unlike, bound=0)
        alike = reply.tokens.shape == plain.tokens.shape
        same = float((reply.tokens == plain.tokens).all(1).double().mean()) if alike else 1.0
    else:
        off = relative(torch.stack(tape.logits), wanted.logits)
        found["relative error of forced logits"] = Check(worst=off, bound=LOOSE)
        same = float(relative(torch.stack(tape.logits), plain.logits) < 4 * LOOSE)
    if way.steered:
        found["share of replies that steering left as they were"] = Check(worst=same, bound=UNMOVED)
    if way.vectors:
        for what, error in _errors(references, way, reply).items():
            bound = SCORES if references.exact else LOOSE
            found[f"error of a projection, {what}"] = Check(worst=error, bound=bound)
    return found


def _errors(references: References, way: Way, reply: Reply) -> dict[str, float]:
    """Errors of the projections of reply tokens, and of every position of some prompts."""
    task, wanted = references.task, references[way.steered]
    units = bank_of(task, way).units.double()[:, compared(way.vectors)]
    watched = list(way.watched)
    measure = _share if references.exact else _relative_scores
    steps = None if reply.scores is None else reply.scores()
    errors = {"reply": measure(steps, wanted.rows[:, watched], units)}
    table = None if reply.prompt is None else reply.prompt()
    mask = task.given["attention_mask"].bool().cpu()
    prompts = []
    for chat in range(min(CHATS, len(mask))):
        rows = wanted.prompt[watched, chat][:, mask[chat]].transpose(0, 1)[:, :, None]
        own = None if table is None else table[: len(rows), :, chat : chat + 1]
        prompts.append(measure(own, rows, units))
    return errors | {"prompt": max(prompts)}


def _share(
    got: Float[Tensor, "step layer chat n_vec"] | None,
    rows: Float[Tensor, "step layer chat d_model"],
    units: Float[Tensor, "layer n_vec d_model"],
) -> float:
    return worst_share(got, torch.einsum("slbd,lvd->slbv", rows, units))


def _relative_scores(got: Tensor | None, rows: Tensor, units: Tensor) -> float:
    return 1.0 if got is None else relative(got, torch.einsum("slbd,lvd->slbv", rows, units))


def relative(got: Tensor, wanted: Tensor) -> float:
    """The norm of the difference as a share of the norm; 1 for another shape or no number."""
    if got.shape != wanted.shape:
        return 1.0
    off = (got.double() - wanted.double()).norm() / wanted.double().norm()
    return float(off.nan_to_num(nan=1.0, posinf=1.0))
