"""The chat view: conversations as a page, every token of the assistant coloured by projection."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isnan
from statistics import median

from pvcore.alarms import Alarm
from pvcore.drift_plot import conversation_drift
from pvcore.errors import VectorError
from pvcore.numerals import Number, number
from pvcore.palette import trait_colours
from pvcore.report import Figure, Page, Section, Table
from pvcore.sites import Site, as_sites
from pvcore.token_colours import ReportError, Scale, legend_html, text_html, token_html
from pvcore.transcripts import Reply, Transcript

# Single tokens with massive activations would leave all others without colour.
FULL_COLOUR = 0.95


@dataclass(frozen=True, slots=True, kw_only=True)
class ConversationView:
    """A conversation at one site; the reader switches between the traits. A block of a report.

    A trait's colour is full at the ends of its scale, and none in the middle.
    """

    transcript: Transcript
    site: Site
    scales: Mapping[str, Scale] = field(default_factory=dict)

    def html(self, number: int) -> str:
        """The view as HTML without scripts; all text is escaped."""
        colours = trait_colours(self.transcript.traits)
        tabs = []
        for place, trait in enumerate(self.transcript.traits):
            button = f"chat-{number}-{place}"
            tabs.append(
                f'<input type="radio" name="chat-{number}" id="{button}"'
                f'{"" if place else " checked"}><label for="{button}" '
                f'style="--trait:{colours[trait].css}" title="mean projection over all replies">'
                f'{text_html(trait)}{self._mean(trait)}</label><div class="pane">'
                f'<div class="turns">{self._turns(trait)}</div>{self._legend(trait)}</div>'
            )
        return f'<figure class="card"><div class="tabs">{"".join(tabs)}</div></figure>'

    def values(self, trait: str) -> list[list[float]]:
        """One row of projections for each reply."""
        one = self.transcript
        at = one.of(trait), one.sites.index(self.site)
        return [reply.projections[at].double().tolist() for reply in one.replies]

    def _scale(self, trait: str) -> Scale:
        return self.scales.get(trait) or _scale_of(self.values(trait))

    def _mean(self, trait: str) -> str:
        known = [value for row in self.values(trait) for value in row if not isnan(value)]
        return f"<b>{number(sum(known) / len(known), signed=True)}</b>" if known else ""

    def _legend(self, trait: str) -> str:
        tokens = [token for reply in self.transcript.replies for token in reply.tokens]
        values = [value for row in self.values(trait) for value in row]
        return legend_html(tokens, values, self._scale(trait))

    def _turns(self, trait: str) -> str:
        one, values = self.transcript, self.values(trait)
        by_message = {
            reply.message: (reply, row) for reply, row in zip(one.replies, values, strict=True)
        }
        parts = []
        for index, message in enumerate(one.messages):
            if index in by_message:
                parts.append(self._reply(trait, *by_message[index]))
            else:
                role = text_html(str(message["role"]))
                parts.append(
                    f'<div class="prompt" data-role="{role}">{text_html(str(message["content"]))}'
                    "</div>"
                )
        return "".join(parts)

    def _reply(self, trait: str, reply: Reply, values: Sequence[float]) -> str:
        rung = {
            alarm.step: alarm
            for alarm in self.transcript.alarms_of(reply)
            if (alarm.trait, alarm.site) == (trait, self.site)
        }
        scale = self._scale(trait)
        tokens = "".join(
            _bell(rung.get(place)) + token_html(token, value, scale)
            for place, (token, value) in enumerate(zip(reply.tokens, values, strict=True))
        )
        before = float(reply.before[self.transcript.of(trait), self._place])
        return (
            f'<div class="reply"><i class="before">before {number(before, signed=True)}</i>'
            f"{tokens}{_bell(rung.get(len(reply.tokens)))}</div>"
        )

    @property
    def _place(self) -> int:
        return self.transcript.sites.index(self.site)


def chat_view(
    transcripts: Sequence[Transcript],
    *,
    site: int | Site | None = None,
    title: str = "Conversations",
    levels: Mapping[str, Number] | None = None,
) -> Page:
    """A page of conversations, to be written with `pvcore.report.write`.

    `site` is the layer shown, by default the last of the bank; all conversations share one scale
    for each trait. `levels` are alarm levels to draw. `ReportError` without a conversation.
    """
    if not transcripts:
        raise ReportError("got no conversations to show; wanted at least one")
    chosen = transcripts[0].sites[-1] if site is None else as_sites([site])[0]
    if any(chosen not in one.sites for one in transcripts):
        known = ", ".join(map(str, transcripts[0].sites))
        raise VectorError(f"got {chosen}; these conversations were watched at {known}")
    views = [ConversationView(transcript=one, site=chosen) for one in transcripts]
    traits = dict.fromkeys(trait for one in transcripts for trait in one.traits)
    scales = {
        trait: _scale_of(
            [row for view in views if trait in view.transcript.traits for row in view.values(trait)]
        )
        for trait in traits
    }
    return Page(
        title=title,
        lead=f"{len(transcripts)} conversations. Colours are projections <h, v/|v|> at {chosen}, "
        "in units of the residual, at each token's own position. A triangle follows the token "
        "whose projection set off an alarm.",
        sections=[
            _section(count, one, chosen, scales, levels or {})
            for count, one in enumerate(transcripts, 1)
        ],
    )


def _section(
    count: int,
    one: Transcript,
    site: Site,
    scales: Mapping[str, Scale],
    levels: Mapping[str, Number],
) -> Section:
    view = ConversationView(transcript=one, site=site, scales=scales)
    blocks: list[object] = [view]
    # An empty reply has no token to draw.
    drawn = {trait: [row for row in view.values(trait) if row] for trait in one.traits}
    if all(drawn.values()):
        shown = {trait: level for trait, level in levels.items() if trait in one.traits}
        svg = conversation_drift(drawn, site=str(site), levels=shown)
        caption = "Thin: each token. Heavy: the mean of each reply."
        blocks.append(Figure(svg=svg, caption=caption))
    rows = [
        [s.trait, s.before, s.mean, s.max, s.last, _turn(one, s.alarm_message), s.first_alarm]
        for s in one.summaries()
        if s.site == site
    ]
    figures = ["trait", "before the reply", "mean", "highest", "last"]
    columns = [*figures, "first alarm in reply", "at step"]
    if rows:
        blocks.append(Table(columns=columns, rows=rows))
    return Section(title=f"Conversation {count}", blocks=blocks)  # type: ignore[arg-type]


def _turn(one: Transcript, message: int | None) -> int | None:
    """Which reply of the conversation a message is, counted from 1."""
    return None if message is None else [r.message for r in one.replies].index(message) + 1


def _scale_of(rows: Sequence[Sequence[float]]) -> Scale:
    """No colour at the median, full colour at the 95th percentile of what lies away from it."""
    known = [value for row in rows for value in row if not isnan(value)]
    if not known:
        return Scale()
    centre = median(known)
    away = sorted(abs(value - centre) for value in known)
    return Scale(centre=centre, reach=away[int(FULL_COLOUR * (len(away) - 1))] or 1.0)


def _bell(alarm: Alarm | None) -> str:
    if alarm is None:
        return ""
    told = f"alarm: {number(alarm.value, signed=True)} above {number(alarm.threshold, signed=True)}"
    return f'<b class="bell" title="{text_html(told)}">▲</b>'
