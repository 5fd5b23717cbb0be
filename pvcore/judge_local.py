"""A judge that is a local model: the probability of each number, whatever its tokens."""

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from contextvars import Context
from typing import Any

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from pvcore import fingerprints
from pvcore.chats import encode, pad_id
from pvcore.errors import ChatError, JudgeFailure
from pvcore.grading import Rubrics, weighted_score
from pvcore.traits import Trait

_NUMBERS = range(101)
_ROLE = {"role": "user", "content": "How many?"}

Path = tuple[int, ...]  # the tokens of a number, and then the one that ends the reply


class LocalJudge:
    """Scores answers with a chat model in this process (a `HookedModel`, or a model of transformers
    and its tokenizer).

    The score is the mean of the numbers 0 to 100 weighted by the probability that the model's
    whole reply is that number: the product over its tokens and the one that ends the turn. So it
    does not matter whether the tokenizer splits numbers. A failure when the 101 sum to less than
    0.25. The prompt runs once, then the distinct beginnings of all numbers, `batch_size` at a time,
    on copies of its cache. No plan that is armed acts on the judge. `traits` are those that don't
    ship with pvcore.
    """

    method = "enumerated-candidates"

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        traits: Iterable[Trait] = (),
        batch_size: int = 32,
    ) -> None:
        self._hf = getattr(model, "hf", model)
        self._tokenizer = tokenizer if tokenizer is not None else getattr(model, "tokenizer", None)
        if self._tokenizer is None:
            raise JudgeFailure(
                f"got no tokenizer for {type(model).__name__}; wanted the one that belongs to the "
                "model. Give LocalJudge(model, tokenizer)"
            )
        if batch_size < 1:
            raise JudgeFailure(f"got batch_size={batch_size}; wanted at least 1")
        self._rubrics = Rubrics(traits)
        self._batch_size = batch_size
        self._head, paths = _written_numbers(self._tokenizer)
        self._trie = _Trie(paths)

    @property
    def identity(self) -> str:
        """What decides its scores: its weights, its tokenizer and the rubrics."""
        subject = fingerprints.of_weights(self._hf), fingerprints.of_tokenizer(self._tokenizer)
        return " ".join([*subject, fingerprints.of_text(self._rubrics.texts)])

    def including(self, trait: Trait) -> "LocalJudge":
        """This judge with the trait's own rubric; `TraitError` where it was given another."""
        judge = copy.copy(self)
        judge._rubrics = self._rubrics.including(trait)
        return judge

    def trait(self, trait: str, question: str, answer: str) -> float:
        """The score for a trait; `JudgeFailure` where there is none."""
        return self._score(self._rubrics.trait(trait, question, answer))

    def coherence(self, question: str, answer: str) -> float:
        """The score for coherence; `JudgeFailure` where there is none."""
        return self._score(self._rubrics.coherence(question, answer))

    def _score(self, prompt: str) -> float:
        if self._hf.training:
            raise JudgeFailure("got a judge in training mode; wanted one that is not. Call .eval()")
        chat = [{"role": "user", "content": prompt}]
        try:
            encoded = encode(self._tokenizer, chat, max_length=self._longest, for_generation=True)
        except ChatError as error:
            raise JudgeFailure(f"the judge cannot read its prompt: {error}") from error
        # Armed plans live in context variables, and an empty context has none.
        logprobs = Context().run(self._logprobs, (*encoded.ids, *self._head))
        return weighted_score(dict(zip(_NUMBERS, logprobs.exp().tolist(), strict=True)))

    @property
    def _longest(self) -> int | None:
        """The longest prompt that leaves room for a number."""
        longest = getattr(self._hf.config.get_text_config(), "max_position_embeddings", None)
        return None if longest is None else longest - len(self._head) - self._trie.depth

    @torch.no_grad()
    def _logprobs(self, prompt: Path) -> Float64[Tensor, "101"]:
        """Summed log-probability of each number's tokens after the prompt."""
        first = self._run([prompt], None)
        found = self._trie.read(first.logits[:, -1:], [()])
        for start in range(0, len(self._trie.rows), self._batch_size):
            rows = self._trie.rows[start : start + self._batch_size]
            filler = pad_id(self._tokenizer)  # after a row's own tokens, where none of them looks
            longest = max(map(len, rows))
            ids = [(*row, *[filler] * (longest - len(row))) for row in rows]
            logits = self._run(ids, _copied(first.past_key_values, len(rows))).logits
            found |= self._trie.read(logits, rows)
        return torch.tensor(self._trie.sums(found), dtype=torch.float64)

    def _run(self, ids: Sequence[Path], cache: Any) -> Any:
        device = self._hf.get_input_embeddings().weight.device
        return self._hf(torch.tensor(ids, device=device), past_key_values=cache, use_cache=True)


class _Trie:
    """Token paths that share their beginnings.

    A step is a beginning and the token that follows it. `rows` are the beginnings that go on in no
    other: to run them is to score every step but those from the root.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths
        self._after: dict[Path, set[int]] = {}
        for path in paths:
            for at, token in enumerate(path):
                self._after.setdefault(path[:at], set()).add(token)
        shorter = {stem[:at] for stem in self._after for at in range(len(stem))}
        self.rows = sorted(set(self._after) - shorter)
        self.depth = max(map(len, paths))

    def read(
        self, logits: Float[Tensor, "row pos vocab"], rows: Sequence[Path]
    ) -> dict[Path, float]:
        """Log-probabilities of the steps from beginnings of `rows`, by the path each leads to.

        Position `t` of a row follows its first `t + 1` tokens; that of the root is its only one.
        """
        precision = torch.float64 if logits.dtype is torch.float64 else torch.float32
        normalised = torch.log_softmax(logits.to(precision), -1)
        where: dict[Path, tuple[int, int, int]] = {}
        for index, row in enumerate(rows):
            for length in range(1, len(row) + 1) if row else (0,):
                for token in self._after[row[:length]]:
                    where[(*row[:length], token)] = (index, max(length - 1, 0), token)
        picked = normalised[tuple(torch.tensor(list(where.values()), device=logits.device).T)]
        return dict(zip(where, picked.tolist(), strict=True))

    def sums(self, found: Mapping[Path, float]) -> list[float]:
        """The sum over the steps of each path."""
        return [math.fsum(found[path[: at + 1]] for at in range(len(path))) for path in self._paths]


def _copied(cache: Any, n: int) -> Any:
    """The cache of one row for `n` rows; the forward extends the copy, never the original."""
    copied = copy.deepcopy(cache)
    if not hasattr(copied, "batch_repeat_interleave"):
        raise JudgeFailure(
            f"got a model whose cache is {type(cache).__name__}; wanted one that can be repeated "
            "for many rows. Judge with another model"
        )
    copied.batch_repeat_interleave(n)
    return copied


def _written_numbers(tokenizer: Any) -> tuple[Path, list[Path]]:
    """What the template writes between a prompt and a reply, and the tokens of each number.

    The numbers are read out of rendered chats, as the model would write them, each with the token
    that the template puts after a reply, or the tokenizer's end token where it puts none.
    """
    heads, paths = set(), []
    for number in _NUMBERS:
        written = encode(tokenizer, [_ROLE, {"role": "assistant", "content": str(number)}])
        assert written.reply is not None, "a chat that ends with a reply has its range"
        start, end = written.reply
        heads.add(written.ids[written.prompt_length : start])
        closing = written.ids[end : end + 1] or (getattr(tokenizer, "eos_token_id", None),)
        if closing == (None,):
            raise JudgeFailure(
                "got a chat template that ends no reply and a tokenizer without an end token; "
                "wanted one of them, to tell 1 from 10. Set tokenizer.eos_token"
            )
        paths.append((*written.ids[start:end], *closing))
    if len(heads) > 1 or len(set(paths)) < len(paths):
        raise JudgeFailure(
            "got a chat template that writes numbers differently from one another; wanted the same "
            "frame around each reply. Set tokenizer.chat_template"
        )
    return heads.pop(), paths
