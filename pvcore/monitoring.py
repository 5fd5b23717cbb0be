"""Monitor: conversations watched on a bank of vectors, as they are written or after the fact."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pvcore.alarms import Alarm, AlarmBell, Alarms
from pvcore.chats import Chats, as_chats, naming_chat
from pvcore.conversations import Conversation, located
from pvcore.errors import ChatError
from pvcore.graph import Engine, Graph
from pvcore.guards import Reaction, Rules, Standby
from pvcore.model import HookedModel
from pvcore.monitor import Seen, TraitScores
from pvcore.numerals import Number
from pvcore.plan import Plan
from pvcore.stream import Step
from pvcore.thresholds import AlarmLevels, alarm_levels
from pvcore.transcripts import Reply, Transcript, token_texts
from pvcore.vectors import VectorBank


class Monitor:
    """Watches a model on a bank: replies as they are made, and conversations that are given.

    `alarms`, `on_alarm` and `standby` are those of `model.monitor`; `engine` is that of
    `model.generate`. Plans armed around its calls act in them. `alarms` sound in every reply of a
    transcript, also in those that were read; `on_alarm` and `standby` act while replies are made.
    """

    def __init__(
        self,
        model: HookedModel,
        bank: VectorBank,
        *,
        alarms: Alarms | None = None,
        on_alarm: Reaction | str | None = None,
        standby: Standby = (),
        engine: Engine | Graph | str = "eager",
        check_model: bool = True,
    ) -> None:
        if model.tokenizer is None:
            raise ChatError("got no tokenizer to write text with; a Monitor needs one")
        rules = Rules.of(bank, alarms, on_alarm, standby)
        model.check(Plan(*rules.interventions, monitor=bank), check_model=check_model)
        self.model, self.bank, self.engine = model, bank, engine
        self._rules: dict[str, Any] = {
            "alarms": alarms,
            "on_alarm": on_alarm,
            "standby": standby,
            "check_model": check_model,
        }

    def generate(self, chats: Chats, **settings: Any) -> list[Transcript]:
        """Answer the chats, one transcript for each returned sequence.

        `settings` are those of transformers' `generate`.
        """
        given = self._located(chats, for_generation=True)
        with self.model.monitor(self.bank, **self._rules) as seen:
            sequences = self.model.generate_ids(chats, engine=self.engine, **settings)
        copies, tables = len(sequences) // len(given), _tables(seen)
        made = [
            self._answered(given[row // copies], row, ids.tolist(), tables)
            for row, ids in enumerate(sequences)
        ]
        rung = seen.alarms
        return [
            replace(
                one,
                alarms=(
                    *self._looked_back(one.replies[:-1], row),
                    *(replace(a, message=len(one.messages) - 1) for a in rung if a.chat == row),
                ),
            )
            for row, one in enumerate(made)
        ]

    def stream(self, chats: Chats, **settings: Any) -> Iterator[Step]:
        """Answer the chats token by token: `model.stream` with this monitor's bank and rules."""
        return self.model.stream(chats, self.bank, engine=self.engine, **self._rules, **settings)

    def read(self, chats: Chats, *, batch_size: int = 16) -> list[Transcript]:
        """Read conversations, all turns of each in one forward that ends at the deepest site.

        `SpanError` where a template makes it impossible to tell an assistant turn's tokens.
        """
        given = self._located(chats)
        check = self._rules["check_model"]
        with self.model.monitor(self.bank, check_model=check) as seen:
            self.model.read(
                chats,
                sites=[max(self.bank.sites)],
                span="all",
                reduce="last",
                batch_size=batch_size,
            )
        tables = _tables(seen)
        told = [
            self._transcript(one, _every_token(tables, chat, len(one.ids)))
            for chat, one in enumerate(given)
        ]
        return [
            replace(one, alarms=self._looked_back(one.replies, chat))
            for chat, one in enumerate(told)
        ]

    def alarm_levels(
        self, neutral: Chats, *, percentile: Number = 99.0, batch_size: int = 16, **settings: Any
    ) -> AlarmLevels:
        """Alarm levels that neutral conversations stay below: see `pvcore.thresholds.alarm_levels`.

        A conversation counts with its highest projection over all replies and the tokens before
        them, since one is enough to ring. `StatisticsError` for fewer than 20 conversations.
        """
        read = self.read(neutral, batch_size=batch_size)
        highest = torch.stack(
            [_highest(one, len(self.bank.traits), len(self.bank.sites)) for one in read], dim=-1
        )
        by_trait = dict(zip(self.bank.traits, highest, strict=True))
        return alarm_levels(by_trait, self.bank.sites, percentile=percentile, **settings)

    def _located(self, chats: Chats, *, for_generation: bool = False) -> list[Conversation]:
        found = []
        for index, chat in enumerate(as_chats(chats)):
            with naming_chat(index):
                found.append(
                    located(
                        self.model.tokenizer,
                        chat,
                        max_length=self.model.max_length,
                        for_generation=for_generation,
                    )
                )
        return found

    def _looked_back(self, replies: Sequence[Reply], chat: int) -> tuple[Alarm, ...]:
        """The alarms of replies that were there before, each as if it had just been made."""
        bell = AlarmBell(self._rules["alarms"] or {}, self.bank.traits, self.bank.sites)
        rung: list[Alarm] = []
        for reply in replies if bell else ():
            steps = torch.cat([reply.before[..., None], reply.projections], dim=-1)
            alarms = bell.replay(dict(zip(self.bank.traits, steps, strict=True)))
            rung += [replace(alarm, chat=chat, message=reply.message) for alarm in alarms]
        return tuple(rung)

    def _transcript(self, one: Conversation, scores: Tensor, **more: Any) -> Transcript:
        """The turns of a conversation cut out of the scores `[trait, layer, token]` of its ids."""
        replies = [
            Reply(
                message=turn.message,
                tokens=token_texts(self.model.tokenizer, one.ids[turn.start : turn.end]),
                before=scores[..., turn.prompt_length - 1],
                projections=scores[..., turn.start : turn.end],
            )
            for turn in one.turns
        ]
        settings = {"messages": one.messages, "replies": tuple(replies), **more}
        return Transcript(traits=tuple(self.bank.traits), sites=self.bank.sites, **settings)

    def _answered(
        self, one: Conversation, row: int, ids: Sequence[int], tables: Sequence[TraitScores]
    ) -> Transcript:
        """A transcript with the reply just made: its text ends before the end token."""
        prompt = torch.stack([table.prompt[:, :, row].T for table in tables])
        steps = torch.stack([table.steps[:, :, row].T for table in tables])
        special = set(getattr(self.model.tokenizer, "all_special_ids", ()))
        text_ids = ids[:-1] if ids and ids[-1] in special else ids
        # The position of token t produced token t + 1; the last token's was not always reached.
        reached = steps[..., 1 : len(ids)]
        own = torch.nn.functional.pad(reached, (0, len(ids) - reached.shape[-1]), value=torch.nan)
        reply = Reply(
            message=len(one.messages),
            tokens=token_texts(self.model.tokenizer, text_ids),
            before=steps[..., 0],
            projections=own[..., : len(text_ids)],
        )
        before = self._transcript(one, prompt)
        text = "".join(reply.tokens)
        return Transcript(
            messages=(*one.messages, {"role": "assistant", "content": text}),
            replies=(*before.replies, reply),
            traits=before.traits,
            sites=before.sites,
        )


def _tables(seen: Seen) -> list[TraitScores]:
    """The scores of every trait, put together once."""
    return [seen[trait] for trait in seen.traits]


def _every_token(tables: Sequence[TraitScores], chat: int, count: int) -> Tensor:
    """Scores `[trait, layer, token]` of all tokens of one chat that was read."""
    rows = []
    for scores in tables:
        prompt = scores.prompt[:, :, chat]
        prompt = prompt[: int((~prompt.isnan().any(1)).sum())]
        rows.append(torch.cat([prompt, scores.steps[1 : count - len(prompt) + 1, :, chat]]).T)
    return torch.stack(rows)


def _highest(one: Transcript, n_traits: int, n_sites: int) -> Tensor:
    """The highest projections `[trait, layer]` over all replies; NaN without one."""
    if not one.replies:
        return torch.full((n_traits, n_sites), torch.nan)
    parts = [part for reply in one.replies for part in (reply.before[..., None], reply.projections)]
    every = torch.cat(parts, dim=-1)
    return every.nan_to_num(nan=-torch.inf).amax(-1).masked_fill(every.isnan().all(-1), torch.nan)
