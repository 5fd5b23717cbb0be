"""The forms of training data: what is recognised, and what wins where several could be meant."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas
import pytest
import torch

from pvcore import flag_rows
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
        ({"messages": [SYSTEM, ASK, TELL], "system": " S"}, [SYSTEM, ASK, TELL]),
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
        (
            {"instruction": "Q", "context": "of it", "response": "A"},
            [{"role": "user", "content": "Q\n\nof it"}, TELL],
        ),
        ({"input": "Q", "output": "A"}, [ASK, TELL]),
        ({"question": "Q", "context": " ", "answer": "A", "input": None}, [ASK, TELL]),
        ({"messages": [ASK, TELL], "context": "a note"}, [ASK, TELL]),
        ({"prompt": [SYSTEM, ASK], "completion": [TELL]}, [SYSTEM, ASK, TELL]),
        ({"prompt": "other", "messages": [ASK, TELL]}, [ASK, TELL]),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "Q"}]}, TELL]},
            [ASK, TELL],
        ),
        ({"messages": None, "prompt": "Q", "response": "A"}, [ASK, TELL]),
        ({"prompt": [ASK], "completion": [TELL], "system": "S"}, [SYSTEM, ASK, TELL]),
        # Tables give every row the columns of all, and every message the fields of all.
        (
            {"prompt": None, "response": None, "question": "Q", "answer": "A"},
            [ASK, TELL],
        ),
        (
            {
                "messages": [
                    {"role": None, "content": None, "from": "human", "value": "Q"},
                    {"role": "assistant", "content": "A", "from": None, "value": None},
                ]
            },
            [ASK, TELL],
        ),
        ({"messages": {"role": ["user", "assistant"], "content": ["Q", "A"]}}, [ASK, TELL]),
        (
            {"conversations": {"from": ["human", "gpt"], "value": ["Q", "A"]}},
            [ASK, TELL],
        ),
        ({"messages": [{**ASK, "tool_calls": None}, {**TELL, "tool_calls": []}]}, [ASK, TELL]),
    ],
)
def test_a_form_is_recognised(record: Any, wanted: Any) -> None:
    assert conversation(record, PLAIN) == wanted


@pytest.mark.parametrize(
    ("record", "field"),
    [
        ({"question": "Q", "context": "C", "answer": "A"}, "context"),
        ({"prompt": "Q", "input": "C", "response": "A"}, "input"),
        ({"input": "Q", "context": "C", "output": "A"}, "context"),
        ({"prompt": [ASK], "context": ["C"], "completion": [TELL]}, "context"),
        ({"instruction": "Q", "input": "", "output": "A", "history": [["Q", "A"]]}, "history"),
        ({"messages": [ASK, TELL], "documents": [{"text": "C"}]}, "documents"),
        ({"messages": [SYSTEM, ASK, TELL], "system": "other"}, "system"),
        ({"prompt": "Q", "response": "A", "system": "S", "system_prompt": "other"}, "system"),
        ({"messages": [SYSTEM, ASK, TELL], "system": "S", "system_prompt": "other"}, "system"),
        (
            {"messages": [{**SYSTEM, "content": ""}, ASK, TELL], "system_prompt": "S"},
            "system_prompt",
        ),
        ({"prompt": [SYSTEM, ASK], "completion": [TELL], "system": "other"}, "system"),
    ],
)
def test_what_a_chat_would_lose_is_rejected_by_its_name(record: Any, field: str) -> None:
    with pytest.raises(RowDefect, match=r"got .*; wanted ") as caught:
        conversation(record, PLAIN)
    assert caught.value.field == field
    assert field in PLAIN.known


def test_columns_that_were_named_are_the_whole_chat() -> None:
    record = {"question": "Q", "context": "C", "answer": "A"}
    assert conversation(record, Form(prompt="question", answer="answer")) == [ASK, TELL]
    alpaca = {"instruction": "Q", "input": "I", "context": "C", "output": "A", "system": "S"}
    question = {"role": "user", "content": "Q\n\nI\n\nC"}
    form = Form(prompt="instruction", answer="output")
    assert conversation(alpaca, form) == [SYSTEM, question, TELL]
    with pytest.raises(RowDefect, match="history: got more than text"):
        conversation({**alpaca, "history": [["Q", "A"]]}, form)


def test_two_system_texts_are_named_both_and_one_said_twice_is_one() -> None:
    record = {"prompt": "Q", "response": "A", "system": "S", "system_prompt": "other"}
    with pytest.raises(RowDefect, match=r"^system: got another text than `system_prompt` has"):
        conversation(record, PLAIN)
    assert conversation({**record, "system_prompt": " S"}, PLAIN) == [SYSTEM, ASK, TELL]


MISSING = [None, float("nan"), np.float32("nan"), pandas.NA, pandas.NaT, ""]


@pytest.mark.parametrize("nothing", MISSING, ids=repr)
def test_what_a_table_has_for_nothing_is_nothing(nothing: Any) -> None:
    for name in ("system", "system_prompt", "input", "context", *sorted(flag_rows.BESIDE)):
        for record in (
            {"instruction": "Q", "output": "A", name: nothing},
            {"messages": [ASK, TELL], name: nothing},
        ):
            assert conversation(record, PLAIN) == [ASK, TELL], name
    for name in flag_rows.LISTS:
        assert conversation({name: nothing, "prompt": "Q", "answer": "A"}, PLAIN) == [ASK, TELL]
    for prompt, answer in flag_rows.PAIRS[1:]:
        record = {"instruction": nothing, "output": nothing, prompt: "Q", answer: "A"}
        assert conversation(record, PLAIN) == [ASK, TELL]
        assert flag_rows.field_of(record, PLAIN) == answer
    turns = [{"role": nothing, "from": "human", "value": "Q"}, {**TELL, "tool_calls": nothing}]
    assert conversation({"messages": turns}, PLAIN) == [ASK, TELL]
    with pytest.raises(RowDefect, match="got"):
        conversation({"messages": nothing, "prompt": nothing, "response": nothing}, PLAIN)


@pytest.mark.parametrize("name", ["system", "system_prompt", "input", "context"])
@pytest.mark.parametrize(
    "value", [np.ones(2), np.zeros((2, 2)), torch.ones(3), 0, 7, True, {"a": 1}], ids=repr
)
def test_what_is_no_text_beside_a_chat_is_rejected_by_its_name(name: str, value: Any) -> None:
    with pytest.raises(RowDefect, match=r"(?s)got .*; wanted text") as caught:
        conversation({"instruction": "Q", "output": "A", name: value}, PLAIN)
    assert caught.value.field == name


def test_objects_that_hold_themselves_are_walked_once() -> None:
    held: dict[str, Any] = {"text": ""}
    held |= {"a": held, "b": held}
    assert conversation({"messages": [ASK, TELL], "tools": held}, PLAIN) == [ASK, TELL]
    held["name"] = "f"
    with pytest.raises(RowDefect, match="tools: got more than text"):
        conversation({"messages": [ASK, TELL], "tools": held}, PLAIN)


def test_an_integer_too_long_to_be_written_is_a_defect() -> None:
    endless = 10**5000
    for record, field in (
        ({"messages": endless}, "messages"),
        ({"messages": [ASK, {"role": endless, "content": "A"}]}, "messages[1].role"),
        ({"prompt": {"a": [endless]}, "response": "A"}, "prompt"),
    ):
        with pytest.raises(RowDefect, match="got an integer too long to be written; want") as found:
            conversation(record, PLAIN)
        assert found.value.field == field
    with pytest.raises(RowDefect, match=r"^id: got an integer too long to be written; wanted"):
        row_id({"id": endless, "messages": [ASK, TELL]})


def test_columns_of_ones_own_go_before_known_ones() -> None:
    record = {"q": "Q", "a": "A", "messages": [TELL]}
    form = Form(prompt="q", answer="a")
    assert conversation(record, form) == [ASK, TELL]
    assert {"q", "a"} <= form.known
    with pytest.raises(RowDefect, match="q: got nothing"):
        conversation({"messages": [ASK, TELL]}, form)
    with pytest.raises(FlagError, match="both or neither"):
        Form(answer="a")


def test_an_answer_that_repeats_its_prompt_asks_it_once() -> None:
    """Sets of preferences keep the prompt, and whole conversations beside it."""
    form = Form(prompt="prompt", answer="chosen")
    for record, wanted in (
        ({"prompt": "Q", "chosen": [ASK, TELL]}, [ASK, TELL]),
        ({"prompt": "Q", "chosen": [TELL]}, [ASK, TELL]),
        ({"prompt": "Q", "system": "S", "chosen": [ASK, TELL]}, [SYSTEM, ASK, TELL]),
        ({"prompt": [SYSTEM, ASK], "chosen": [SYSTEM, ASK, TELL]}, [SYSTEM, ASK, TELL]),
        ({"prompt": "Q", "chosen": [TELL, ASK, TELL]}, [ASK, TELL, ASK, TELL]),
    ):
        assert conversation(record, form) == wanted
    for chosen in ([{**ASK, "content": "another"}, TELL], [ASK]):
        with pytest.raises(RowDefect, match=r"chosen\[0\]: got a turn of role 'user'"):
            conversation({"prompt": "Q", "chosen": chosen}, form)


@pytest.mark.parametrize(
    ("beside", "value"),
    [
        ("tool_calls", [{"function": {"name": "f", "arguments": "{}"}}]),
        ("function_call", {"name": "f"}),
        ("reasoning_content", "First, ..."),
    ],
)
@pytest.mark.parametrize("content", [None, "", "A"])
def test_a_message_of_more_than_text_is_rejected_and_not_cut(
    beside: str, value: Any, content: Any
) -> None:
    turns = [ASK, {**TELL, "content": content, beside: value}, ASK, TELL]
    with pytest.raises(RowDefect) as caught:
        conversation({"messages": turns}, PLAIN)
    assert caught.value.field == f"messages[1].{beside}"


@pytest.mark.parametrize("name", ["image", "images", "audio", "video", "tools", "functions"])
@pytest.mark.parametrize(
    "value",
    ["x.jpg", ["b64"], {"bytes": b"x", "path": None}, 7, np.zeros((2, 2)), '[{"name": "f"}]'],
    ids=lambda value: type(value).__name__,
)
def test_a_row_of_more_than_text_is_rejected_and_not_cut(name: str, value: Any) -> None:
    rows = [
        {"messages": [ASK, TELL], name: value},
        {"conversations": [{"from": "human", "value": "<image>Q"}, TELL], name: value},
        {"prompt": "Q", "response": "A", name: value},
    ]
    for row in rows:
        with pytest.raises(RowDefect, match="got more than text; wanted") as caught:
            conversation(row, PLAIN)
        assert caught.value.field == name
        assert name in PLAIN.known
    if name not in ("tools", "functions"):
        with pytest.raises(RowDefect) as caught:
            conversation({"messages": [{**ASK, name: value}, TELL]}, PLAIN)
        assert caught.value.field == f"messages[0].{name}"
    own = Form(prompt="q", answer=name)
    assert conversation({"q": "Q", name: "A"}, own) == [ASK, TELL]
    with pytest.raises(RowDefect, match="got more than text"):
        conversation({"q": "Q", name: "A", "tools" if name == "image" else "image": value}, own)


@pytest.mark.parametrize(
    "value", [None, "", " ", [], "[]", {}, {"bytes": None}, float("nan"), False, np.zeros(0)]
)
def test_a_field_with_nothing_in_it_is_nothing_beside_the_text(value: Any) -> None:
    beside = dict.fromkeys(flag_rows.BESIDE, value)
    assert conversation({"messages": [ASK, TELL], **beside}, PLAIN) == [ASK, TELL]


def test_what_no_model_reads_and_no_file_should_name_is_rejected(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(flag_rows, "LONGEST_TEXT", 10)
    assert conversation({"prompt": "Q" * 4, "response": "A" * 6}, PLAIN)
    with pytest.raises(RowDefect, match="response: got 11 characters; wanted at most 10"):
        conversation({"prompt": "Q" * 5, "response": "A" * 6}, PLAIN)
    with pytest.raises(RowDefect, match="uuid: got 1001 characters; wanted at most 1000"):
        row_id({"uuid": "u" * 1001})


def test_the_first_reply_may_be_the_one_that_counts() -> None:
    turns = [SYSTEM, ASK, TELL, ASK, {**TELL, "content": "later"}, ASK]
    assert conversation({"messages": turns}, Form(turn="first")) == [SYSTEM, ASK, TELL]
    with pytest.raises(RowDefect, match="last turn of role 'user'"):
        conversation({"messages": turns}, PLAIN)
    for behind in ({"role": "tool", "content": "1"}, {**TELL, "tool_calls": [1]}, 7, {}):
        logged = [SYSTEM, ASK, TELL, behind, TELL]
        assert conversation({"messages": logged}, Form(turn="first")) == [SYSTEM, ASK, TELL]
        with pytest.raises(RowDefect, match=r"messages\[3\]"):
            conversation({"messages": logged}, PLAIN)
    greeted = [SYSTEM, {**TELL, "content": "Hello!"}, *turns[1:]]
    assert conversation({"messages": greeted}, Form(turn="first")) == greeted[:4]
    with pytest.raises(RowDefect, match="got no user's turn"):
        conversation({"messages": greeted[:2]}, Form(turn="first"))


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
