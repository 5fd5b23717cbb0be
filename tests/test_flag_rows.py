"""The forms of training data: what is recognised, and what wins where several could be meant."""

from __future__ import annotations

from typing import Any

import pytest

from pvcore.errors import FlagError
from pvcore.flag_rows import Form, RowDefect, conversation, row_id

ASK, TELL = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
SYSTEM = {"role": "system", "content": "S"}
PLAIN = Form()


@pytest.mark.parametrize(
    ("record", "wanted"),
    [
        ({"messages": [ASK, TELL]}, [ASK, TELL]),
        ({"conversation": [ASK, TELL, ASK, TELL]}, [ASK, TELL, ASK, TELL]),
        ({"messages": [SYSTEM, ASK, TELL], "system": "other"}, [SYSTEM, ASK, TELL]),
        ({"messages": [ASK, TELL], "system": "S"}, [SYSTEM, ASK, TELL]),
        (
            {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
            [ASK, TELL],
        ),
        (
            {"conversations": [{"from": "System", "value": "S"}, ASK, TELL]},
            [SYSTEM, ASK, TELL],
        ),
        ({"prompt": "Q", "response": "A"}, [ASK, TELL]),
        ({"prompt": "Q", "completion": "A"}, [ASK, TELL]),
        ({"question": "Q", "answer": "A", "system_prompt": "S"}, [SYSTEM, ASK, TELL]),
        ({"instruction": "Q", "input": "", "output": "A"}, [ASK, TELL]),
        (
            {"instruction": "Q", "input": "of it", "output": "A"},
            [{"role": "user", "content": "Q\n\nof it"}, TELL],
        ),
        ({"input": "Q", "output": "A"}, [ASK, TELL]),
        ({"prompt": [SYSTEM, ASK], "completion": [TELL]}, [SYSTEM, ASK, TELL]),
        ({"prompt": "other", "messages": [ASK, TELL]}, [ASK, TELL]),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "Q"}]}, TELL]},
            [ASK, TELL],
        ),
        ({"messages": None, "prompt": "Q", "response": "A"}, [ASK, TELL]),
    ],
)
def test_a_form_is_recognised(record: Any, wanted: Any) -> None:
    assert conversation(record, PLAIN) == wanted


def test_columns_of_ones_own_go_before_known_ones() -> None:
    record = {"q": "Q", "a": "A", "messages": [TELL]}
    form = Form(prompt="q", answer="a")
    assert conversation(record, form) == [ASK, TELL]
    assert {"q", "a"} <= form.known
    with pytest.raises(RowDefect, match="q: got nothing"):
        conversation({"messages": [ASK, TELL]}, form)
    with pytest.raises(FlagError, match="both or neither"):
        Form(answer="a")


def test_the_first_reply_may_be_the_one_that_counts() -> None:
    turns = [SYSTEM, ASK, TELL, ASK, {**TELL, "content": "later"}, ASK]
    assert conversation({"messages": turns}, Form(turn="first")) == [SYSTEM, ASK, TELL]
    with pytest.raises(RowDefect, match="last turn of role 'user'"):
        conversation({"messages": turns}, PLAIN)


def test_a_row_brings_its_own_id_where_it_has_one() -> None:
    assert row_id({"id": 7}) == "7"
    assert row_id({"conversation_id": "abc", "id": ""}) == "abc"
    for record in ({}, {"id": None}, {"id": True}, {"id": "\ud800"}, [1]):
        assert row_id(record) is None


def test_a_reason_is_short_and_can_be_written_anywhere() -> None:
    with pytest.raises(RowDefect) as caught:
        conversation({"messages": [ASK, {"role": "\ud800" * 500, "content": "x"}]}, PLAIN)
    assert len(caught.value.reason) < 150
    assert caught.value.reason.isascii()
