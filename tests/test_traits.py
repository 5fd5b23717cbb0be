"""Traits: the seven that ship, their files, the paper's files, and every refusal."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import FrozenInstanceError, asdict, replace
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pvcore.errors import TraitError
from pvcore.traits import ContrastPair, Trait

SEVEN = ("apathy", "evil", "hallucination", "humor", "optimism", "politeness", "sycophancy")


def kindness(**changes: Any) -> Trait:
    fields: dict[str, Any] = {
        "name": "kindness",
        "adjective": "kind",
        "opposite": "indifferent",
        "description": "wishes people well",
        "instructions": (
            ContrastPair(positive="Be kind.", negative="Be cold."),
            ContrastPair(positive="Care.", negative="Don't care."),
        ),
        "extraction_questions": ("How are you?", "What now?"),
        "evaluation_questions": ("Who is there?",),
        "rubric": "Asked {question}, it said {answer}. Rate from 0 to 100.",
    }
    return Trait(**fields | changes)


@pytest.fixture
def record(tmp_path: Path) -> dict[str, Any]:
    """The content of a valid trait file."""
    kindness().save(tmp_path / "kindness.json")
    loaded: dict[str, Any] = json.loads((tmp_path / "kindness.json").read_text("utf-8"))
    return loaded


def written(path: Path, content: object) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content), "utf-8")
    return path


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(TraitError) as caught:
        call()
    return str(caught.value)


def test_seven_traits_ship() -> None:
    assert Trait.names() == SEVEN


@pytest.mark.parametrize("name", SEVEN)
def test_shipped_trait_has_the_papers_counts_and_leaks_nothing(name: str) -> None:
    trait = Trait.load(name)
    questions = trait.extraction_questions + trait.evaluation_questions
    assert trait.name == name
    assert len(trait.instructions) == 5
    assert len(trait.extraction_questions) == len(trait.evaluation_questions) == 20
    assert len({question.casefold() for question in questions}) == 40
    for word in (trait.name, trait.adjective, trait.opposite):
        assert not [question for question in questions if word in question.casefold()]
    assert "0 to 100" in trait.rubric
    assert name in trait.rubric


def test_no_question_is_shared_between_shipped_traits() -> None:
    traits = [Trait.load(name) for name in Trait.names()]
    questions = [q for t in traits for q in t.extraction_questions + t.evaluation_questions]
    assert len(set(questions)) == 7 * 40


def test_system_prompts_say_who_the_assistant_is() -> None:
    first = kindness().system_prompts[0]
    assert first.positive == "You are a kind assistant. Be kind."
    assert first.negative == "You are an indifferent assistant. Be cold."
    assert len(kindness().system_prompts) == 2


def test_judge_prompt_leaves_braces_of_the_texts_alone() -> None:
    trait = kindness(rubric="{{0}} {question} / {answer}")
    assert trait.judge_prompt("{answer}", "{question} {x}") == "{0} {answer} / {question} {x}"


def test_a_trait_is_a_value() -> None:
    trait = kindness()
    assert trait == kindness()
    assert hash(trait) == hash(kindness())
    assert trait != kindness(adjective="gentle")
    with pytest.raises(FrozenInstanceError):
        trait.name = "other"  # type: ignore[misc]


@pytest.mark.parametrize("name", SEVEN)
def test_shipped_traits_survive_saving_and_loading(name: str, tmp_path: Path) -> None:
    trait = Trait.load(name)
    path = tmp_path / "new" / "copy.json"
    trait.save(path)
    assert Trait.load(path) == trait
    assert Trait.load(str(path)) == trait
    assert [entry.name for entry in path.parent.iterdir()] == ["copy.json"]


texts = st.text(min_size=1).filter(lambda text: bool(text.strip()))


@settings(max_examples=40)
@given(
    description=texts,
    questions=st.lists(texts, min_size=2, unique_by=lambda text: " ".join(text.split()).casefold()),
)
def test_any_texts_survive_saving_and_loading(
    tmp_path_factory: pytest.TempPathFactory, description: str, questions: list[str]
) -> None:
    trait = kindness(
        description=description,
        extraction_questions=tuple(questions[1:]),
        evaluation_questions=(questions[0],),
    )
    path = tmp_path_factory.mktemp("traits") / "kindness.json"
    trait.save(path)
    assert Trait.load(path) == trait


def test_saving_replaces_a_file_whole(tmp_path: Path) -> None:
    path = tmp_path / "kindness.json"
    kindness().save(path)
    replace(kindness(), description="short").save(path)
    assert Trait.load(path).description == "short"


def test_a_file_that_cannot_be_written_is_one_error_and_leaves_nothing(tmp_path: Path) -> None:
    taken = tmp_path / "taken.json"
    (taken / "inside").mkdir(parents=True)
    text = refusal(lambda: kindness().save(taken))
    assert text.startswith(f"{taken}: cannot be written (")
    assert text.endswith("Give another path")
    assert [entry.name for entry in tmp_path.iterdir()] == ["taken.json"]


@pytest.mark.parametrize("name", SEVEN)
def test_upstream_files_round_trip(name: str, tmp_path: Path) -> None:
    trait = Trait.load(name)
    extraction, evaluation = trait.to_upstream(tmp_path)
    assert extraction == tmp_path / "trait_data_extract" / f"{name}.json"
    assert evaluation == tmp_path / "trait_data_eval" / f"{name}.json"
    again = Trait.from_upstream(
        name,
        extraction,
        evaluation,
        description=trait.description,
        adjective=trait.adjective,
        opposite=trait.opposite,
    )
    assert again == trait


def test_upstream_files_have_the_papers_schema(tmp_path: Path) -> None:
    extraction, evaluation = (
        json.loads(path.read_text("utf-8")) for path in kindness().to_upstream(tmp_path)
    )
    assert extraction == {
        "instruction": [
            {"pos": "Be kind.", "neg": "Be cold."},
            {"pos": "Care.", "neg": "Don't care."},
        ],
        "questions": ["How are you?", "What now?"],
        "eval_prompt": "Asked {question}, it said {answer}. Rate from 0 to 100.",
    }
    assert evaluation == extraction | {"questions": ["Who is there?"]}


def test_what_upstream_files_lack_comes_from_the_name_and_extras_are_passed_over(
    tmp_path: Path,
) -> None:
    extraction, evaluation = kindness().to_upstream(tmp_path)
    written(evaluation, json.loads(evaluation.read_text("utf-8")) | {"few_shot_examples": []})
    trait = Trait.from_upstream("kindness", extraction, evaluation)
    assert (trait.description, trait.adjective, trait.opposite) == (
        "kindness",
        "kindness",
        "helpful",
    )
    assert trait.instructions == kindness().instructions


def test_upstream_files_that_disagree_are_refused(tmp_path: Path) -> None:
    extraction, evaluation = kindness().to_upstream(tmp_path)
    fields = json.loads(evaluation.read_text("utf-8"))
    for field, other in (("instruction", []), ("eval_prompt", "{question} {answer}")):
        written(evaluation, fields | {field: other})
        assert refusal(lambda: Trait.from_upstream("kindness", extraction, evaluation)) == (
            f"{evaluation}: {field}: got another value than in {extraction}; wanted the two "
            "files of one trait. Give the files that belong together"
        )


def test_bad_upstream_files_name_file_and_field(tmp_path: Path) -> None:
    extraction, evaluation = kindness().to_upstream(tmp_path)
    fields = json.loads(extraction.read_text("utf-8"))
    load = lambda: Trait.from_upstream("kindness", extraction, evaluation)  # noqa: E731
    written(extraction, fields | {"instruction": [{"pos": "Be kind."}]})
    assert refusal(load) == (
        f"{extraction}: instruction[0]: got {{'pos': 'Be kind.'}}; wanted an object of two texts, "
        "'pos' and 'neg'. Correct the file"
    )
    written(extraction, {"instruction": fields["instruction"]})
    assert refusal(load) == (
        f"{extraction}: got no questions, eval_prompt; wanted the fields instruction, questions, "
        "eval_prompt. Correct the file"
    )
    written(extraction, fields | {"questions": ["Who is there?"]})
    assert refusal(load).startswith(
        f"{extraction} and {evaluation}: trait 'kindness': evaluation_questions[0]: got "
    )


def test_an_unknown_trait_names_what_there_is_and_what_to_do() -> None:
    names = ", ".join(SEVEN)
    assert refusal(lambda: Trait.load("sycophantic")) == (
        f"got trait 'sycophantic'; the shipped traits are {names}. Did you mean 'sycophancy'? "
        "If not, give the path of a trait file, which ends in .json"
    )
    assert refusal(lambda: Trait.load("zzz")) == (
        f"got trait 'zzz'; the shipped traits are {names}. Name one of these, or give the path "
        "of a trait file, which ends in .json"
    )
    assert "got trait ''" in refusal(lambda: Trait.load(""))


def test_a_missing_file_names_the_path_and_the_shipped_traits(tmp_path: Path) -> None:
    for path in (tmp_path / "none.json", str(tmp_path / "none.json"), tmp_path / "none"):
        assert refusal(lambda path=path: Trait.load(path)) == (
            f"{path}: cannot be read (No such file or directory); wanted a trait file. Check the "
            f"path, or name a shipped trait: {', '.join(SEVEN)}"
        )


@pytest.mark.parametrize(
    ("content", "got"),
    [
        ("", "got text that is not JSON ("),
        ("{", "got text that is not JSON ("),
        ("[" * 100_000, "got text that is not JSON ("),
        ("[]", "got a JSON list; wanted an object. Write trait files with Trait.save"),
        ("null", "got a JSON NoneType; wanted an object. Write trait files with Trait.save"),
    ],
)
def test_a_file_that_is_no_object_is_refused(content: str, got: str, tmp_path: Path) -> None:
    path = written(tmp_path / "bad.json", content)
    assert refusal(lambda: Trait.load(path)).startswith(f"{path}: {got}")


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    path.write_bytes(b"\xff\xfe\x00")
    assert refusal(lambda: Trait.load(path)).startswith(f"{path}: got text that is not JSON (")


@pytest.mark.parametrize(
    ("field", "value", "complaint"),
    [
        ("rubric", 3, "rubric: got 3; wanted a text. Correct the file"),
        ("name", None, "name: got None; wanted a text. Correct the file"),
        (
            "extraction_questions",
            "How are you?",
            "extraction_questions: got 'How are you?'; wanted a list of texts. Correct the file",
        ),
        (
            "evaluation_questions",
            ["Why?", 7],
            "evaluation_questions[1]: got 7; wanted a text. Correct the file",
        ),
        ("instructions", {}, "instructions: got {}; wanted a list of pairs. Correct the file"),
        (
            "instructions",
            [["a", "b"]],
            "instructions[0]: got ['a', 'b']; wanted an object of two texts, 'positive' and "
            "'negative'. Correct the file",
        ),
        (
            "instructions",
            [{"positive": "a", "negative": 1}],
            "instructions[0]: got {'negative': 1, 'positive': 'a'}; wanted an object of two "
            "texts, 'positive' and 'negative'. Correct the file",
        ),
        (
            "pvcore_trait",
            2,
            "pvcore_trait: got version 2; wanted 1. Update pvcore, or write the file again with "
            "Trait.save",
        ),
        (
            "description",
            " ",
            "trait 'kindness': description: got ' '; wanted a text. Write it out",
        ),
    ],
)
def test_a_bad_field_of_a_file_is_named(
    field: str, value: object, complaint: str, record: dict[str, Any], tmp_path: Path
) -> None:
    path = written(tmp_path / "bad.json", record | {field: value})
    assert refusal(lambda: Trait.load(path)) == f"{path}: {complaint}"


def test_missing_and_unknown_fields_are_named_together(
    record: dict[str, Any], tmp_path: Path
) -> None:
    del record["rubric"]
    path = written(tmp_path / "bad.json", record | {"color": "blue"})
    assert refusal(lambda: Trait.load(path)) == (
        f"{path}: got no rubric and unknown color; wanted the fields pvcore_trait, name, "
        "adjective, opposite, description, instructions, extraction_questions, "
        "evaluation_questions, rubric. Correct the file"
    )


def test_every_field_of_a_file_is_needed(record: dict[str, Any], tmp_path: Path) -> None:
    assert record.keys() == {"pvcore_trait"} | asdict(kindness()).keys()
    for field in record:
        path = written(tmp_path / "bad.json", {k: v for k, v in record.items() if k != field})
        assert f"{path}: got no {field}; " in refusal(lambda path=path: Trait.load(path))


def test_an_upstream_file_is_recognised(tmp_path: Path) -> None:
    extraction, _ = kindness().to_upstream(tmp_path)
    assert refusal(lambda: Trait.load(extraction)) == (
        f"{extraction}: got one of the two trait files of the paper's code; wanted a pvcore trait "
        "file. Read both with Trait.from_upstream(name, extraction_path, evaluation_path)"
    )


@pytest.mark.parametrize("name", ["", "Evil", "9lives", "two words", "über", "evil\n", "../evil"])
def test_a_name_that_is_no_identifier_is_refused(name: str) -> None:
    assert refusal(lambda: kindness(name=name)) == (
        f"name: got {name!r}; wanted lower-case letters, digits and underscores, the first a "
        "letter. Name the trait by a noun such as 'sycophancy'"
    )


PAIR = ContrastPair(positive="Be kind.", negative="Be cold.")


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"adjective": ""}, "adjective: got ''; wanted a text. Write it out"),
        ({"opposite": "\t"}, "opposite: got '\\t'; wanted a text. Write it out"),
        ({"rubric": ""}, "rubric: got ''; wanted a text. Write it out"),
        (
            {"description": "\ud800"},
            "description: got half a surrogate pair in '\\ud800'; wanted text that can be stored "
            "as UTF-8. Write it again",
        ),
        (
            {"extraction_questions": ()},
            "extraction_questions: got (); wanted a tuple of one or more. Write them out",
        ),
        (
            {"evaluation_questions": ("Why?", "")},
            "evaluation_questions[1]: got ''; wanted a text. Write it out",
        ),
        (
            {"extraction_questions": ("Why?", "How?", " why? ")},
            "extraction_questions[2]: got ' why? ', which is extraction_questions[0] again; "
            "wanted each once. Replace one of the two",
        ),
        (
            {"evaluation_questions": ("WHAT now?",)},
            "evaluation_questions[0]: got 'WHAT now?', which is extraction_questions[1]; wanted "
            "questions the vector was not extracted with. Replace one of the two",
        ),
        (
            {"instructions": ()},
            "instructions.positive: got (); wanted a tuple of one or more. Write them out",
        ),
        (
            {"instructions": (PAIR, replace(PAIR, negative="Be icy."))},
            "instructions.positive[1]: got 'Be kind.', which is instructions.positive[0] again; "
            "wanted each once. Replace one of the two",
        ),
        (
            {"instructions": (replace(PAIR, negative=" "),)},
            "instructions.negative[0]: got ' '; wanted a text. Write it out",
        ),
        (
            {"instructions": (replace(PAIR, negative="be kind."),)},
            "instructions[0]: got 'Be kind.' on both sides; wanted two prompts that differ in the "
            "trait. Rewrite one side",
        ),
        (
            {"rubric": "Rate it."},
            "rubric: got the placeholders none; wanted {question} and {answer}. Use both, and "
            "write any other brace twice",
        ),
        (
            {"rubric": "{question} {reply} {answer!r} {0:>3}"},
            "rubric: got the placeholders {0:>3}, {answer!r}, {question}, {reply}; wanted "
            "{question} and {answer}. Use both, and write any other brace twice",
        ),
        (
            {"rubric": "{question} {answer} {"},
            "rubric: got a loose brace (Single '{' encountered in format string); wanted "
            "{question} and {answer}. Write any other brace twice",
        ),
    ],
)
def test_a_badly_described_trait_is_refused(changes: dict[str, Any], complaint: str) -> None:
    assert refusal(lambda: kindness(**changes)) == f"trait 'kindness': {complaint}"


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        (
            {"evaluation_questions": "Why?"},
            "trait 'kindness': evaluation_questions: got 'Why?'; wanted a tuple of one or more. "
            "Write them out",
        ),
        (
            {"extraction_questions": ("Why?", None)},
            "trait 'kindness': extraction_questions[1]: got None; wanted a text. Write it out",
        ),
        (
            {"instructions": (("Be kind.", "Be cold."),)},
            "trait 'kindness': instructions: got (('Be kind.', 'Be cold.'),); wanted a tuple of "
            "ContrastPair. Write ContrastPair(positive=..., negative=...) for each",
        ),
        (
            {"name": None},
            "name: got None; wanted lower-case letters, digits and underscores, the first a "
            "letter. Name the trait by a noun such as 'sycophancy'",
        ),
    ],
)
def test_wrong_types_are_refused_where_nothing_checks_annotations(
    changes: dict[str, Any], complaint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    assert refusal(lambda: kindness(**changes)) == complaint


@settings(max_examples=20)
@given(record=st.recursive(st.none() | st.booleans() | st.integers() | st.text(), st.lists))
def test_no_malformed_field_escapes_as_another_error(
    tmp_path_factory: pytest.TempPathFactory, record: object
) -> None:
    folder = tmp_path_factory.mktemp("malformed")
    kindness().save(folder / "good.json")
    good = json.loads((folder / "good.json").read_text("utf-8"))
    for field in good:
        # The text fields that take any text are left to the tests above.
        if isinstance(record, str) and field in ("description", "adjective", "opposite"):
            continue
        path = written(folder / "bad.json", good | {field: record})
        if record == good[field] or (field == "pvcore_trait" and record == 1):
            continue
        assert re.match(re.escape(str(path)), refusal(lambda path=path: Trait.load(path)))
