"""Dates: a scan that began on one day goes on by that day, whatever the chat template prints."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

import pvcore as pv
from pvcore import flag_dates
from pvcore.errors import FlagError
from pvcore.flag_dates import moment_for, pinned, written
from tests.families import CHATML, build, tokenizer
from tests.flag_data import bank, chats, scores

DATED = (
    "{% if strftime_now is defined %}{% set day = strftime_now('%d %b %Y') %}"
    "{% else %}{% set day = '26 Jul 2024' %}{% endif %}"
    '<|im_start|>system\n{{ day }} {{ strftime_now("%H:%M") }}<|im_end|>\n' + CHATML
)
ROWS = [{"messages": chat} for chat in chats(12)]
CHAT = chats(1)[0]


def dated(template: str = DATED) -> pv.HookedModel:
    return pv.HookedModel(build("qwen2"), tokenizer(template=template), model_id="tiny/qwen2")


class Clock:
    """A `datetime` whose present is set."""

    def __init__(self, text: str) -> None:
        self.text = text

    def now(self) -> datetime:
        return datetime.fromisoformat(self.text)

    fromisoformat = staticmethod(datetime.fromisoformat)


def today(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """Another day for pvcore and for transformers, which caches what it compiled."""
    from transformers.utils import chat_template_utils

    for module in (flag_dates, chat_template_utils):
        monkeypatch.setattr(module, "datetime", Clock(text))


def test_a_pinned_template_prints_one_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = tokenizer(template=DATED)
    today(monkeypatch, "2031-05-06T07:08:09")
    now = moment_for(plain)
    assert now == "2031-05-06T07:08:09"
    text = plain.apply_chat_template(CHAT, tokenize=False)
    assert "06 May 2031 07:08" in text
    today(monkeypatch, "2031-05-07T10:11:12")
    assert "07 May 2031 10:11" in plain.apply_chat_template(CHAT, tokenize=False)
    assert pinned(plain, now).apply_chat_template(CHAT, tokenize=False) == text
    assert plain.chat_template == DATED
    assert written(pinned(plain, now)) != written(plain)


def test_templates_without_a_date_are_left_alone() -> None:
    plain = tokenizer()
    assert moment_for(plain) is None
    assert pinned(plain, None) is plain


@pytest.mark.parametrize("difference", ["approximate", "exact"])
def test_a_scan_resumed_on_another_day_is_that_of_one_day(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, difference: str
) -> None:
    settings: dict[str, Any] = {"difference": difference, "max_new_tokens": 3, "shard_rows": 4}
    today(monkeypatch, "2031-05-06T07:08:09")
    wanted = scores(pv.flag(dated(), ROWS, bank(), out=tmp_path / "one", **settings))
    out = tmp_path / "two"
    pv.flag(dated(), ROWS, bank(), out=out, **settings)
    (out / "scores/part-000001.parquet").unlink()
    for kept in (out / "replies").glob("*"):
        kept.unlink()
    today(monkeypatch, "2031-06-17T18:19:20")
    assert scores(pv.flag(dated(), ROWS, bank(), out=out, **settings)) == wanted
    assert json.loads((out / "manifest.json").read_text())["asked"]["moment"] == (
        "2031-05-06T07:08:09"
    )
    anew = scores(pv.flag(dated(), ROWS, bank(), out=tmp_path / "anew", **settings))
    assert anew != wanted, "the date decides about no score"


def test_a_date_that_cannot_be_pinned_is_refused_on_another_day(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = "{% set how = '%d %b' %}<|im_start|>system\n{{ strftime_now(how) }}<|im_end|>\n"
    today(monkeypatch, "2031-05-06T07:08:09")
    out = tmp_path / "out"
    pv.flag(dated(template + CHATML), ROWS, bank(), out=out)
    assert pv.flag(dated(template + CHATML), ROWS, bank(), out=out).scored == 12
    today(monkeypatch, "2031-05-07T07:08:09")
    with pytest.raises(FlagError, match=r"written was .* a date in it\?"):
        pv.flag(dated(template + CHATML), ROWS, bank(), out=out)


def test_a_template_that_refuses_the_probe_is_known_by_its_error() -> None:
    assert written(tokenizer(template="{{ raise_exception('no') }}")) != written(tokenizer())
