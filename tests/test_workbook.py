"""The work folder: what it keeps, whose it is, and what it does with files that were changed."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from shutil import copytree
from threading import Thread
from typing import Any

import pytest
import torch

import pvcore as pv
from pvcore.errors import JudgeFailure, WorkError
from pvcore.extraction import Extraction, extract
from pvcore.judge import Judgement, JudgingAborted, judge_all
from pvcore.traits import ContrastPair
from pvcore.workbook import Workbook
from tests import subjects
from tests.families import build, tokenizer
from tests.test_extraction import LAYERS, PROMPTS, QUESTIONS, TRAIT, Letters, fresh_model

SETTINGS = {"seed": 0, "judge": "Letters", "temperature": 1.0}


class Counting(Letters):
    """Counts what it is asked; fails for answers with some letter, or for every so many rows."""

    def __init__(self, failing: str = "", every: int = 1000) -> None:
        self.failing, self.every, self.asked = failing, every, []

    def trait(self, trait: str, question: str, answer: str) -> float:
        self.asked.append((question, answer))
        bad = any(letter in answer for letter in self.failing)
        if bad or len(self.asked) % self.every == 0:
            raise JudgeFailure("no words")
        return super().trait(trait, question, answer)


def run(work: Path | None, **settings: Any) -> Extraction:
    wanted: dict[str, Any] = {
        "judge": Letters(),
        "system_prompts": PROMPTS,
        "questions": QUESTIONS,
        "layers": LAYERS,
        "rollouts": 2,
        "max_new_tokens": 8,
        "batch_size": 24,
        "resamples": 10,
        "work": work,
    }
    model = settings.pop("model", None) or fresh_model()
    trait = settings.pop("trait", TRAIT)
    return extract(model, trait, **(wanted | settings))


def bytes_of(result: Extraction, folder: Path) -> dict[str, bytes]:
    found = {}
    for variant, vector in result.vectors.items():
        vector.save(folder / variant)
        found[variant] = (folder / variant).read_bytes()
    return found


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The work folder of a run that came to its end."""
    work = tmp_path_factory.mktemp("done") / "work"
    run(work)
    return work


def test_a_work_folder_changes_nothing_but_what_is_done_again(tmp_path: Path) -> None:
    plain = run(None)
    work, judge = tmp_path / "deep" / "work", Counting()
    kept = run(work, judge=judge)
    assert len(judge.asked) == len(kept.rollouts)
    assert kept.rollouts == plain.rollouts
    assert torch.equal(kept.vector.directions, plain.vector.directions)
    assert sorted(path.name for path in work.iterdir()) == [
        "judgements.jsonl", "pooled.safetensors", "replies.jsonl", "run.json"
    ]  # fmt: skip
    again = Counting()
    repeated = run(work, judge=again)
    assert again.asked == []
    assert bytes_of(repeated, tmp_path) == bytes_of(kept, tmp_path)
    assert repeated.rollouts == kept.rollouts


def other_prompt() -> list[ContrastPair]:
    return [PROMPTS[0], ContrastPair(positive=PROMPTS[1].positive, negative="You like all.")]


def other_trait() -> pv.Trait:
    return pv.Trait.load("apathy").__class__(
        **{name: getattr(TRAIT, name) for name in TRAIT.__dataclass_fields__}
        | {"rubric": TRAIT.rubric + " Be strict."}
    )


class Others(Letters):
    """Another judge."""


CHANGES: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "seed": (lambda: {"seed": 1}, "seed was 0 and is 1"),
    "temperature": (lambda: {"temperature": 0.5}, "temperature was 1.0 and is 0.5"),
    "length": (lambda: {"max_new_tokens": 9}, "longest reply was 8 and is 9"),
    "batch size": (lambda: {"batch_size": 9}, "batch size was 24 and is 9"),
    "threshold": (lambda: {"threshold": 60}, "threshold was 50.0 and is 60.0"),
    "sites": (lambda: {"layers": [0]}, "sites was 'resid_post.0, resid_post.1' and is"),
    "resamples": (lambda: {"resamples": 11}, "resamples was 10 and is 11"),
    "rollouts": (lambda: {"rollouts": 1}, "replies was 64 and is 32"),
    "judge": (lambda: {"judge": Others()}, r"judge was '\S*Letters' and is '\S*Others'"),
    "questions": (
        lambda: {"questions": (*QUESTIONS[1:], "Why?")},
        "system prompts and questions was",
    ),
    "prompts": (lambda: {"system_prompts": other_prompt()}, "system prompts and questions was"),
    "trait": (lambda: {"trait": other_trait()}, "trait was 'evil [0-9a-f]+' and is 'evil"),
    "weights": (
        lambda: {
            "model": pv.HookedModel(build("qwen2", seed=1), tokenizer(), model_id="tiny/qwen2")
        },
        "weights was",
    ),
    "model": (
        lambda: {"model": pv.HookedModel(build("qwen2"), tokenizer(), model_id="other")},
        "model was 'tiny/qwen2' and is 'other'",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_configuration_is_refused_by_the_name_of_what_changed(
    change: str, done: Path, tmp_path: Path
) -> None:
    work = copytree(done, tmp_path / "work")
    before = {path.name: path.read_bytes() for path in work.iterdir()}
    settings, complaint = CHANGES[change]
    with pytest.raises(WorkError, match=f"got the work of another run: .*{complaint}") as caught:
        run(work, **settings())
    assert str(caught.value).count(" was ") == 1 + (change in ("rollouts", "seed"))
    assert {path.name: path.read_bytes() for path in work.iterdir()} == before


class Fickle(Letters):
    """Drops the pairs of one question, if it is of that mind today."""

    def __init__(self, question: str) -> None:
        self.question = question

    def coherence(self, question: str, answer: str) -> float:
        return 0.0 if question == self.question else super().coherence(question, answer)


def test_sums_are_taken_up_for_the_replies_they_are_of_and_no_others(tmp_path: Path) -> None:
    work = tmp_path / "work"
    first = run(work, judge=Fickle(QUESTIONS[0]))
    (work / "judgements.jsonl").unlink()
    second = run(work, judge=Fickle(QUESTIONS[1]))
    wanted = run(None, judge=Fickle(QUESTIONS[1]))
    assert second.rollouts == wanted.rollouts
    assert torch.equal(second.vector.directions, wanted.vector.directions)
    assert not torch.allclose(first.vector.directions, wanted.vector.directions)
    assert torch.equal(run(work, judge=Fickle("")).vector.directions, second.vector.directions)


def test_no_work_is_kept_of_a_model_under_a_plan(tmp_path: Path) -> None:
    model = fresh_model()
    steering = subjects.vector("evil", [pv.resid_post(0)], seed=1, model_id="tiny/qwen2", scale=0.3)
    with model.steer(pv.Add(steering, coeff=1.0)):
        with pytest.raises(WorkError, match="while a plan is armed"):
            run(tmp_path / "work", model=model)
        assert not (tmp_path / "work").exists()
        steered = run(None, model=model)
    assert steered.rollouts != run(tmp_path / "work", model=model).rollouts


def test_a_run_that_was_aborted_keeps_what_was_judged(tmp_path: Path) -> None:
    work, failing = tmp_path / "work", Counting(every=3)
    with pytest.raises(JudgingAborted):
        run(work, judge=failing)
    assert len(failing.asked) == 21  # the seventh failure of 64 is more than a tenth
    mended = Counting()
    result = run(work, judge=mended)
    assert len(mended.asked) == 64 - 14
    assert torch.equal(result.vector.directions, run(None).vector.directions)


def test_failures_are_final_once_the_judging_has_ended(tmp_path: Path) -> None:
    book = Workbook(tmp_path / "work", SETTINGS)
    pairs = [("q", letter * 3) for letter in "abcdefghijkl"]
    first = book.judge(Counting(failing="e"))
    judged = judge_all(first, "evil", pairs)
    assert judged.n_failed == 1
    retried = Counting()
    unsettled = Workbook(tmp_path / "work", SETTINGS).judge(retried)
    assert judge_all(unsettled, "evil", pairs).n_failed == 0
    assert retried.asked == [("q", "eee")]

    other = Workbook(tmp_path / "other", SETTINGS).judge(Counting(failing="e"))
    ended = judge_all(other, "evil", pairs)
    other.settle("evil", ended.rows)
    silent = Counting()
    kept = judge_all(Workbook(tmp_path / "other", SETTINGS).judge(silent), "evil", pairs)
    assert kept == ended
    assert silent.asked == []


def test_a_folder_that_holds_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine", "utf-8")
    with pytest.raises(WorkError, match=r"got a folder with notes.txt in it; wanted an empty one"):
        Workbook(tmp_path, SETTINGS)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("content", ["", "[]", '{"pvcore_extraction": 3}', "{}", '{"a"'])
def test_a_run_that_is_none_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(content, "utf-8")
    with pytest.raises(WorkError, match=r"run.json: got no record of a run"):
        Workbook(tmp_path, SETTINGS)


def test_changed_files_are_refused(tmp_path: Path) -> None:
    book = Workbook(tmp_path / "work", SETTINGS)
    book.keep_replies(0, ["a", None])
    assert Workbook(tmp_path / "work", SETTINGS).replies(0, 2) == ["a", None]
    with pytest.raises(WorkError, match="for batch 0; wanted 3 replies"):
        Workbook(tmp_path / "work", SETTINGS).replies(0, 3)
    path = tmp_path / "work" / "replies.jsonl"
    path.write_text(path.read_text("utf-8").replace("null", "7"), "utf-8")
    with pytest.raises(WorkError, match="start again in an empty folder"):
        Workbook(tmp_path / "work", SETTINGS).replies(0, 2)

    judge = book.judge(Letters())
    judge_all(judge, "evil", [("q", "a")])
    path = tmp_path / "work" / "judgements.jsonl"
    path.write_text(path.read_text("utf-8").replace("refused", "amused"), "utf-8")
    with pytest.raises(WorkError, match="got a kept judgement"):
        judge_all(Workbook(tmp_path / "work", SETTINGS).judge(Letters()), "evil", [("q", "a")])


def test_sums_that_were_changed_are_refused(done: Path, tmp_path: Path) -> None:
    work = copytree(done, tmp_path / "work")
    (work / "pooled.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    with pytest.raises(WorkError, match="got sums of a pooling pass that cannot be taken up"):
        run(work)


def test_a_place_that_cannot_be_written_is_one_typed_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(WorkError, match="got a place that cannot be written"):
        Workbook(tmp_path / "file" / "work", SETTINGS)
    book = Workbook(tmp_path / "work", SETTINGS)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(WorkError, match="No space left on device"):
        book.keep_pooled(b"sums")
    assert book.pooled is None


def test_drafts_that_a_kill_left_are_swept_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / ".run.json.4567.tmp").write_bytes(b"half")
    book = Workbook(tmp_path, SETTINGS)
    (tmp_path / ".pooled.safetensors.0123.tmp").write_bytes(b"half")
    (tmp_path / "mine.txt").write_bytes(b"whole")
    with book.held():
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.txt", "run.json"]
    assert json.loads((tmp_path / "run.json").read_text("utf-8")) == {
        "pvcore_extraction": {"format": 1, **SETTINGS}
    }


def test_one_process_at_a_time_works_in_a_folder(tmp_path: Path) -> None:
    first, second = Workbook(tmp_path, SETTINGS), Workbook(tmp_path, SETTINGS)
    with first.held():
        draft = tmp_path / ".pooled.safetensors.0123.tmp"
        draft.write_bytes(b"being written")
        with (
            pytest.raises(WorkError, match="another process is at work in; wanted one of one's"),
            second.held(),
        ):
            pass
        assert draft.exists()
    with second.held():
        assert not draft.exists()


def test_of_two_runs_that_begin_in_one_folder_the_second_finds_the_first(tmp_path: Path) -> None:
    refused: list[WorkError] = []

    def begin() -> None:
        try:
            Workbook(tmp_path, SETTINGS | {"seed": 1})
        except WorkError as error:
            refused.append(error)

    file = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(file, fcntl.LOCK_EX)  # as the first holds it
    second = Thread(target=begin)
    second.start()
    second.join(0.3)
    assert second.is_alive()
    assert list(tmp_path.iterdir()) == []
    record = json.dumps({"pvcore_extraction": {"format": 1, **SETTINGS}})
    (tmp_path / "run.json").write_text(record, "utf-8")
    os.close(file)
    second.join(10)
    assert "seed was 0 and is 1" in str(refused[0])
    assert (tmp_path / "run.json").read_text("utf-8") == record


class Backwards(Counting):
    """Judges many at once and is done with the last ones first."""

    def judge_many(
        self, trait: str, pairs: Sequence[tuple[str, str]]
    ) -> Iterator[tuple[int, Judgement]]:
        for index in reversed(range(len(pairs))):
            question, answer = pairs[index]
            yield (
                index,
                Judgement(
                    question=question,
                    answer=answer,
                    trait_score=self.trait(trait, question, answer),
                    coherence_score=self.coherence(question, answer),
                    failure=None,
                ),
            )


def test_judgements_are_kept_in_whatever_order_they_come(tmp_path: Path) -> None:
    pairs = [("q", letter * 3) for letter in "abcdefgh"]
    broken = Workbook(tmp_path, SETTINGS).judge(Backwards())
    for number, (index, _) in enumerate(broken.judge_many("evil", pairs)):
        assert index == len(pairs) - 1 - number
        if number == 2:
            break
    mended = Backwards()
    found = judge_all(Workbook(tmp_path, SETTINGS).judge(mended), "evil", pairs)
    assert mended.asked == pairs[4::-1]
    assert [row.answer for row in found.rows] == [answer for _, answer in pairs]
    assert found == judge_all(Letters(), "evil", pairs)


def test_without_a_folder_everything_is_in_memory(tmp_path: Path) -> None:
    book = Workbook(None, {})
    book.keep_replies(0, ["a"])
    book.keep_pooled(b"sums")
    assert (book.replies(0, 1), book.pooled, book.on_disk) == (["a"], None, False)
