"""The chat view: every token with its colour and value, all text escaped, nothing from outside."""

import re
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

import pvcore as pv
from pvcore import report
from pvcore.chat_view import ConversationView, chat_view
from pvcore.drift_plot import conversation_drift
from pvcore.errors import VectorError
from pvcore.numerals import number
from pvcore.token_colours import ReportError
from pvcore.transcripts import Reply, Transcript
from tests.test_exports import ALARM, SITES, reply, transcript

ATTACK = '</div><script>alert("x")</script><img src=x onerror=alert(1)>'


class Reader(HTMLParser):
    """Collects the tags of a page, and the tokens of its panes with class, strength and value."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.tokens: list[tuple[str, str, str]] = []
        self._open: tuple[str, str] | None = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        given = dict(attrs)
        assert not any(name.startswith("on") for name in given)
        if tag == "span" and "data-v" in given:
            self._open = (str(given.get("class")), str(given["data-v"]))
            self.tokens.append((*self._open, ""))

    def handle_data(self, data: str) -> None:
        if self._open is not None:
            side, value, text = self.tokens[-1]
            self.tokens[-1] = (side, value, text + data)

    def handle_endtag(self, tag: str) -> None:
        if tag == "span":
            self._open = None


def read(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    return reader


def test_every_token_has_the_colour_and_the_number_of_its_projection() -> None:
    one = transcript(cut=True)
    page = read(ConversationView(transcript=one, site=SITES[1]).html(0))
    texts = [token for reply in one.replies for token in reply.tokens]
    assert len(page.tokens) == 2 * len(texts)
    for k, _ in enumerate(one.traits):
        values = torch.cat([reply.projections[k, 1] for reply in one.replies]).tolist()
        known = sorted(value for value in values if value == value)
        middle = (known[(len(known) - 1) // 2] + known[len(known) // 2]) / 2
        shown = page.tokens[k * len(texts) : (k + 1) * len(texts)]
        for (side, told, text), value, wanted in zip(shown, values, texts, strict=True):
            assert text.replace("↵\n", "\n") == wanted
            if value != value:
                assert (side, told) == ("unknown", "no value")
            else:
                assert told == number(value, signed=True)
                assert side == ("up" if value >= middle else "down")


def test_no_text_can_become_markup(tmp_path: Path) -> None:
    base = transcript()
    hostile = Transcript(
        messages=(
            {"role": 'user" onclick="x', "content": ATTACK},
            {"role": "assistant", "content": ATTACK},
        ),
        replies=(
            Reply(
                message=1,
                tokens=(ATTACK, "\x00\ud800"),
                before=base.replies[0].before,
                projections=base.replies[0].projections,
            ),
        ),
        traits=(ATTACK, "b"),
        sites=SITES,
        alarms=(pv.Alarm(trait="b", site=SITES[1], chat=0, step=0, value=1.0, threshold=0.0),),
    )
    report.write(chat_view([hostile], title=ATTACK), tmp_path / "chat.html")
    page = (tmp_path / "chat.html").read_text(encoding="utf-8")
    found = read(page)
    assert not {"script", "img", "iframe", "link", "object"} & set(found.tags)
    assert ATTACK in [unescape(token[2]) for token in found.tokens]
    assert not re.search(r"(?:src|href)=[\"'](?!#)", page)
    assert "url(" not in re.sub(r"url\(#[\w-]+\)", "", page)


def test_alarms_stand_before_the_token_they_rang_for() -> None:
    one = transcript()
    page = ConversationView(transcript=one, site=SITES[1]).html(0)
    evil, other = page.split('id="chat-0-1"')
    assert page.count('class="bell"') == 1
    bell = evil.index('class="bell"')
    assert evil.index(">Wel<") < bell < evil.index(">l<")
    assert "alarm: +4.50 above +4.00" in evil
    assert "bell" not in other
    assert "bell" not in ConversationView(transcript=one, site=SITES[0]).html(0)


def test_conversations_of_one_page_share_their_scale_and_name_it() -> None:
    page = report.render(chat_view([transcript(), transcript(seed=5)], levels={"evil": 4.0}))
    ends = re.findall(r'<div class="scale"><span>(.*?)</span><i></i><span>(.*?)</span>', page)
    assert len(ends) == 4
    assert ends[0] == ends[2] != ends[1] == ends[3]
    assert "in units of the residual" in page
    assert page.count("<svg") == 2
    assert "evil: alarm 4" in page
    assert page == report.render(
        chat_view([transcript(), transcript(seed=5)], levels={"evil": 4.0})
    )


def test_an_empty_reply_leaves_the_figure_of_the_others() -> None:
    one = transcript()
    silent = {"role": "assistant", "content": ""}
    empty = replace(one, messages=(*one.messages, silent), replies=(*one.replies, reply(4, (), 9)))
    page, figure = (report.render(chat_view([seen])) for seen in (empty, one))
    svg = re.search(r"<svg.*?</svg>", figure, re.DOTALL)
    assert svg is not None
    assert svg[0] in page


def test_a_conversation_without_replies_is_still_shown() -> None:
    bare = Transcript(
        messages=({"role": "user", "content": "hi"},), replies=(), traits=("evil",), sites=SITES
    )
    page = report.render(chat_view([bare]))
    assert ">hi<" in page
    assert "<svg" not in page


def test_what_cannot_be_shown_is_refused() -> None:
    with pytest.raises(ReportError, match="no conversations"):
        chat_view([])
    with pytest.raises(VectorError, match=r"got resid_post.7; .* at resid_post.0, resid_post.19"):
        chat_view([transcript()], site=7)
    with pytest.raises(ReportError, match="different lengths by trait"):
        conversation_drift({"a": [[1.0]], "b": [[1.0, 2.0]]}, site="resid_post.1")
    assert ALARM.site in SITES
