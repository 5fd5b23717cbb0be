"""What must hold before the arms are timed: the right tokens, logits and projections."""

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from benches.arms import Reply, Run, Task, by_step
from benches.bare_hooks import newest_rows, steering
from benches.record import Check

ERROR_BOUND = 1e-5
ERROR = "error of a projection, as a share of the largest of its layer"
WATCHING = ("monitor", "read", "hook monitor", "hook read")
# Below this share of a row's norm, a projection would be too small to tell right from wrong.
TELLING = 1e-3


class _Tape:
    """A logits processor that changes nothing and keeps what it is shown."""

    def __init__(self) -> None:
        self.logits: list[Float[Tensor, "chat vocabulary"]] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.logits.append(scores.clone())
        return scores


def _taped(run: Run) -> tuple[Reply, Float[Tensor, "step chat vocabulary"]]:
    from transformers import LogitsProcessorList

    tape = _Tape()
    reply = run(logits_processor=LogitsProcessorList([tape]))
    return reply, torch.stack(tape.logits)


def check(task: Task, arms: Mapping[str, Run]) -> dict[str, Check]:
    """Every comparison by what it counts; bounds of 0 mean bit for bit."""
    taped = {name: _taped(run) for name, run in arms.items()}
    replies = {name: reply for name, (reply, _) in taped.items()}
    checks: dict[str, Check] = {}
    for name in ("again", "idle", "unarmed", *WATCHING):
        unlike = differing(replies[name].tokens, replies["plain"].tokens)
        unlike += differing(taped[name][1], taped["plain"][1])
        checks[f"{name}: tokens and logits unlike plain's"] = Check(worst=unlike, bound=0)
    for name in ("steer", "both", "hook both"):
        unlike = differing(replies[name].tokens, replies["hook steer"].tokens)
        checks[f"{name}: tokens unlike a bare hook's"] = Check(worst=unlike, bound=0)
    same = (replies["steer"].tokens == replies["plain"].tokens).all(1)
    checks["steer: replies it left as they were"] = Check(worst=int(same.sum()), bound=0)
    for steered, names in ((False, WATCHING), (True, ("both", "hook both"))):
        rows = _rows(task, steered=steered)
        exact = torch.einsum("slbd,lvd->slbv", rows, task.bank.units.double())
        norms = rows.norm(dim=-1, keepdim=True)
        for name in names:
            error = _error(replies[name], exact)
            checks[f"{name}: {ERROR}"] = Check(worst=error, bound=ERROR_BOUND)
        small = ((exact.abs() / norms).amax(-1) < TELLING).sum()
        what = "both" if steered else "monitor"
        checks[f"{what}: rows whose projections are too small to tell"] = Check(
            worst=int(small), bound=0
        )
    return checks


def projection_error(task: Task, reply: Reply, *, steered: bool) -> float:
    """The worst error of a reply's projections, as a share of the largest of its layer."""
    rows = _rows(task, steered=steered)
    return _error(reply, torch.einsum("slbd,lvd->slbv", rows, task.bank.units.double()))


def _rows(task: Task, *, steered: bool) -> Float[Tensor, "step layer chat d_model"]:
    """What flowed through the model that pvcore never met, in float64."""
    blocks = task.blocks
    with ExitStack() as stack:
        if steered:
            stack.enter_context(steering(blocks[task.layer], task.delta))
        rows = stack.enter_context(newest_rows(blocks))
        task.plainly(task.plain, {})
    return by_step(rows, len(blocks)).double().cpu()


def differing(got: Tensor, wanted: Tensor) -> int:
    """How many entries differ; all of them when the shapes do."""
    if got.shape != wanted.shape:
        return max(got.numel(), wanted.numel())
    return int((got != wanted).sum())


def _error(reply: Reply, exact: Float[Tensor, "step layer chat n_vec"]) -> float:
    got: Any = None if reply.scores is None else reply.scores()
    return worst_share(got, exact)


def worst_share(got: Tensor | None, exact: Float[Tensor, "step layer chat n_vec"]) -> float:
    """The worst error as a share of its layer's largest projection; 1 where there is nothing to
    compare.
    """
    if got is None or got.shape != exact.shape:
        return 1.0
    largest = exact.abs().amax(dim=(0, 2, 3), keepdim=True)
    error = (got.double() - exact).abs() / largest
    return float(error.nan_to_num(nan=1.0, posinf=1.0).max())
