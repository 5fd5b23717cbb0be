"""Traits: what a persona vector is extracted from. Contrasting prompts, questions and a rubric."""

import difflib
import json
import os
import re
import reprlib
import string
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from pvcore.errors import TraitError
from pvcore.files import write_whole

_SHIPPED = Path(__file__).parent / "data" / "traits"
_NAME = re.compile(r"[a-z][a-z0-9_]*")
_PLACEHOLDERS = frozenset({"question", "answer"})
_VERSION = 1
_VERSION_FIELD = "pvcore_trait"
_UPSTREAM_FIELDS = ("instruction", "questions", "eval_prompt")
_UPSTREAM_FOLDERS = ("trait_data_extract", "trait_data_eval")


@dataclass(frozen=True, slots=True, kw_only=True)
class ContrastPair:
    """Two system prompts that differ in the trait: one calls for it, one for its absence."""

    positive: str
    negative: str


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
        if not isinstance(self.name, str) or not _NAME.fullmatch(self.name):
            raise TraitError(
                f"name: got {self.name!r}; wanted lower-case letters, digits and underscores, "
                "the first a letter. Name the trait by a noun such as 'sycophancy'"
            )
        with _blaming(f"trait {self.name!r}"):
            for field in ("description", "adjective", "opposite"):
                _check_text(field, getattr(self, field))
            _check_texts("extraction_questions", self.extraction_questions)
            _check_texts("evaluation_questions", self.evaluation_questions)
            _check_disjoint(self.extraction_questions, self.evaluation_questions)
            _check_instructions(self.instructions)
            _check_rubric(self.rubric)

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
        return tuple(sorted(path.stem for path in _SHIPPED.glob("*.json")))

    @classmethod
    def load(cls, name_or_path: str | os.PathLike[str]) -> "Trait":
        """Load a shipped trait by its name, or a trait from a `.json` file.

        A `str` is a path when it ends in `.json` or holds a directory separator.
        """
        if _is_path(name_or_path):
            return _from_record(_Record.read(Path(name_or_path)))
        name = str(name_or_path)
        if name not in cls.names():
            raise TraitError(_unknown(name, cls.names()))
        return _from_record(_Record.read(_SHIPPED / f"{name}.json"))

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
        extraction = _Record.read(Path(extraction_path))
        evaluation = _Record.read(Path(evaluation_path))
        with _blaming(str(extraction.path)):
            extraction.require(_UPSTREAM_FIELDS, closed=False)
            instructions = extraction.pairs("instruction", "pos", "neg")
            extraction_questions = extraction.texts("questions")
            rubric = extraction.text("eval_prompt")
        evaluation_questions = _agreeing_questions(evaluation, extraction)
        with _blaming(f"{extraction.path} and {evaluation.path}"):
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
            _write(path, dict(zip(_UPSTREAM_FIELDS, values, strict=True)))
        return extraction_path, evaluation_path

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the trait as one JSON file, whole or not at all; missing directories are made."""
        _write(Path(path), {_VERSION_FIELD: _VERSION} | asdict(self))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Record:
    """The object of one JSON file, read field by field; a `TraitError` names the field."""

    path: Path
    fields: Mapping[str, object]

    @classmethod
    def read(cls, path: Path) -> "_Record":
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise TraitError(
                f"{path}: cannot be read ({error.strerror}); wanted a trait file. Check the path, "
                f"or name a shipped trait: {', '.join(Trait.names())}"
            ) from error
        except (ValueError, RecursionError) as error:
            raise TraitError(
                f"{path}: got text that is not JSON ({error}); wanted a trait file. "
                "Write one with Trait.save"
            ) from error
        if not isinstance(fields, dict):
            raise TraitError(
                f"{path}: got a JSON {type(fields).__name__}; wanted an object. "
                "Write trait files with Trait.save"
            )
        return cls(path=path, fields=fields)

    def require(self, wanted: tuple[str, ...], *, closed: bool) -> None:
        """Every wanted field is there and, when `closed`, no other."""
        missing = [field for field in wanted if field not in self.fields]
        unknown = [field for field in self.fields if field not in wanted] if closed else []
        if missing or unknown:
            lacks = f"no {', '.join(missing)}" if missing else ""
            extra = f"unknown {', '.join(unknown)}" if unknown else ""
            raise TraitError(
                f"got {' and '.join(filter(None, (lacks, extra)))}; "
                f"wanted the fields {', '.join(wanted)}. Correct the file"
            )

    def text(self, field: str) -> str:
        value = self.fields[field]
        if not isinstance(value, str):
            raise _wrong(field, value, "a text")
        return value

    def texts(self, field: str) -> tuple[str, ...]:
        value = self.fields[field]
        if not isinstance(value, list):
            raise _wrong(field, value, "a list of texts")
        for index, entry in enumerate(value):
            if not isinstance(entry, str):
                raise _wrong(f"{field}[{index}]", entry, "a text")
        return tuple(value)

    def pairs(self, field: str, positive: str, negative: str) -> tuple[ContrastPair, ...]:
        value = self.fields[field]
        if not isinstance(value, list):
            raise _wrong(field, value, "a list of pairs")
        for index, entry in enumerate(value):
            if not (
                isinstance(entry, dict)
                and entry.keys() == {positive, negative}
                and all(isinstance(prompt, str) for prompt in entry.values())
            ):
                wanted = f"an object of two texts, {positive!r} and {negative!r}"
                raise _wrong(f"{field}[{index}]", entry, wanted)
        return tuple(ContrastPair(positive=e[positive], negative=e[negative]) for e in value)


@contextmanager
def _blaming(source: str) -> Iterator[None]:
    """Put the file or trait at fault in front of a `TraitError`."""
    try:
        yield
    except TraitError as error:
        raise TraitError(f"{source}: {error}") from error.__cause__


def _wrong(field: str, value: object, wanted: str) -> TraitError:
    return TraitError(f"{field}: got {reprlib.repr(value)}; wanted {wanted}. Correct the file")


def _from_record(record: _Record) -> Trait:
    with _blaming(str(record.path)):
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


def _check_text(field: str, text: str) -> None:
    if not isinstance(text, str) or not text.strip():
        raise TraitError(f"{field}: got {text!r}; wanted a text. Write it out")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise TraitError(
            f"{field}: got half a surrogate pair in {text!r}; wanted text that can be "
            "stored as UTF-8. Write it again"
        )


def _check_texts(field: str, texts: tuple[str, ...]) -> None:
    if not isinstance(texts, tuple) or not texts:
        raise TraitError(
            f"{field}: got {reprlib.repr(texts)}; wanted a tuple of one or more. Write them out"
        )
    first: dict[str, int] = {}
    for index, text in enumerate(texts):
        _check_text(f"{field}[{index}]", text)
        earlier = first.setdefault(_spoken(text), index)
        if earlier != index:
            raise TraitError(
                f"{field}[{index}]: got {text!r}, which is {field}[{earlier}] again; "
                "wanted each once. Replace one of the two"
            )


def _check_disjoint(extraction: tuple[str, ...], evaluation: tuple[str, ...]) -> None:
    asked = {_spoken(text): index for index, text in enumerate(extraction)}
    for index, text in enumerate(evaluation):
        if _spoken(text) in asked:
            raise TraitError(
                f"evaluation_questions[{index}]: got {text!r}, which is "
                f"extraction_questions[{asked[_spoken(text)]}]; wanted questions the vector was "
                "not extracted with. Replace one of the two"
            )


def _check_instructions(pairs: tuple[ContrastPair, ...]) -> None:
    if not isinstance(pairs, tuple) or not all(isinstance(pair, ContrastPair) for pair in pairs):
        raise TraitError(
            f"instructions: got {reprlib.repr(pairs)}; wanted a tuple of ContrastPair. "
            "Write ContrastPair(positive=..., negative=...) for each"
        )
    _check_texts("instructions.positive", tuple(pair.positive for pair in pairs))
    _check_texts("instructions.negative", tuple(pair.negative for pair in pairs))
    for index, pair in enumerate(pairs):
        if _spoken(pair.positive) == _spoken(pair.negative):
            raise TraitError(
                f"instructions[{index}]: got {pair.positive!r} on both sides; wanted two "
                "prompts that differ in the trait. Rewrite one side"
            )


def _check_rubric(rubric: str) -> None:
    _check_text("rubric", rubric)
    try:
        parts = list(string.Formatter().parse(rubric))
    except ValueError as error:
        raise TraitError(
            f"rubric: got a loose brace ({error}); wanted {{question}} and {{answer}}. "
            "Write any other brace twice"
        ) from error
    # A conversion or format specification is part of what must match: {answer!r} is refused.
    found = {
        field + (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "")
        for _, field, spec, conversion in parts
        if field is not None
    }
    if found != _PLACEHOLDERS:
        got = ", ".join(f"{{{field}}}" for field in sorted(found)) or "none"
        raise TraitError(
            f"rubric: got the placeholders {got}; wanted {{question}} and {{answer}}. "
            "Use both, and write any other brace twice"
        )


def _spoken(text: str) -> str:
    """What counts when two texts are compared: neither case nor spacing."""
    return " ".join(text.split()).casefold()


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


def _agreeing_questions(evaluation: "_Record", extraction: "_Record") -> tuple[str, ...]:
    """The evaluation file's questions, if all else in it is as in the extraction file."""
    with _blaming(str(evaluation.path)):
        evaluation.require(_UPSTREAM_FIELDS, closed=False)
        for field in ("instruction", "eval_prompt"):
            if evaluation.fields[field] != extraction.fields[field]:
                raise TraitError(
                    f"{field}: got another value than in {extraction.path}; wanted the two files "
                    "of one trait. Give the files that belong together"
                )
        return evaluation.texts("questions")


def _write(path: Path, record: Mapping[str, object]) -> None:
    """Write JSON beside `path` and move it there, so that no reader ever meets half a file."""
    content = (json.dumps(record, ensure_ascii=False, indent=2) + "\n").encode()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, content)
    except OSError as error:
        raise TraitError(
            f"{path}: cannot be written ({error.strerror}); wanted a file in a directory that can "
            "be written. Give another path"
        ) from error
