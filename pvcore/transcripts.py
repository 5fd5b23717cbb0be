"""Transcripts: conversations with the projection of every token their assistant wrote."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from pvcore.alarms import Alarm
from pvcore.errors import VectorError
from pvcore.sites import Site
from pvcore.stream import Pieces


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """One assistant turn, token by token, with projections at the tokens' own positions.

    `before` is the projection at the last prompt token, which foretells the reply. `projections`
    are NaN for a last token that the model was never given, as when a length limit cut the reply.
    """

    message: int
    tokens: tuple[str, ...]
    before: Float[Tensor, "trait layer"]
    projections: Float[Tensor, "trait layer token"]

    @property
    def mean(self) -> Float[Tensor, "trait layer"]:
        """The mean projection over the reply; NaN for a reply of which nothing is known."""
        return self.projections.double().nanmean(-1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """What one conversation showed on one trait at one site, over all its replies.

    `before` is the projection at the last prompt token of the last reply, `last` that of the last
    token known; `first_alarm` the step of the first alarm, within the reply `alarm_message`.
    """

    trait: str
    site: Site
    before: float
    mean: float
    max: float
    last: float
    first_alarm: int | None
    alarm_message: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Transcript:
    """A conversation, its replies, and the alarms of all of them, in their order.

    An alarm whose `message` is None counts for the last reply.
    """

    messages: tuple[Mapping[str, object], ...]
    replies: tuple[Reply, ...]
    traits: tuple[str, ...]
    sites: tuple[Site, ...]
    alarms: tuple[Alarm, ...] = ()

    def of(self, trait: str) -> int:
        """The place of a trait on the trait axes."""
        if trait not in self.traits:
            raise VectorError(f"got trait {trait!r}; this watches {', '.join(self.traits)}")
        return self.traits.index(trait)

    def alarms_of(self, reply: Reply) -> tuple[Alarm, ...]:
        """The alarms that rang in one of the replies."""
        last = self.replies[-1].message
        return tuple(
            alarm
            for alarm in self.alarms
            if (last if alarm.message is None else alarm.message) == reply.message
        )

    def drift(self, trait: str) -> Float[Tensor, "turn layer"]:
        """The mean projection of each reply in turn."""
        place = self.of(trait)
        if not self.replies:
            return torch.empty(0, len(self.sites), dtype=torch.float64)
        return torch.stack([reply.mean[place] for reply in self.replies])

    def summaries(self) -> list[Summary]:
        """One summary for each trait and site; none for a conversation without a reply."""
        if not self.replies:
            return []
        every = torch.cat([reply.projections for reply in self.replies], dim=-1).double()
        first: dict[tuple[str, Site], tuple[int, int]] = {}
        for reply in self.replies:
            for alarm in self.alarms_of(reply):
                first.setdefault((alarm.trait, alarm.site), (alarm.step, reply.message))
        found = []
        for k, trait in enumerate(self.traits):
            for place, site in enumerate(self.sites):
                known = every[k, place][~every[k, place].isnan()]
                step, message = first.get((trait, site), (None, None))
                found.append(
                    Summary(
                        trait=trait,
                        site=site,
                        before=float(self.replies[-1].before[k, place]),
                        mean=float(known.mean()) if len(known) else float("nan"),
                        max=float(known.max()) if len(known) else float("nan"),
                        last=float(known[-1]) if len(known) else float("nan"),
                        first_alarm=step,
                        alarm_message=message,
                    )
                )
        return found


def token_texts(tokenizer: object, ids: Sequence[int], *, marks: bool = False) -> tuple[str, ...]:
    """The text each token adds; a character of several tokens stands at the last of them."""
    pieces = Pieces(tokenizer, marks=marks)
    return tuple(pieces.push(token, last=k + 1 == len(ids)) for k, token in enumerate(ids))
