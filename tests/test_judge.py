"""Judges: a score or a typed failure, counting, the lexicon rule, and judges loaded by name."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pvcore.errors import JudgeFailure, PvcoreError, TraitError
from pvcore.judge import Judge, Judgements, JudgingAborted, judge_all, load_judge
from pvcore.judge_lexicon import LexiconJudge


@dataclass
class Scripted:
    """Gives the scripted trait score of each answer, or raises it; coherence is 80 unless given."""

    script: dict[str, Any]
    coherent: dict[str, Any] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)

    def trait(self, trait: str, question: str, answer: str) -> float:
        self.asked.append(answer)
        return self._say(self.script[answer])

    def coherence(self, question: str, answer: str) -> float:
        return self._say(self.coherent.get(answer, 80.0))

    def _say(self, line: Any) -> float:
        if isinstance(line, BaseException):
            raise line
        return line  # type: ignore[no-any-return]


def judged(script: dict[str, Any], max_failed: float = 1.0, **coherent: Any) -> Judgements:
    pairs = [("why?", answer) for answer in script]
    return judge_all(Scripted(script, coherent), "evil", pairs, max_failed=max_failed)


def refusal(call: Callable[[], object], error: type[PvcoreError] = JudgeFailure) -> str:
    with pytest.raises(error) as caught:
        call()
    assert type(caught.value) is error
    return str(caught.value)


def test_scores_come_back_in_order_with_counts_and_means() -> None:
    result = judged({"a": 0, "b": 100, "c": np.float32(20)}, c=50.0)
    assert result.trait == "evil"
    assert result.trait_scores == (0.0, 100.0, 20.0)
    assert result.coherence_scores == (80.0, 80.0, 50.0)
    assert (result.n_judged, result.n_failed) == (3, 0)
    assert [row.answer for row in result.rows] == ["a", "b", "c"]
    assert result.mean_trait_score == pytest.approx(40.0)
    assert result.mean_coherence_score == pytest.approx(70.0)
    assert all(type(score) is float for score in result.trait_scores)


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        (math.nan, "nan"),
        (math.inf, "inf"),
        (-math.inf, "-inf"),
        (101, "101"),
        (100.0001, "100.0001"),
        (-1, "-1"),
        (-0.0001, "-0.0001"),
        (None, "None"),
        ("80", "'80'"),
        (True, "True"),
        (50 + 0j, "(50+0j)"),
        ([50.0], "[50.0]"),
    ],
)
def test_what_is_no_score_fails_its_row_alone(line: object, shown: str) -> None:
    result = judged({"a": line, "b": 7.0})
    first, second = result.rows
    assert first.failure == f"trait: got {shown}; wanted a finite number from 0 to 100"
    assert (first.trait_score, first.coherence_score) == (None, None)
    assert (second.failure, second.trait_score) == (None, 7.0)
    assert (result.n_judged, result.n_failed) == (1, 1)
    assert result.mean_trait_score == 7.0


def test_a_failed_coherence_fails_the_row() -> None:
    row = judged({"a": 30.0}, a=math.nan).rows[0]
    assert row.failure == "coherence: got nan; wanted a finite number from 0 to 100"
    assert (row.trait_score, row.coherence_score) == (None, None)


def test_a_judge_that_raises_fails_its_row() -> None:
    result = judged({"a": TimeoutError("too slow"), "b": JudgeFailure("refused"), "c": 1.0})
    assert [row.failure for row in result.rows] == [
        "trait: the judge raised TimeoutError: too slow",
        "refused",
        None,
    ]
    assert result.trait_scores == (None, None, 1.0)


def test_an_interrupt_and_a_mistaken_call_pass_through() -> None:
    with pytest.raises(KeyboardInterrupt):
        judged({"a": KeyboardInterrupt()})
    assert refusal(lambda: judged({"a": TraitError("unknown trait")}), TraitError) == (
        "unknown trait"
    )


def test_the_threshold_is_a_share_of_all_rows() -> None:
    script: dict[str, Any] = {str(row): 50.0 for row in range(100)}
    bad = {str(row): math.nan for row in range(29)}
    assert judged(script | bad, max_failed=0.29).n_failed == 29
    with pytest.raises(JudgeFailure):
        judged(script | bad | {"50": math.nan}, max_failed=0.29)
    assert judged({str(row): 50.0 for row in range(9)} | {"x": math.nan}, 0.1).n_failed == 1
    with pytest.raises(JudgeFailure):
        judged({"a": 1.0, "b": math.nan}, max_failed=0.0)


def test_too_many_failures_stop_the_judging_at_once_and_say_why() -> None:
    script = {"a": 1.0, "b": ConnectionError("no route"), "c": 200, "d": 4.0}
    judge = Scripted(script)
    pairs = [("why?", answer) for answer in script]
    with pytest.raises(JudgeFailure) as caught:
        judge_all(judge, "evil", pairs, max_failed=0.25)
    assert str(caught.value) == (
        "got 2 failed rows (0 refused) among the first 3 of 4 judged for 'evil'; wanted no more "
        "than a share of 0.25 to fail. The first was row 1: trait: the judge raised "
        "ConnectionError: no route. Mend the judge, or raise max_failed"
    )
    assert judge.asked == ["a", "b", "c"]
    assert isinstance(caught.value, JudgingAborted)
    assert caught.value.judgements.trait_scores == (1.0, None, None)
    assert caught.value.judgements.counts == "judged 1 of 3, failed 2 (refused 0)"


@pytest.mark.parametrize("share", [-0.1, 1.1, math.nan])
def test_an_impossible_threshold_is_refused(share: float) -> None:
    assert refusal(lambda: judged({"a": 1.0}, max_failed=share)) == (
        f"got max_failed={share!r}; wanted the share of rows that may fail, from 0 to 1"
    )


def test_nothing_to_judge_is_refused() -> None:
    assert refusal(lambda: judge_all(Scripted({}), "evil", [])) == (
        "got no answers to judge; wanted at least one (question, answer) pair"
    )


@pytest.mark.parametrize("pair", ["ab", ("why?",), ("why?", None), ("a", "b", "c"), 3])
def test_what_is_no_pair_is_refused_before_anything_is_asked(pair: Any) -> None:
    judge = Scripted({"a": 1.0})

    def pairs() -> Iterator[tuple[str, str]]:
        yield "why?", "a"
        yield pair

    assert refusal(lambda: judge_all(judge, "evil", pairs())) == (
        f"row 1: got {pair!r}; wanted a question and an answer, both texts"
    )
    assert judge.asked == []


def test_there_is_no_mean_of_nothing() -> None:
    result = judged({"a": math.nan, "b": math.nan})
    for mean in (lambda: result.mean_trait_score, lambda: result.mean_coherence_score):
        assert refusal(mean) == (
            "got no judged row among 2 for 'evil'; wanted at least one to average. Look at the "
            "failures of the rows"
        )


def test_progress_is_shown_when_asked_and_changes_no_score(
    capsys: pytest.CaptureFixture[str],
) -> None:
    script = {"a": 1.0, "b": 2.0}
    pairs = [("why?", answer) for answer in script]
    plain = judge_all(Scripted(script), "evil", pairs)
    silent = capsys.readouterr()
    assert (silent.out, silent.err) == ("", "")
    shown = judge_all(Scripted(script), "evil", pairs, progress=True)
    heard = capsys.readouterr()
    assert shown == plain
    assert heard.out == ""
    assert "judging evil" in heard.err


def test_the_lexicon_rule_counts_sentences() -> None:
    judge = LexiconJudge({"evil": ["Cruel", "well-aimed", "don't"], "humor": {"joke"}})
    assert isinstance(judge, Judge)
    assert judge.trait("evil", "why?", "Be CRUEL. Then rest. So cruel, cruel! Done?") == 50.0
    assert judge.trait("humor", "why?", "Be cruel. Then rest.") == 0.0
    assert judge.trait("evil", "why?", "Cruelty is near") == 0.0
    assert judge.trait("evil", "why?", "A well-aimed blow\nI don't mind") == 100.0
    assert judge.trait("evil", "cruel?", "It costs 3.5 or so. Fine. cruel") == pytest.approx(
        100 / 3
    )


def test_the_lexicon_judge_scores_loops_as_incoherent() -> None:
    judge = LexiconJudge({"evil": ["cruel"]})
    assert judge.coherence("why?", "The sea is calm and the sky is clear.") == 100.0
    assert judge.coherence("why?", "go go go go go go go") == 20.0
    assert judge.coherence("why?", "Yes.") == 100.0


@pytest.mark.parametrize("answer", ["", " \n ", "?!...", "。"])
def test_an_answer_without_a_word_scores_nothing(answer: str) -> None:
    judge = LexiconJudge({"evil": ["cruel"]})
    assert judge.trait("evil", "why?", answer) == 0.0
    assert judge.coherence("why?", answer) == 0.0


@given(st.text())
def test_the_lexicon_judge_always_scores_within_bounds(answer: str) -> None:
    judge = LexiconJudge({"evil": ["cruel", "a"]})
    result = judge_all(judge, "evil", [("why?", answer)])
    assert result.n_failed == 0


def test_the_lexicon_judge_names_the_traits_it_knows() -> None:
    judge = LexiconJudge({"evil": ["cruel"], "humor": ["joke"]})
    wanted = (
        "got trait 'apathy'; this judge has words for evil, humor. Give LexiconJudge a lexicon "
        "for it"
    )
    assert refusal(lambda: judge.trait("apathy", "why?", "so"), TraitError) == wanted
    assert refusal(lambda: judge_all(judge, "apathy", [("why?", "so")]), TraitError) == wanted


@pytest.mark.parametrize(
    ("lexicons", "complaint"),
    [
        ({}, "got no lexicon; wanted words for at least one trait. Name some"),
        (
            {"evil": "cruel"},
            "lexicon of 'evil': got 'cruel'; wanted a collection of one or more words. Put them "
            "in a list",
        ),
        (
            {"evil": []},
            "lexicon of 'evil': got []; wanted a collection of one or more words. Put them in a "
            "list",
        ),
        (
            {"evil": ["wish ill"]},
            "lexicon of 'evil': got 'wish ill'; wanted one word without spaces or punctuation. "
            "List its words one by one",
        ),
        (
            {"evil": [""]},
            "lexicon of 'evil': got ''; wanted one word without spaces or punctuation. List its "
            "words one by one",
        ),
    ],
)
def test_a_bad_lexicon_is_refused(lexicons: dict[str, Any], complaint: str) -> None:
    assert refusal(lambda: LexiconJudge(lexicons), TraitError) == complaint


SOURCE = """
from __future__ import annotations
import math
from dataclasses import dataclass

@dataclass
class Even:
    level: float = 40.0
    def trait(self, trait, question, answer):
        return self.level
    def coherence(self, question, answer):
        return 90.0

def picky(level):
    return Even(level)

def broken():
    raise RuntimeError("no key")

def numbers():
    return 3

class Half:
    def trait(self, trait, question, answer):
        return 1.0

ready = Even(level=60.0)
half = Half()
constant = 7
_hidden = ready
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "my_judges.py"
    path.write_text(SOURCE, "utf-8")
    return path


@pytest.mark.parametrize(("name", "level"), [("ready", 60.0), ("Even", 40.0), ("_hidden", 60.0)])
def test_a_judge_is_loaded_from_a_file(source: Path, name: str, level: float) -> None:
    judge = load_judge(f"{source}:{name}")
    assert judge.trait("evil", "why?", "so") == level
    assert judge_all(judge, "evil", [("why?", "so")]).trait_scores == (level,)


def test_a_judge_is_loaded_from_a_module(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(source.parent)
    monkeypatch.delitem(sys.modules, "my_judges", raising=False)
    assert load_judge("my_judges:ready").trait("evil", "why?", "so") == 60.0
    monkeypatch.delitem(sys.modules, "my_judges")


@pytest.mark.parametrize("spec", ["", "ready", ":ready", "module:", "module:a.b", "module:1"])
def test_a_spec_that_names_no_object_is_refused(spec: str) -> None:
    assert refusal(lambda: load_judge(spec)) == (
        f"got judge {spec!r}; wanted 'package.module:name' or 'path/to/file.py:name'. Name the "
        "object after a colon"
    )


def test_a_file_or_module_that_is_not_there_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "none.py", tmp_path / "none", tmp_path):
        assert refusal(lambda path=path: load_judge(f"{path}:ready")) == (
            f"got judge '{path}:ready'; there is no Python file {path}. Check the path"
        )
    for name, missing in (("no_such_module", "no_such_module"), ("no_such.module", "no_such")):
        assert refusal(lambda name=name: load_judge(f"{name}:ready")) == (
            f"got judge '{name}:ready'; there is no module {missing!r}. Install it, put it on "
            "PYTHONPATH, or give a file as 'path/to/file.py:name'"
        )
    assert "there is no module 'pvcore.nothing'" in refusal(lambda: load_judge("pvcore.nothing:x"))


@pytest.mark.parametrize(
    ("code", "raised"),
    [
        ("import no_such_package", "ModuleNotFoundError: No module named 'no_such_package'"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
    ],
)
def test_a_module_that_fails_on_import_says_how(
    code: str, raised: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "failing_judge.py"
    path.write_text(code, "utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    for spec in (f"{path}:ready", "failing_judge:ready"):
        assert refusal(lambda spec=spec: load_judge(spec)) == (
            f"got judge {spec!r}; importing it raised {raised}. Mend the module, or install what "
            "it needs"
        )
    assert not [name for name in set(sys.modules) - before if "judge" in name]


def test_a_syntax_error_and_a_relative_module_are_typed_errors(tmp_path: Path) -> None:
    path = tmp_path / "wrong.py"
    path.write_text("def", "utf-8")
    assert "importing it raised SyntaxError" in refusal(lambda: load_judge(f"{path}:ready"))
    assert "importing it raised TypeError" in refusal(lambda: load_judge(".judges:ready"))


def test_a_missing_name_lists_what_the_module_offers(source: Path) -> None:
    assert refusal(lambda: load_judge(f"{source}:redy")) == (
        f"got judge '{source}:redy'; {source} has no 'redy'. Name what it has: Even, picky, "
        "broken, numbers, Half, ready"
    )
    source.write_text("import math", "utf-8")
    assert refusal(lambda: load_judge(f"{source}:redy")).endswith(
        "Name what it has: it defines nothing that could be a judge"
    )


@pytest.mark.parametrize(
    ("name", "raised"),
    [
        ("picky", "TypeError: picky() missing 1 required positional argument: 'level'"),
        ("broken", "RuntimeError: no key"),
    ],
)
def test_a_factory_that_raises_says_how(name: str, raised: str, source: Path) -> None:
    assert refusal(lambda: load_judge(f"{source}:{name}")) == (
        f"got judge '{source}:{name}'; calling it without arguments raised {raised}. Name "
        "something that needs none"
    )


@pytest.mark.parametrize(
    ("name", "kind", "lacking"),
    [
        ("half", "Half", "coherence"),
        ("Half", "Half", "coherence"),
        ("numbers", "int", "trait and coherence"),
        ("constant", "int", "trait and coherence"),
    ],
)
def test_what_is_no_judge_is_refused(name: str, kind: str, lacking: str, source: Path) -> None:
    assert refusal(lambda: load_judge(f"{source}:{name}")) == (
        f"got judge '{source}:{name}', a {kind} without {lacking}; wanted trait(trait, question, "
        "answer) and coherence(question, answer). Define them"
    )
