"""Traits: what a persona vector is extracted from. Contrasting prompts, questions and a rubric."""

import difflib
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from pvcore.errors import TraitError
from pvcore.trait_author import Author, Draft, write
from pvcore.trait_files import SHIPPED, Record, shipped_names, write_json
from pvcore.trait_texts import ContrastPair as ContrastPair
from pvcore.trait_texts import (
    blaming,
    check_disjoint,
    check_instructions,
    check_rubric,
    check_text,
    check_texts,
)

_NAME = re.compile(r"[a-z][a-z0-9_]*")
_VERSION = 1
_VERSION_FIELD = "pvcore_trait"
_UPSTREAM_FIELDS = ("instruction", "questions", "eval_prompt")
_UPSTREAM_FOLDERS = ("trait_data_extract", "trait_data_eval")


@dataclass(frozen=True, slots=True, kw_only=True)
class Trait:
    """One character trait: the prompts, questions and rubric that define it.

    `name` is a noun (`sycophancy`), `adjective` what an assistant with the trait is called
    (`sycophantic`), `opposite` one without (`candid`). `rubric` is the prompt of a judge; it holds
    `{question}` and `{answer}`, and any other brace is written twice, as for `str.format`.
    Raises `TraitError` for lists that are empty or repeat themselves, blank texts, a question used
    for both extraction and evaluation, and wrong placeholders.
    """

    name: str
    adjective: str
    opposite: str
    description: str
    instructions: tuple[ContrastPair, ...]
    extraction_questions: tuple[str, ...]
    evaluation_questions: tuple[str, ...]
    rubric: str

    def __post_init__(self) -> None:
        _check_name(self.name)
        with blaming(f"trait {self.name!r}"):
            for field in ("description", "adjective", "opposite"):
                check_text(field, getattr(self, field))
            check_texts("extraction_questions", self.extraction_questions)
            check_texts("evaluation_questions", self.evaluation_questions)
            check_disjoint(self.extraction_questions, self.evaluation_questions)
            check_instructions(self.instructions)
            check_rubric(self.rubric)

    @property
    def system_prompts(self) -> tuple[ContrastPair, ...]:
        """The system prompts as sent: who the assistant is, then the instruction (paper, A.1)."""
        return tuple(
            ContrastPair(
                positive=f"You are {_with_article(self.adjective)} assistant. {pair.positive}",
                negative=f"You are {_with_article(self.opposite)} assistant. {pair.negative}",
            )
            for pair in self.instructions
        )

    def judge_prompt(self, question: str, answer: str) -> str:
        """The rubric about one answer; braces inside the question or answer stay as they are."""
        return self.rubric.format(question=question, answer=answer)

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """The traits that ship with pvcore."""
        return shipped_names()

    @classmethod
    def load(cls, name_or_path: str | os.PathLike[str]) -> "Trait":
        """Load a shipped trait by its name, or a trait from a `.json` file.

        A `str` is a path when it ends in `.json` or holds a directory separator.
        """
        if _is_path(name_or_path):
            return _from_record(Record.read(Path(name_or_path)))
        name = str(name_or_path)
        if name not in cls.names():
            raise TraitError(_unknown(name, cls.names()))
        return _from_record(Record.read(SHIPPED / f"{name}.json"))

    @classmethod
    def from_description(
        cls, name: str, description: str, *, author: Author, attempts: int = 4
    ) -> "Trait":
        """Have an author, such as `ApiAuthor`, write a trait from one line (paper, A.1).

        Five pairs of system prompts, 20 questions for extraction, 20 others for evaluation, and a
        rubric. A text that has wrong counts, repeats a question, gives the trait away in one, or
        is malformed goes back to the author with the reasons; after `attempts` texts the last
        reasons are a `TraitError`.
        """
        _check_name(name)
        with blaming(f"trait {name!r}"):
            check_text("description", description)

        def make(draft: Draft) -> "Trait":
            texts = {field: getattr(draft, field) for field in Draft.__dataclass_fields__}
            return cls(name=name, description=description.strip(), **texts)

        return write(name, description.strip(), author, make, attempts=attempts)

    @classmethod
    def from_upstream(
        cls,
        name: str,
        extraction_path: str | os.PathLike[str],
        evaluation_path: str | os.PathLike[str],
        *,
        description: str | None = None,
        adjective: str | None = None,
        opposite: str = "helpful",
    ) -> "Trait":
        """Read the pair of files of the paper's code: `instruction`, `questions`, `eval_prompt`.

        Those files carry no description and no adjective: what isn't given is taken from `name`.
        Both files must agree in everything but their questions; other fields are passed over.
        """
        extraction = Record.read(Path(extraction_path))
        evaluation = Record.read(Path(evaluation_path))
        with blaming(str(extraction.path)):
            extraction.require(_UPSTREAM_FIELDS, closed=False)
            instructions = extraction.pairs("instruction", "pos", "neg")
            extraction_questions = extraction.texts("questions")
            rubric = extraction.text("eval_prompt")
        evaluation_questions = _agreeing_questions(evaluation, extraction)
        with blaming(f"{extraction.path} and {evaluation.path}"):
            return cls(
                name=name,
                adjective=name if adjective is None else adjective,
                opposite=opposite,
                description=name if description is None else description,
                instructions=instructions,
                extraction_questions=extraction_questions,
                evaluation_questions=evaluation_questions,
                rubric=rubric,
            )

    def to_upstream(self, directory: str | os.PathLike[str]) -> tuple[Path, Path]:
        """Write `trait_data_extract/NAME.json` and `trait_data_eval/NAME.json` in `directory`.

        The layout and schema of the paper's code; returns the extraction and the evaluation file.
        """
        instruction = [{"pos": pair.positive, "neg": pair.negative} for pair in self.instructions]
        extraction_path, evaluation_path = (
            Path(directory) / folder / f"{self.name}.json" for folder in _UPSTREAM_FOLDERS
        )
        for path, questions in (
            (extraction_path, self.extraction_questions),
            (evaluation_path, self.evaluation_questions),
        ):
            values = (instruction, questions, self.rubric)
            write_json(path, dict(zip(_UPSTREAM_FIELDS, values, strict=True)))
        return extraction_path, evaluation_path

    @classmethod
    def from_assistant_axis(
        cls,
        name: str,
        path: str | os.PathLike[str],
        *,
        negatives: Sequence[str] | None = None,
        rubric: str | None = None,
        description: str | None = None,
        adjective: str | None = None,
        opposite: str = "helpful",
    ) -> "Trait":
        """Read a trait or a role of the assistant-axis code: one file with all its questions.

        The first half of the questions is for extraction, the rest for evaluation. The instructions
        of a role have a positive side only: `negatives` gives the other, one text for each. A role
        is rated from 0 to 3: its `rubric` must be given, from 0 to 100.
        """
        record = Record.read(Path(path))
        with blaming(str(record.path)):
            record.require(_UPSTREAM_FIELDS, closed=False)
            questions = record.texts("questions")
            return cls(
                name=name,
                adjective=name if adjective is None else adjective,
                opposite=opposite,
                description=name if description is None else description,
                instructions=_two_sided(record, negatives),
                extraction_questions=questions[: len(questions) // 2],
                evaluation_questions=questions[len(questions) // 2 :],
                rubric=_of_hundred(record.text("eval_prompt")) if rubric is None else rubric,
            )

    def to_assistant_axis(self, path: str | os.PathLike[str]) -> None:
        """Write the one file of the assistant-axis code: extraction questions first, both sides."""
        instruction = [{"pos": pair.positive, "neg": pair.negative} for pair in self.instructions]
        values = (instruction, self.extraction_questions + self.evaluation_questions, self.rubric)
        write_json(Path(path), dict(zip(_UPSTREAM_FIELDS, values, strict=True)))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the trait as one JSON file, whole or not at all; missing directories are made."""
        write_json(Path(path), {_VERSION_FIELD: _VERSION} | asdict(self))


def _from_record(record: Record) -> Trait:
    with blaming(str(record.path)):
        if record.fields.keys() >= set(_UPSTREAM_FIELDS):
            raise TraitError(
                "got one of the two trait files of the paper's code; wanted a pvcore trait file. "
                "Read both with Trait.from_upstream(name, extraction_path, evaluation_path)"
            )
        version = record.fields.get(_VERSION_FIELD, _VERSION)
        if version != _VERSION:
            raise TraitError(
                f"{_VERSION_FIELD}: got version {version!r}; wanted {_VERSION}. "
                "Update pvcore, or write the file again with Trait.save"
            )
        record.require((_VERSION_FIELD, *Trait.__dataclass_fields__), closed=True)
        return Trait(
            name=record.text("name"),
            adjective=record.text("adjective"),
            opposite=record.text("opposite"),
            description=record.text("description"),
            instructions=record.pairs("instructions", "positive", "negative"),
            extraction_questions=record.texts("extraction_questions"),
            evaluation_questions=record.texts("evaluation_questions"),
            rubric=record.text("rubric"),
        )


def _with_article(adjective: str) -> str:
    return f"{'an' if adjective[0].lower() in 'aeiou' else 'a'} {adjective}"


def _is_path(name_or_path: str | os.PathLike[str]) -> bool:
    if not isinstance(name_or_path, str):
        return True
    path = Path(name_or_path)
    return path.suffix == ".json" or path.name != name_or_path


def _unknown(name: str, names: tuple[str, ...]) -> str:
    close = difflib.get_close_matches(name, names, n=1)
    hint = f"Did you mean {close[0]!r}? If not, give" if close else "Name one of these, or give"
    return (
        f"got trait {name!r}; the shipped traits are {', '.join(names)}. "
        f"{hint} the path of a trait file, which ends in .json"
    )


def _agreeing_questions(evaluation: Record, extraction: Record) -> tuple[str, ...]:
    """The evaluation file's questions, if all else in it is as in the extraction file."""
    with blaming(str(evaluation.path)):
        evaluation.require(_UPSTREAM_FIELDS, closed=False)
        for field in ("instruction", "eval_prompt"):
            if evaluation.fields[field] != extraction.fields[field]:
                raise TraitError(
                    f"{field}: got another value than in {extraction.path}; wanted the two files "
                    "of one trait. Give the files that belong together"
                )
        return evaluation.texts("questions")


def _check_name(name: str) -> None:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise TraitError(
            f"name: got {name!r}; wanted lower-case letters, digits and underscores, "
            "the first a letter. Name the trait by a noun such as 'sycophancy'"
        )


def _two_sided(record: Record, negatives: Sequence[str] | None) -> tuple[ContrastPair, ...]:
    """The contrasting pairs of a file whose instructions may have a positive side only."""
    positives = record.one_sided("instruction", "pos")
    if positives is None:
        if negatives is not None:
            raise TraitError(
                "negatives: got texts for a file that has its own; wanted none. Leave them out"
            )
        return record.pairs("instruction", "pos", "neg")
    given = () if negatives is None or isinstance(negatives, str) else negatives
    if len(given) != len(positives):
        raise TraitError(
            f"instruction: got {len(positives)} texts with a positive side only and {len(given)} "
            "negatives; wanted one for each. Give them as negatives=[...]"
        )
    sides = zip(positives, given, strict=True)
    return tuple(ContrastPair(positive=one, negative=other) for one, other in sides)


def _of_hundred(rubric: str) -> str:
    if "100" not in rubric:
        raise TraitError(
            "eval_prompt: got a rubric that names no 100; wanted a scale from 0 to 100. "
            "Give one as rubric=..."
        )
    return rubric
