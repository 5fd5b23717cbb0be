"""The run of rollouts: replies written batch by batch and judged one by one, each kept at once."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial

import torch

from pvcore import fingerprints
from pvcore.chats import Encoded, span_range
from pvcore.errors import ChatError, ExtractionError, SpanError
from pvcore.judge import Judge, Judgements, judge_all
from pvcore.model import HookedModel
from pvcore.replies import Writer, batches
from pvcore.rollouts import Rollout, Turn
from pvcore.traits import Trait
from pvcore.workbook import Workbook


@dataclass(frozen=True, slots=True)
class Run:
    """Who is asked what, by whom it is judged, and all that decides what comes of it."""

    model: HookedModel
    trait: Trait
    judge: Judge
    turns: tuple[Turn, ...]
    writer: Writer
    batch_size: int
    progress: bool

    def settings(self) -> dict[str, str | int | float]:
        """What decides the rollouts, by names a reader of an error knows."""
        return {
            **model_settings(self.model),
            "trait": f"{self.trait.name} {fingerprints.of_text(asdict(self.trait))}",
            "system prompts and questions": fingerprints.of_text(
                [[turn.positive, turn.chat, turn.copy] for turn in self.turns]
            ),
            "replies": len(self.turns),
            "judge": judge_identity(self.judge),
            "batch size": self.batch_size,
            **self.writer.identity,
        }

    def written(self, book: Workbook) -> list[str | None]:
        """The replies to all turns; batches that the workbook has are not written again."""
        replies: list[str | None] = []
        what = "sampling" if self.progress else ""
        for batch, chosen in enumerate(batches(self.turns, self.batch_size, what)):
            kept = book.replies(batch, len(chosen))
            if kept is None:
                kept = list(self.writer.write(chosen, batch=batch))
                if len(kept) != len(chosen):
                    raise ExtractionError(
                        f"got {len(kept)} replies to {len(chosen)} turns from "
                        f"{type(self.writer).__name__}; wanted one to each. Mend the writer"
                    )
                book.keep_replies(batch, kept)
            replies += kept
        return replies

    def judged(
        self, book: Workbook, replies: Sequence[str | None]
    ) -> tuple[list[Rollout], Judgements, dict[int, Encoded]]:
        """Rollouts with scores or a reason to drop them, their judgements, and token ids."""
        written = [_rollout(turn, reply) for turn, reply in zip(self.turns, replies, strict=True)]
        rows, encoded = readable(self.model, written)
        sound = [index for index, row in enumerate(rows) if not row.dropped]
        if not sound:
            raise ExtractionError(
                f"got no readable reply among {len(rows)} for {self.trait.name!r} "
                f"({rows[0].dropped}); wanted replies to judge. Look at what the model writes, or "
                "raise max_new_tokens"
            )
        texts = [(rows[index].question, rows[index].answer) for index in sound]
        judge = book.judge(self.judge)
        judgements = judge_all(judge, self.trait.name, texts, progress=self.progress)
        judge.settle(self.trait.name, judgements.rows)
        for index, judgement in zip(sound, judgements.rows, strict=True):
            rows[index] = replace(
                rows[index],
                trait_score=judgement.trait_score,
                coherence_score=judgement.coherence_score,
                dropped="" if judgement.failure is None else "the judge failed",
            )
        return rows, judgements, encoded


def readable(
    model: HookedModel, rollouts: Sequence[Rollout]
) -> tuple[list[Rollout], dict[int, Encoded]]:
    """The rollouts, those whose residuals cannot be read dropped, and the token ids of the rest."""
    rows, encoded = [], {}
    for index, row in enumerate(rollouts):
        flaw = row.dropped
        if not flaw:
            found = _encoded(model, row)
            if isinstance(found, Encoded):
                encoded[index] = found
            else:
                flaw = found
        rows.append(replace(row, dropped=flaw))
    return rows, encoded


def model_settings(model: HookedModel) -> dict[str, str | int | float]:
    """What says that a model is the same as before."""
    return {
        "model": model.model_id,
        "weights": fingerprints.of_weights(model.hf),
        "tokenizer": fingerprints.of_tokenizer(model.tokenizer),
        "dtype": str(model.dtype),
        "device": model.device.type,
    }


def judge_identity(judge: Judge) -> str:
    """A judge's class, and what it says of itself under `identity`, where it says anything."""
    kind = type(judge)
    return f"{kind.__module__}.{kind.__qualname__} {getattr(judge, 'identity', '')}".strip()


def _rollout(turn: Turn, reply: str | None) -> Rollout:
    return Rollout(
        positive=turn.positive,
        system_prompt=turn.system_prompt,
        question=turn.question,
        answer=reply or "",
        trait_score=None,
        coherence_score=None,
        dropped="the writer declined" if reply is None else "",
    )


def _encoded(model: HookedModel, row: Rollout) -> Encoded | str:
    """The token ids of a conversation, or why its reply cannot be read."""
    if not row.answer.strip():
        return "empty reply"
    try:
        (encoded,) = model.encode([row.chat])
        span_range(encoded, "response")
        return _as_sampled(model, row, encoded)
    except SpanError:
        return "reply whose tokens cannot be told from the prompt's"
    except ChatError:
        return "reply too long for the model"


def _as_sampled(model: HookedModel, row: Rollout, encoded: Encoded) -> Encoded:
    """The tokens of the prompt and the reply, blanks at its ends and all.

    Some templates trim replies that are given to them. The model wrote no such thing, and the
    paper's code reads the rendered prompt and the reply one after the other.
    """
    if row.answer == row.answer.strip():
        return encoded
    render = partial(model.tokenizer.apply_chat_template, tokenize=False)
    text = f"{render(row.chat[:-1], add_generation_prompt=True)}{row.answer}"
    if str(render(row.chat)).startswith(text):
        return encoded
    ids = tuple(model.tokenizer(text, add_special_tokens=False)["input_ids"])
    start = encoded.prompt_length
    if ids[:start] != encoded.ids[:start] or len(ids) == start:
        raise SpanError("the reply shares a token with the prompt, or has none of its own")
    model.encode([torch.tensor(ids)])  # for the check that the model can read so many
    return replace(encoded, ids=ids, reply=(start, len(ids)))
