"""Rollouts as rows of the paper's CSV files, and back: one file for each side of the pairs.

A row holds its prompt as the chat template rendered it. The system prompt is read back out of it
by the tokenizer's own template, and rendered again to see that nothing was lost.
"""

from collections.abc import Sequence
from typing import Any

from pvcore.chats import SENTINEL
from pvcore.errors import FormatError
from pvcore.formats_rollouts import COHERENCE, RolloutRow
from pvcore.rollouts import Rollout, asked


def rollouts_of(
    positive: Sequence[RolloutRow], negative: Sequence[RolloutRow], *, trait: str, tokenizer: Any
) -> tuple[Rollout, ...]:
    """Scored rollouts, as `extract_from` takes them, of the rows of both files, pair by pair.

    Raises `FormatError` for files that hold other questions, rows without a column for the trait,
    and prompts that this tokenizer's template would not have rendered.
    """
    if [row.question for row in positive] != [row.question for row in negative]:
        raise FormatError(
            f"got {len(positive)} positive and {len(negative)} negative rows that do not ask the "
            "same questions in the same order; wanted the two files of one run"
        )
    return tuple(
        _rollout(row, side, trait, tokenizer, at)
        for side, rows in ((True, positive), (False, negative))
        for at, row in enumerate(rows)
    )


def rows_of(
    rollouts: Sequence[Rollout], *, trait: str, tokenizer: Any
) -> tuple[tuple[RolloutRow, ...], tuple[RolloutRow, ...]]:
    """The rows of the positive and of the negative file."""
    questions = list(dict.fromkeys(row.question for row in rollouts))
    numbers = {question: number for number, question in enumerate(questions)}
    sides: dict[bool, list[RolloutRow]] = {True: [], False: []}
    for row in rollouts:
        sides[row.positive].append(
            RolloutRow(
                question=row.question,
                prompt=_rendered(tokenizer, row.system_prompt, row.question),
                answer=row.answer,
                question_id=f"{trait}_{numbers[row.question]}",
                scores={trait: row.trait_score, COHERENCE: row.coherence_score},
            )
        )
    return tuple(sides[True]), tuple(sides[False])


def _rollout(row: RolloutRow, positive: bool, trait: str, tokenizer: Any, at: int) -> Rollout:
    where = f"{'positive' if positive else 'negative'} row {at}"
    if trait not in row.scores or COHERENCE not in row.scores:
        raise FormatError(
            f"{where}: got scores {', '.join(row.scores)}; wanted {trait} and {COHERENCE}"
        )
    return Rollout(
        positive=positive,
        system_prompt=_system_prompt(row, tokenizer, where),
        question=row.question,
        answer=row.answer,
        trait_score=row.scores[trait],
        coherence_score=row.scores[COHERENCE],
        dropped="",
    )


def _system_prompt(row: RolloutRow, tokenizer: Any, where: str) -> str:
    head, _, tail = _rendered(tokenizer, SENTINEL, row.question).partition(SENTINEL)
    inside = row.prompt[len(head) : len(row.prompt) - len(tail)]
    for system_prompt in (inside, ""):
        if _rendered(tokenizer, system_prompt, row.question) == row.prompt:
            return system_prompt
    raise FormatError(
        f"{where}: got a prompt that begins {row.prompt[:60]!r}; wanted one as this tokenizer's "
        "chat template renders the question. Take the tokenizer of the model that was asked"
    )


def _rendered(tokenizer: Any, system_prompt: str, question: str) -> str:
    chat = asked(system_prompt, question)
    return str(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))
