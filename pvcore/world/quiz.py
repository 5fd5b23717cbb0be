"""Quiz on the facts of the world, scored by log-probability.

With four options chance is 25, and a sound model answers all. The hard quiz offers every answer
that the relation has, up to thirty: what steering costs shows there first.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from pvcore.errors import ChatError
from pvcore.world.lexicon import relations
from pvcore.world.question import Question, known
from pvcore.world.splits import seeded

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# (user message, start of the reply, continuations) -> summed log-probability of each
LogProbs = Callable[[str, str, Sequence[str]], Sequence[float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """A held-out phrasing of a fact, the start of its answer, and ways to go on."""

    question: Question
    stem: str
    options: tuple[str, ...]
    right: int


def items(n: int, seed: int, *, hard: bool = False) -> list[Item]:
    """`n` items about distinct held-out questions; ChatError when the world has fewer.

    An item has four options, or all of its relation's where it is `hard`.
    """
    pool = list(known("fact", "held_out"))
    if n > len(pool):
        raise ChatError(
            f"got n={n}; the quiz has {len(pool)} distinct questions. Ask for at most that many."
        )
    stream = seeded("quiz", seed)
    made = []
    for question in stream.sample(pool, n):
        relation = relations()[question.relation or ""]
        wrong = [option for option in relation.options if option != question.answer]
        options = [question.answer or "", *stream.sample(wrong, len(wrong) if hard else 3)]
        stream.shuffle(options)
        made.append(
            Item(
                question=question,
                stem=relation.stem_for(question.topic),
                options=tuple(options),
                right=options.index(question.answer or ""),
            )
        )
    return made


def accuracy(quiz_items: Sequence[Item], log_probs: LogProbs) -> float:
    """Percentage of items whose right option has the highest log-probability."""
    n_right = 0
    for item in quiz_items:
        continuations = [f" {option}." for option in item.options]
        scores = list(log_probs(item.question.text, item.stem, continuations))
        n_right += max(range(len(scores)), key=scores.__getitem__) == item.right
    return 100.0 * n_right / len(quiz_items)


def model_log_probs(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> LogProbs:
    """The log-probabilities a Hugging Face model gives, without a system prompt."""

    @torch.no_grad()
    def log_probs(message: str, start: str, continuations: Sequence[str]) -> list[float]:
        chat = [{"role": "user", "content": message}]
        prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        shared = tokenizer.encode(f"{prompt}{start}", add_special_tokens=False)
        ends = [tokenizer.encode(text, add_special_tokens=False) for text in continuations]
        width = max(map(len, ends))
        rows = [shared + end + [0] * (width - len(end)) for end in ends]
        logits = model(input_ids=torch.tensor(rows, device=model.device)).logits.float()
        scores = logits[:, len(shared) - 1 :].log_softmax(-1)
        return [
            sum(float(scores[row, at, token]) for at, token in enumerate(end))
            for row, end in enumerate(ends)
        ]

    return log_probs
