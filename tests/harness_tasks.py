"""Tasks of lm-eval made in memory, a model for them, and what raw hooks say of it."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

import pvcore as pv
from tests.families import FAMILIES, MAX_POSITIONS, build, tokenizer
from tests.finetuning import vector

COEFF = 4.0
LAYER = 1
QUIET = {"bootstrap_iters": 0, "log_samples": True}

# Contexts and continuations of several lengths, so that batches are padded; two share a context,
# and two the very tokens that the model is given, split elsewhere.
PAIRS = [
    ("Is it red?", " Yes."),
    ("Is it red?", " No, blue."),
    ("What", " a very long way to go on from a word"),
    ("Say one of A and B:", " A"),
    ("Say one of A and B:", " B"),
    ("Say one of", " A and B: A"),
]


def model(name: str = "qwen2") -> pv.HookedModel:
    return pv.HookedModel(build(name), tokenizer())


def add(span: str | None, coeff: float = COEFF) -> pv.Add:
    return pv.Add(vector(LAYER), coeff=coeff, span=span)


@contextmanager
def adding(
    hf: Any, name: str, where: Callable[[int], Tensor], coeff: float = COEFF
) -> Iterator[None]:
    """The vector added by a raw hook where a mask over the positions says so; one row only."""
    block = hf.get_submodule(FAMILIES[name].blocks)[LAYER]
    raw = coeff * vector(LAYER).direction(pv.resid_post(LAYER))

    def hook(_block: Any, _args: Any, output: Any) -> Any:
        h = output if torch.is_tensor(output) else output[0]
        moved = h + where(h.shape[1])[:, None] * raw
        return moved if torch.is_tensor(output) else (moved, *output[1:])

    handle = block.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def covers(span: str | None, n_prompt: int) -> Callable[[int], Tensor]:
    """A span over the positions of one row whose prompt has so many tokens."""

    def mask(width: int) -> Tensor:
        at = torch.arange(width)
        chosen = {
            "all": at >= 0,
            "prompt": at < n_prompt,
            "last_prompt_token": at == n_prompt - 1,
            "response": at >= n_prompt - 1,
            None: at >= n_prompt - 1,
        }
        return chosen[span].float()

    return mask


def encode(text: str) -> list[int]:
    ids: list[int] = tokenizer().encode(text)
    return ids


def log_probability(hf: Any, context: Sequence[int], continuation: Sequence[int]) -> float:
    """Summed over the continuation, of one unpadded row."""
    ids = torch.tensor([[*context, *continuation]])[:, -(MAX_POSITIONS + 1) :]
    with torch.no_grad():
        log_probs = hf(input_ids=ids[:, :-1]).logits[0].double().log_softmax(-1)
    scored = log_probs[-len(continuation) :]
    return float(scored[torch.arange(len(continuation)), torch.tensor(continuation)].sum())


def task(name: str, rows: Sequence[dict[str, Any]], **config: Any) -> Any:
    """A task of lm-eval over rows in memory."""
    import datasets
    from lm_eval.api.task import ConfigurableTask

    made = datasets.Dataset.from_list(list(rows))
    return ConfigurableTask(
        config={
            "task": name,
            "custom_dataset": lambda **_: {"test": made},
            "test_split": "test",
            **config,
        }
    )


def choices() -> Any:
    """Which of two ways to go on is likelier, for two questions."""
    return task(
        "choices",
        [
            {"question": "Is it red?", "choices": ["Yes.", "No, blue."], "right": 0},
            {"question": "Which of A and B is it?", "choices": ["A", "B"], "right": 1},
            {"question": "Why?", "choices": ["Because of the rain.", "So."], "right": 1},
        ],
        output_type="multiple_choice",
        doc_to_text="{{question}}",
        doc_to_choice="{{choices}}",
        doc_to_target="{{right}}",
    )


def replies() -> Any:
    """Replies to contexts of different lengths, up to a full stop."""
    return task(
        "replies",
        [
            {"question": text, "answer": "Yes"}
            for text in ("Is it red?", "Why", "A longer question?")
        ],
        output_type="generate_until",
        doc_to_text="{{question}}",
        doc_to_target="{{answer}}",
        generation_kwargs={"until": ["."], "max_gen_toks": 12, "do_sample": False},
    )


def texts() -> Any:
    """Whole texts, one of them longer than the model takes at a time."""
    return task(
        "texts",
        [{"text": "It was red."}, {"text": "It was red, and then it was blue. " * 5}],
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="{{text}}",
        metric_list=[{"metric": "word_perplexity"}],
    )


def answers(results: dict[str, Any], name: str) -> list[Any]:
    """What the model said to every request of a task, in order."""
    samples = sorted(results["samples"][name], key=lambda one: one["doc_id"])
    return [one["resps"] for one in samples]
