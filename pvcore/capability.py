"""Capability: lm-eval's tasks asked of a model under a plan, so that what steering costs shows.

A task gives a context and something to score or to generate. The context is the prompt and the
rest the reply, whatever a chat template wrote into them: `prompt` covers the context,
`last_prompt_token` its last token, and `response` begins at that token, which predicts the reply's
first. An intervention that names no span acts on the response, as it does in generation. Tasks that
score whole texts have no prompt: there `response` is all of it, and the other two are refused.

lm-eval keeps answers under what was asked alone. Here each has a database of its own for everything
that decides about it: all weights, the adapters at work, the tokenizer, and what the plan does.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pvcore import fingerprints
from pvcore.errors import EvaluationError, PlanError
from pvcore.interventions import Ablate, Add, Cap, Intervention
from pvcore.model import HookedModel
from pvcore.plan import Plan
from pvcore.wrappers import evaluating

_OURS = {"model", "model_args", "batch_size", "max_batch_size", "device", "use_cache"}


def evaluate(
    model: HookedModel,
    tasks: str | Any | Sequence[str | Any],
    *,
    plan: Plan | None = None,
    batch_size: int = 8,
    max_length: int | None = None,
    cache: str | PathLike[str] | None = None,
    check_model: bool = True,
    **settings: Any,
) -> dict[str, Any]:
    """lm-eval's results on its tasks, of the model as the plan's interventions leave it.

    `tasks` are names, configurations or task objects of lm-eval, and `settings` go to its
    `simple_evaluate` (`num_fewshot`, `limit`, `apply_chat_template`, `task_manager`, ...). Without
    a plan the plain model answers; a plan's monitor is left out: arm one around the call instead.
    `cache` is a folder in which answers are kept, in a database of its own for each model and
    plan; interventions armed around the call are refused, because no database would know of them.
    Raises `EvaluationError` where lm-eval is not installed, and one typed error for what does not
    fit: the module says what the spans cover.
    """
    lm_eval = _harness()
    _check(model, plan, batch_size, settings)
    steps = tuple(_spanned(one) for one in plan.interventions) if plan else ()
    if plan is not None:
        model.check(plan, check_model=check_model)
    lm = lm_eval.SteeredLM(model, steps, batch_size=batch_size, max_length=max_length)
    lm.refuse_armed()
    if cache is not None:
        key = _fingerprint(model, steps, lm.max_length, lm_eval.version())
        Path(cache).mkdir(parents=True, exist_ok=True)
        settings = {**settings, "use_cache": str(Path(cache) / f"answers-{key}")}
    several = isinstance(tasks, Sequence) and not isinstance(tasks, str)
    with evaluating(model.hf), _same_random_numbers():
        results = lm_eval.run(lm, tasks if several else [tasks], settings)
    if results is None:
        raise EvaluationError("got results in the first process only; evaluate in that one alone")
    return dict(results)


def _harness() -> Any:
    try:
        from pvcore import harness
    except ImportError as error:
        raise EvaluationError(
            f"got no lm-eval to ask for tasks ({error}); install it: pip install 'pvcore[eval]'"
        ) from error
    return harness


def _check(
    model: HookedModel, plan: Plan | None, batch_size: int, settings: Mapping[str, Any]
) -> None:
    if plan is not None and not isinstance(plan, Plan):
        raise PlanError(f"got {type(plan).__name__}; wanted a Plan, as in pv.Plan(pv.Add(...))")
    if plan is not None and plan.row_counts:
        raise PlanError(
            "got numbers for each row in a plan to evaluate; the rows of a task have no order of "
            "yours: give one number for all, and evaluate once for each"
        )
    if model.tokenizer is None:
        raise EvaluationError(
            "got a model without a tokenizer, and tasks made of text; give it one"
        )
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise EvaluationError(f"got batch_size {batch_size!r}; wanted a number of rows, from 1")
    ours = sorted(_OURS & set(settings))
    if ours:
        raise EvaluationError(
            f"got {', '.join(ours)} as a setting for lm-eval, which pvcore fills in; use model, "
            "batch_size and cache of evaluate itself"
        )


def _spanned(one: Intervention) -> Intervention:
    """The intervention with its span written out: without one it acts on the reply."""
    if one.span is not None:
        return one
    aim: dict[str, Any] = {"layers": one.sites, "span": "response", "when": one.when}
    if isinstance(one, Add):
        return Add(one.vectors, coeff=_setting(one.coeff), **aim)
    if isinstance(one, Ablate):
        return Ablate(one.vectors, **aim)
    bounds = {name: getattr(one, name) for name in ("min", "max")}
    given = {name: _setting(bound) for name, bound in bounds.items() if bound is not None}
    return Cap(one.vectors, **given, **aim)


def _setting(amount: Any) -> Any:
    return dict(amount.by_layer) if amount.everywhere is None else amount.everywhere


def _fingerprint(
    model: HookedModel, steps: Sequence[Intervention], max_length: int, version: str
) -> str:
    """Changes with whatever changes an answer: what is asked is in the database itself."""
    return fingerprints.of_text(
        {
            "weights": fingerprints.of_weights(model.hf),
            "tokenizer": fingerprints.of_tokenizing(model.tokenizer),
            "generation": fingerprints.of_generation(model.hf),
            "plan": Plan(*steps).fingerprint if steps else None,
            "max_length": max_length,
            "lm-eval": version,
        }
    )


@contextmanager
def _same_random_numbers() -> Iterator[None]:
    """lm-eval seeds every generator; after it they go on as if it had not."""
    python, legacy = random.getstate(), np.random.get_state()  # noqa: NPY002 - lm-eval's own
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(legacy)  # noqa: NPY002
