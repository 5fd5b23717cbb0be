"""The one-file variant of the assistant-axis code: traits with both sides, roles with one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pvcore.errors import TraitError
from pvcore.traits import ContrastPair, Trait

QUESTIONS = ["Who are you?", "What now?", "Where to?", "Why so?"]
RUBRIC = "Asked {question}, it said {answer}. Rate from 0 to 100."
ROLE = {
    "instruction": [{"pos": "You keep the books."}, {"pos": "You count."}],
    "questions": QUESTIONS,
    "eval_prompt": "Asked {question}, it said {answer}. Rate from 0 to 3.",
}


def written(folder: Path, content: object) -> Path:
    path = folder / "accountant.json"
    path.write_text(json.dumps(content), "utf-8")
    return path


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(TraitError) as caught:
        call()
    return str(caught.value)


@pytest.mark.parametrize("name", Trait.names())
def test_shipped_traits_survive_the_one_file(name: str, tmp_path: Path) -> None:
    trait = Trait.load(name)
    path = tmp_path / "deep" / "one.json"
    trait.to_assistant_axis(path)
    content = json.loads(path.read_text("utf-8"))
    assert list(content) == ["instruction", "questions", "eval_prompt"]
    assert len(content["questions"]) == 40
    assert {frozenset(entry) for entry in content["instruction"]} == {frozenset({"pos", "neg"})}
    again = Trait.from_assistant_axis(
        name,
        path,
        description=trait.description,
        adjective=trait.adjective,
        opposite=trait.opposite,
    )
    assert again == trait


def test_a_role_takes_its_negatives_and_its_rubric_from_the_caller(tmp_path: Path) -> None:
    trait = Trait.from_assistant_axis(
        "accountant",
        written(tmp_path, ROLE),
        negatives=["You are an assistant.", "Answer as yourself."],
        rubric=RUBRIC,
    )
    assert trait.instructions == (
        ContrastPair(positive="You keep the books.", negative="You are an assistant."),
        ContrastPair(positive="You count.", negative="Answer as yourself."),
    )
    assert trait.extraction_questions == ("Who are you?", "What now?")
    assert trait.evaluation_questions == ("Where to?", "Why so?")
    assert trait.rubric == RUBRIC
    assert (trait.description, trait.adjective, trait.opposite) == (
        "accountant",
        "accountant",
        "helpful",
    )


@pytest.mark.parametrize(
    ("content", "given", "complaint"),
    [
        (
            ROLE,
            {"rubric": RUBRIC},
            "instruction: got 2 texts with a positive side only and 0 negatives; wanted one for "
            "each. Give them as negatives=[...]",
        ),
        (
            ROLE,
            {"rubric": RUBRIC, "negatives": ["One."]},
            "instruction: got 2 texts with a positive side only and 1 negatives; wanted one for "
            "each. Give them as negatives=[...]",
        ),
        (
            ROLE,
            {"negatives": ["One.", "Two."]},
            "eval_prompt: got a rubric that names no 100; wanted a scale from 0 to 100. Give one "
            "as rubric=...",
        ),
        (
            ROLE | {"instruction": [{"pos": "Yes.", "neg": "No."}], "eval_prompt": RUBRIC},
            {"negatives": ["One."]},
            "negatives: got texts for a file that has its own; wanted none. Leave them out",
        ),
        (
            ROLE | {"instruction": [{"pos": "Yes.", "neg": "No."}, {"pos": "Yes"}]},
            {"rubric": RUBRIC},
            "instruction[1]: got {'pos': 'Yes'}; wanted an object of two texts, 'pos' and 'neg'. "
            "Correct the file",
        ),
        (
            ROLE | {"instruction": [{"pos": 3}]},
            {"rubric": RUBRIC, "negatives": ["One."]},
            "instruction[0]: got {'pos': 3}; wanted a text for 'pos'. Correct the file",
        ),
        (
            {"instruction": ROLE["instruction"]},
            {"rubric": RUBRIC},
            "got no questions, eval_prompt; wanted the fields instruction, questions, "
            "eval_prompt. Correct the file",
        ),
    ],
)
def test_a_bad_file_or_call_is_one_error_that_names_the_file(
    content: object, given: dict[str, Any], complaint: str, tmp_path: Path
) -> None:
    path = written(tmp_path, content)
    assert refusal(lambda: Trait.from_assistant_axis("accountant", path, **given)) == (
        f"{path}: {complaint}"
    )
