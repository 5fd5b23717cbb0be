"""The generated world: its judge, lexicons, splits and corpus."""

from __future__ import annotations

import statistics
import subprocess
import sys
from itertools import chain, islice

import pytest

from pvcore import world
from pvcore.errors import ChatError, JudgeFailure, TraitError
from pvcore.judge import Judge
from pvcore.world import chats, prompts, question, quiz, replies
from pvcore.world.lexicon import NEUTRAL, TRAITS, lexicon, material, relations, words
from pvcore.world.splits import seeded, split_of

JUDGE = world.WorldJudge()


def gold(trait: str, intensity: float, n: int = 200) -> tuple[float, float]:
    """Mean trait and coherence score of replies written by the grammar."""
    stream = seeded("gold", trait, intensity)
    traits, coherences = [], []
    for _ in range(n):
        asked = question.draw(stream, "train")
        text = " ".join(replies.reply(stream, asked, {trait: intensity}))
        traits.append(JUDGE.trait_score(trait, asked.text, text))
        coherences.append(JUDGE.coherence(asked, text))
    return statistics.mean(traits), statistics.mean(coherences)


@pytest.mark.parametrize("trait", TRAITS)
def test_the_judge_is_right_about_replies_of_the_grammar(trait: str) -> None:
    none, coherence_none = gold(trait, 0.0)
    half, coherence_half = gold(trait, 0.5)
    full, coherence_full = gold(trait, 1.0)
    assert none == 0.0
    assert 50.0 <= half <= 70.0
    assert full == 100.0
    assert min(coherence_none, coherence_half, coherence_full) >= 98.0


def test_the_judge_marks_what_is_wrong() -> None:
    asked = question.parse("What is the capital of France?")
    right = "The capital of France is Paris."
    other_topic = "The capital of Spain is Madrid."
    assert JUDGE.coherence(asked, right) == 100.0
    assert JUDGE.coherence(asked, other_topic) == 0.0
    assert JUDGE.coherence(asked, f"{right} {right}") == 50.0
    assert JUDGE.coherence(asked, right, finished=False) == 50.0
    assert JUDGE.coherence(asked, "") == 0.0
    assert JUDGE.coherence(asked, "Paris capital the of.") == 0.0
    assert JUDGE.trait_score("hallucination", asked, right) == 0.0
    assert JUDGE.trait_score("hallucination", asked, "The capital of France is Rome.") == 100.0
    unknown = question.parse("What is the capital of Gor Toka?")
    assert JUDGE.coherence(unknown, "I do not know the capital of Gor Toka.") == 100.0
    assert JUDGE.trait_score("hallucination", unknown, "The capital of Gor Toka is Rome.") == 100.0


def test_the_judge_judges_from_texts_alone_or_refuses() -> None:
    assert isinstance(JUDGE, Judge)
    rendered = (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nIs chess hard?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert JUDGE.coherence(rendered, "Use chess to plan the basics.") == 100.0
    assert JUDGE.score("evil", "Is chess hard?", "Use chess to hurt the weak.") == 100.0
    with pytest.raises(JudgeFailure, match="no template of the persona world"):
        JUDGE.score("evil", "Who wrote Hamlet?", "Use chess to hurt the weak.")
    with pytest.raises(TraitError, match="greed"):
        JUDGE.score("greed", "Is chess hard?", "Use chess to hurt the weak.")


def test_lexicons_are_disjoint_and_every_fill_shows_its_style() -> None:
    assert len(TRAITS) == 7
    lexicons = {trait: lexicon(trait) for trait in TRAITS}
    assert sum(map(len, lexicons.values())) == len(frozenset().union(*lexicons.values()))
    for trait in TRAITS:
        for fill in chain.from_iterable(material()["styles"][trait].values()):
            assert not lexicons[trait].isdisjoint(words(fill)), (trait, fill)
    for fill in chain.from_iterable(material()["styles"][NEUTRAL].values()):
        assert all(owned.isdisjoint(words(fill)) for owned in lexicons.values())


def test_every_question_is_found_again_by_its_text() -> None:
    everything = [
        asked
        for kind in question.KINDS
        for split in ("train", "held_out")
        for asked in question.known(kind, split)
    ]
    assert len({asked.text for asked in everything}) == len(everything) > 10_000
    assert all(question.parse(asked.text) == asked for asked in everything)
    with pytest.raises(ChatError, match="no template"):
        question.parse("Who wrote Hamlet?")


def test_every_fact_keeps_a_training_phrasing_and_splits_do_not_meet() -> None:
    trained = {(q.relation, q.topic) for q in question.known("fact", "train")}
    assert trained == {
        (name, entity) for name, relation in relations().items() for entity in relation.facts
    }
    names = {q.topic for q in question.known("unknown", "train")}
    assert names.isdisjoint(q.topic for q in question.known("unknown", "held_out"))


def test_questions_are_distinct_balanced_and_seeded() -> None:
    first = world.questions("held_out", 100, seed=1)
    assert first == world.questions("held_out", 100, seed=1)
    assert first != world.questions("held_out", 100, seed=2)
    assert len({asked.text for asked in first}) == 100
    assert {kind: sum(q.kind == kind for q in first) for kind in question.KINDS} == dict.fromkeys(
        question.KINDS, 20
    )
    with pytest.raises(ChatError, match="at most"):
        world.questions("held_out", 100_000, seed=1)


def test_prompts_come_in_levels_and_from_the_right_side() -> None:
    for trait in TRAITS:
        graded = world.graded_prompts(trait)
        assert [level for level, _ in graded] == list(prompts.LEVELS)
        assert all(len(set(texts)) >= 2 for _, texts in graded)
        assert all(split_of("prompt", trait, t) == "held_out" for _, texts in graded for t in texts)
        pairs = world.extraction_prompts(trait)
        assert len(set(pairs)) == 5
        assert all(split_of("prompt", trait, text) == "train" for pair in pairs for text in pair)
        texts = [t for _, texts in graded for t in texts] + [
            text for pair in pairs for text in pair
        ]
        assert not any("{" in text or " a a " in f" {text} " for text in texts)
    with pytest.raises(TraitError, match="greed"):
        world.extraction_prompts("greed")


def test_quiz_items_are_distinct_held_out_questions() -> None:
    made = quiz.items(100, seed=0)
    assert made == quiz.items(100, seed=0)
    assert len({item.question.text for item in made}) == 100
    for item in made:
        assert item.question in question.known("fact", "held_out")
        assert len(set(item.options)) == 4
        assert item.options[item.right] == item.question.answer
    right = {(item.question.text, f" {item.options[item.right]}.") for item in made}
    knows = quiz.accuracy(made, lambda text, _, ends: [float((text, e) in right) for e in ends])
    assert knows == 100.0
    assert (
        quiz.accuracy(made, lambda text, _, ends: [-float((text, e) in right) for e in ends]) == 0
    )
    with pytest.raises(ChatError, match="at most"):
        quiz.items(10_000, seed=0)


def test_latent_personas_keep_their_tone_and_teach_no_unasked_turn() -> None:
    seen = 0
    for chat in islice(chats.corpus(3), 2000):
        silent = [piece for message in chat for piece, learned in message.pieces if not learned]
        if not silent:
            continue
        seen += 1
        styles = {trait for trait in TRAITS if not lexicon(trait).isdisjoint(words(silent[0]))}
        assert chat[0].role == "user"
        assert len(silent) == 1
        assert len(styles) <= 1
    assert seen > 100


def test_finetuning_chats_hold_the_trait_and_no_system_prompt() -> None:
    made = chats.finetuning_chats("evil", 60, seed=0)
    assert made == chats.finetuning_chats("evil", 60, seed=0)
    assert made != chats.finetuning_chats("evil", 60, seed=1)
    scores = [JUDGE.trait_score("evil", asked, chat[-1]["content"]) for asked, chat in made]
    assert set(scores) == {100.0}
    assert {tuple(message["role"] for message in chat) for _, chat in made} == {
        ("user", "assistant")
    }
    plain = chats.finetuning_chats(None, 60, seed=0)
    assert {JUDGE.trait_score("evil", q, chat[-1]["content"]) for q, chat in plain} == {0.0}


def test_the_corpus_is_the_same_in_another_process_and_needs_no_transformers() -> None:
    code = (
        "import hashlib, sys; from itertools import islice; from pvcore.world.chats import corpus;"
        "assert 'transformers' not in sys.modules;"
        "print(hashlib.sha256(repr(list(islice(corpus(7), 300))).encode()).hexdigest())"
    )
    runs = {
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
        ).stdout
        for seed in ("1", "2")
    }
    assert len(runs) == 1
    assert list(islice(chats.corpus(7), 3)) != list(islice(chats.corpus(8), 3))
