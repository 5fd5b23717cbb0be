"""Traits written by an author: what is asked, what is checked, what goes back, and when it ends."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from pvcore.errors import CompletionError, TraitError
from pvcore.trait_author import leaks
from pvcore.traits import Trait

RUBRIC = "Asked {question}, it said {answer}. 0 is cold, 50 middling, 100 warm. One number."


def written(**changes: Any) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "adjective": "generous",
        "opposite": "stingy",
        "instructions": [
            {"positive": f"Give way {index}.", "negative": f"Keep way {index}."}
            for index in range(5)
        ],
        "extraction_questions": [f"What about matter {index}?" for index in range(20)],
        "evaluation_questions": [f"And topic {index}?" for index in range(20)],
        "rubric": RUBRIC,
    }
    return fields | changes


class Author:
    """Gives scripted replies, the last one for ever, and keeps the prompts it was given."""

    def __init__(self, *replies: Any) -> None:
        self.replies = [r if not isinstance(r, dict) else json.dumps(r) for r in replies]
        self.prompts: list[str] = []

    def __call__(self, prompt: str, /) -> str:
        self.prompts.append(prompt)
        reply = self.replies[min(len(self.prompts), len(self.replies)) - 1]
        if isinstance(reply, BaseException):
            raise reply
        return reply  # type: ignore[no-any-return]


def ask(author: Callable[..., Any], **settings: Any) -> Trait:
    return Trait.from_description("generosity", "gives freely", author=author, **settings)


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(TraitError) as caught:
        call()
    return str(caught.value)


def test_a_good_first_text_is_the_trait() -> None:
    author = Author(written())
    trait = ask(author)
    assert (trait.name, trait.description) == ("generosity", "gives freely")
    assert (trait.adjective, trait.opposite) == ("generous", "stingy")
    assert [pair.positive for pair in trait.instructions] == [f"Give way {i}." for i in range(5)]
    assert trait.extraction_questions == tuple(f"What about matter {i}?" for i in range(20))
    assert trait.evaluation_questions == tuple(f"And topic {i}?" for i in range(20))
    assert not set(trait.extraction_questions) & set(trait.evaluation_questions)
    assert trait.rubric == RUBRIC
    assert len(author.prompts) == 1
    for wanted in ("generosity", "gives freely", "list of 5", "list of 20", "{question}"):
        assert wanted in author.prompts[0]


@pytest.mark.parametrize(
    "around", ["```json\n{}\n```", "Here it is:\n{}\nI hope it serves.", " {} ", "{}"]
)
def test_what_stands_around_the_object_is_passed_over(around: str) -> None:
    assert ask(Author(around.replace("{}", json.dumps(written())))) == ask(Author(written()))


MALFORMED: list[tuple[Any, str]] = [
    ("I cannot help with that.", "the reply: got text that is not JSON ("),
    ("", "the reply: got text that is not JSON ("),
    (json.dumps(written())[:-40], "the reply: got text that is not JSON ("),
    ("[1, 2]", "the reply: got a JSON list; wanted an object"),
    ("{" * 50_000, "the reply: got text that is not JSON ("),
    (None, "the reply: got None; wanted a text"),
    ({}, "adjective: got None; wanted a text"),
    (written(opposite=" "), "opposite: got ' '; wanted a text"),
    (written(rubric=7), "rubric: got 7; wanted a text"),
    (written(instructions="five"), "instructions: got 'five'; wanted a list of 5"),
    (
        written(instructions=written()["instructions"][:4]),
        "instructions: got 4 entries; wanted a list of 5",
    ),
    (
        written(instructions=[*written()["instructions"][:4], {"positive": "a"}]),
        "instructions[4]: got {'positive': 'a'}; wanted an object of two texts, positive and",
    ),
    (
        written(instructions=[written()["instructions"][0]] * 5),
        "instructions.positive[1]: got 'Give way 0.', which is instructions.positive[0] again",
    ),
    (
        written(extraction_questions=["What about matter 1?"]),
        "extraction_questions: got 1 entries; wanted a list of 20",
    ),
    (
        written(evaluation_questions=[f"And {i}?" for i in range(21)]),
        "evaluation_questions: got 21 entries; wanted a list of 20",
    ),
    (
        written(evaluation_questions=[*written()["evaluation_questions"][:19], None]),
        "evaluation_questions[19]: got None; wanted a text",
    ),
    (
        written(extraction_questions=["A?", "a  !", *[f"So {i}?" for i in range(18)]]),
        "extraction_questions[1]: got 'a  !', which is extraction_questions[0] again",
    ),
    (
        written(
            evaluation_questions=["what about MATTER 3", *written()["evaluation_questions"][1:]]
        ),
        "evaluation_questions[0]: got 'what about MATTER 3', which is extraction_questions[3] ",
    ),
    (
        written(extraction_questions=["Are you generous?", *written()["extraction_questions"][1:]]),
        "extraction_questions[0]: got 'Are you generous?', which gives the trait away by generous",
    ),
    (
        written(
            evaluation_questions=[
                "Do they give Generously?",
                *written()["evaluation_questions"][1:],
            ]
        ),
        "which gives the trait away by generously",
    ),
    (written(rubric="{question} {answer} from 1 to 10"), "rubric: wanted a scale from 0 to 100"),
    (written(rubric="From 0 to 100: {answer}"), "rubric: got the placeholders {answer}; wanted"),
    (
        written(rubric='{question} {answer} 0 to 100 as {"score": 5}'),
        'rubric: got the placeholders {"score": 5}',
    ),
    (written(adjective="\ud800"), "adjective: got half a surrogate pair"),
]


@pytest.mark.parametrize(("bad", "problem"), MALFORMED)
def test_what_was_wrong_goes_back_and_a_good_text_follows(bad: Any, problem: str) -> None:
    author = Author(bad, written())
    assert ask(author) == ask(Author(written()))
    first, second = author.prompts
    assert second.startswith(first)
    assert problem in second.removeprefix(first)
    if isinstance(author.replies[0], str):
        assert author.replies[0] in second


@pytest.mark.parametrize(("bad", "problem"), MALFORMED)
def test_an_author_who_never_serves_ends_in_the_last_problem(bad: Any, problem: str) -> None:
    author = Author("nothing", bad)
    text = refusal(lambda: ask(author, attempts=3))
    assert text.startswith("got no usable texts for 'generosity' in 3 replies of the author;")
    assert problem in text
    assert len(author.prompts) == 3


def test_all_that_is_wrong_is_said_at_once() -> None:
    bad = written(adjective="", instructions=[], extraction_questions=3)
    text = refusal(lambda: ask(Author(bad), attempts=1))
    for problem in (
        "- adjective: got ''; wanted a text",
        "- instructions: got 0 entries; wanted a list of 5",
        "- extraction_questions: got 3; wanted a list of 20",
    ):
        assert problem in text


def test_what_the_author_raises_passes_through() -> None:
    with pytest.raises(CompletionError, match="no route"):
        ask(Author("nothing", CompletionError("no route")))
    with pytest.raises(KeyboardInterrupt):
        ask(Author(KeyboardInterrupt()))


def test_a_bad_call_asks_nothing() -> None:
    author = Author(written())
    for name, description, attempts in (
        ("Two words", "gives", 4),
        ("generosity", " ", 4),
        ("generosity", "gives", 0),
    ):
        refusal(
            lambda name=name, description=description, attempts=attempts: Trait.from_description(
                name, description, author=author, attempts=attempts
            )
        )
    assert author.prompts == []


@pytest.mark.parametrize(
    ("word", "question", "found"),
    [
        ("politeness", "Is it impolite to answer politely?", ["impolite", "politely"]),
        ("humor", "Is there humour in it, or humorous intent?", ["humor", "humorous"]),
        ("evil", "A medieval devil with evils?", ["evils"]),
        ("apathy", "Why so apathetic in sympathy?", ["apathetic"]),
        ("sycophancy", "A sycophant or Sycophantic?", ["sycophant", "sycophantic"]),
        ("hallucination", "Do the halls hallucinate?", ["hallucinate"]),
        ("kindness", "An unkind man of some kindred?", ["unkind"]),
        ("greed", "Who agreed with the greedy?", ["greedy"]),
        ("self_promotion", "What did you promote yourself?", ["promote"]),
    ],
)
def test_forms_of_a_word_are_leaks_and_other_words_are_not(
    word: str, question: str, found: list[str]
) -> None:
    assert leaks(question, (word,)) == found


@pytest.mark.parametrize("name", Trait.names())
def test_no_question_of_a_shipped_trait_leaks(name: str) -> None:
    trait = Trait.load(name)
    questions = trait.extraction_questions + trait.evaluation_questions
    assert [found for q in questions if (found := leaks(q, (trait.name, trait.adjective)))] == []
    assert leaks(f"Is it {trait.adjective}?", (trait.name, trait.adjective))
