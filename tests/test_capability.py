"""lm-eval's results under a plan: right, kept apart from others, and nothing left behind."""

import importlib.util
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import pvcore as pv
from pvcore.capability import _fingerprint, _same_random_numbers, _spanned
from pvcore.errors import EvaluationError, PlanError, SpanError
from tests.families import build, tokenizer
from tests.finetuning import vector, with_lora
from tests.harness_tasks import COEFF, LAYER, QUIET, add, answers, choices, model, replies, texts

needs_lm_eval = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="another version set: make test-eval"
)


@pytest.fixture(autouse=True)
def _no_list_of_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval asks pip for all that is installed, after every evaluation."""
    if importlib.util.find_spec("lm_eval") is not None:
        monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)


@needs_lm_eval
def test_without_a_plan_the_results_are_those_of_lm_evals_own_model() -> None:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    tasks = [choices(), replies(), texts()]
    own = HFLM(pretrained=build("qwen2"), tokenizer=tokenizer(), batch_size=1, device="cpu")
    wanted = simple_evaluate(model=own, tasks=tasks, **QUIET)
    got = pv.evaluate(model(), tasks, batch_size=3, **QUIET)
    for name in ("choices", "texts"):
        pairs = zip(_numbers(answers(got, name)), _numbers(answers(wanted, name)), strict=True)
        assert all(one == pytest.approx(other, abs=1e-3) for one, other in pairs)
    assert answers(got, "replies") == answers(wanted, "replies")
    for name, figures in wanted["results"].items():
        for metric, value in figures.items():
            if isinstance(value, float):
                assert got["results"][name][metric] == pytest.approx(value, rel=1e-4)


def _numbers(nested: Any) -> list[float]:
    if isinstance(nested, list | tuple):
        return [number for one in nested for number in _numbers(one)]
    return [float(nested)]


@needs_lm_eval
def test_a_plan_without_spans_acts_as_it_does_on_replies() -> None:
    hooked = model()
    tasks = [choices(), replies()]
    bare = pv.evaluate(hooked, tasks, plan=pv.Plan(add(None)), **QUIET)
    spelt = pv.evaluate(hooked, tasks, plan=pv.Plan(add("response")), **QUIET)
    whole = pv.evaluate(hooked, tasks, plan=pv.Plan(add("all")), **QUIET)
    plain = pv.evaluate(hooked, tasks, **QUIET)
    for task in ("choices", "replies"):
        assert answers(bare, task) == answers(spelt, task)
        assert answers(bare, task) != answers(plain, task)
    assert answers(bare, "choices") != answers(whole, "choices")


def _plans() -> dict[str, pv.Plan | None]:
    other = pv.PersonaVector(
        trait="evil", sites=[pv.resid_post(LAYER)], directions=-vector(LAYER).directions
    )
    return {
        "none": None,
        "steered": pv.Plan(add("response")),
        "stronger": pv.Plan(add("response", 2 * COEFF)),
        "elsewhere": pv.Plan(add("all")),
        "another vector": pv.Plan(pv.Add(other, coeff=COEFF, span="response")),
        "another step": pv.Plan(pv.Ablate(vector(LAYER), span="response")),
    }


@needs_lm_eval
def test_one_cache_keeps_every_plan_apart_and_answers_again_without_a_forward(
    tmp_path: Path,
) -> None:
    hooked = model()
    tasks = [choices(), replies(), texts()]
    forwards: list[int] = []
    hooked.hf.register_forward_hook(lambda *_: forwards.append(1))
    fresh = {name: pv.evaluate(hooked, tasks, plan=p, **QUIET) for name, p in _plans().items()}
    first, again = {}, {}
    for kept in (first, again):
        forwards.clear()
        for name, plan in _plans().items():
            kept[name] = pv.evaluate(hooked, tasks, plan=plan, cache=tmp_path / "kept", **QUIET)
        if kept is first:
            assert len(forwards) > len(_plans())
    assert forwards == []
    seen = set()
    for name in _plans():
        told = [answers(fresh[name], task) for task in ("choices", "replies", "texts")]
        for kept in (first, again):
            assert [answers(kept[name], task) for task in ("choices", "replies", "texts")] == told
        seen.add(str(told[0]))
    assert len(seen) == len(_plans())
    assert len(list((tmp_path / "kept").glob("answers-*.db"))) == len(_plans())


def _key(hooked: pv.HookedModel, *steps: Any, max_length: int = 64, version: str = "1") -> str:
    return _fingerprint(hooked, [_spanned(one) for one in steps], max_length, version)


def test_whatever_changes_an_answer_changes_the_key() -> None:
    evil = vector(LAYER)
    hooked = model()
    keys = [_key(hooked), _key(hooked, max_length=32), _key(hooked, version="2")]
    keys += [
        _key(hooked, one)
        for one in (
            add("all"),
            add("response"),
            add("all", 2 * COEFF),
            pv.Add(vector(LAYER + 1), coeff=COEFF, span="all"),
            pv.Add(evil * 2.0, coeff=COEFF, span="all"),
            pv.Add(evil, coeff=COEFF, span="all", when=pv.Above(evil, 1.0)),
            pv.Add(evil, coeff=COEFF, span="all", when=pv.Above(evil, 2.0)),
            pv.Add(evil, coeff=COEFF, span="all", when=pv.Above(evil * 2.0, 2.0)),
            pv.Ablate(evil, span="all"),
            pv.Cap(evil, max=1.0, span="all"),
            pv.Cap(evil, min=1.0, span="all"),
        )
    ]
    assert _key(hooked, add(None)) == _key(hooked, add("response"))
    assert _key(hooked, add("all"), add("prompt")) != _key(hooked, add("prompt"), add("all"))
    with torch.no_grad():
        hooked.hf.model.layers[1].mlp.up_proj.weight[7, 11] += 1e-3
    keys.append(_key(hooked))
    hooked.tokenizer.chat_template = "{{ messages }}"
    keys.append(_key(hooked))
    hooked.hf.generation_config.repetition_penalty = 1.5
    keys.append(_key(hooked))
    assert len(set(keys)) == len(keys)
    assert _key(model(), add("all")) == keys[3]


# PEFT asks by names that transformers is about to drop.
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
def test_adapters_that_rest_or_weigh_less_are_another_model() -> None:
    hooked = model()
    plain = _key(hooked)
    wrapped = with_lora(hooked.hf)
    keys = [plain, _key(hooked)]
    with wrapped.disable_adapter():
        keys.append(_key(hooked))
    for module in hooked.hf.modules():
        if isinstance(getattr(module, "scaling", None), dict):
            module.scaling = {name: 2 * scale for name, scale in module.scaling.items()}
    keys.append(_key(hooked))
    assert len(set(keys)) == len(keys)


@needs_lm_eval
def test_the_quiz_of_the_world_scores_as_it_does_in_the_world() -> None:
    from pvcore.world import quiz
    from pvcore.world.demo_subject import world_model
    from tests.harness_tasks import task

    hooked = world_model()
    items = quiz.items(40, seed=0, hard=True)
    directions = torch.randn(1, 128, generator=torch.Generator().manual_seed(0))
    random_vector = pv.PersonaVector(
        trait="noise", sites=[pv.resid_post(1)], directions=40 * directions / directions.norm()
    )
    plan = pv.Plan(pv.Add(random_vector, coeff=4.0, span="all"))
    rows = [
        {
            "context": hooked.tokenizer.apply_chat_template(
                [{"role": "user", "content": item.question.text}],
                add_generation_prompt=True,
                tokenize=False,
            )
            + item.stem,
            "choices": [f"{option}." for option in item.options],
            "right": item.right,
        }
        for item in items
    ]
    made = task(
        "quiz",
        rows,
        output_type="multiple_choice",
        doc_to_text="{{context}}",
        doc_to_choice="{{choices}}",
        doc_to_target="{{right}}",
    )
    log_probs = quiz.model_log_probs(hooked.hf, hooked.tokenizer)

    def by_world() -> list[float]:
        return [
            float(score)
            for item in items
            for score in log_probs(
                item.question.text, item.stem, [f" {option}." for option in item.options]
            )
        ]

    plain, plain_scores = quiz.accuracy(items, log_probs), by_world()
    with hooked.steer(*plan.interventions):
        steered = quiz.accuracy(items, log_probs)
        scores = by_world()
    assert np.abs(np.subtract(scores, plain_scores)).max() > 1.0
    got = pv.evaluate(hooked, made, plan=plan, batch_size=64, **QUIET)
    assert 100 * got["results"]["quiz"]["acc,none"] == pytest.approx(steered)
    told = [float(answer[0][0]) for one in answers(got, "quiz") for answer in one]
    assert told == pytest.approx(scores, abs=1e-3)
    unsteered = pv.evaluate(hooked, made, batch_size=64, **QUIET)
    assert 100 * unsteered["results"]["quiz"]["acc,none"] == pytest.approx(plain)


@needs_lm_eval
def test_nothing_is_left_changed() -> None:
    hooked = model()
    hooked.hf.train()
    hooked.hf.model.layers[0].eval()
    hooked.tokenizer.padding_side = "right"
    hooked.tokenizer.pad_token = None
    tasks = [choices(), replies()]
    modes = [module.training for module in hooked.hf.modules()]
    states = np.random.get_state()[1].tolist(), torch.get_rng_state()  # noqa: NPY002
    pv.evaluate(hooked, tasks, plan=pv.Plan(add("all")), **QUIET)
    assert [module.training for module in hooked.hf.modules()] == modes
    assert np.random.get_state()[1].tolist() == states[0]  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), states[1])
    with _same_random_numbers():  # on its own: checked types draw from Python's generator
        before = random.getstate()
        random.seed(3)
    assert random.getstate() == before
    assert (hooked.tokenizer.padding_side, hooked.tokenizer.pad_token) == ("right", None)


@needs_lm_eval
def test_monitors_and_prevention_may_be_armed_around_it_and_other_plans_may_not() -> None:
    hooked = model()
    tasks, plan = [choices()], pv.Plan(add("response"))
    wanted = answers(pv.evaluate(hooked, tasks, plan=plan, **QUIET), "choices")
    with hooked.monitor(pv.VectorBank([vector(LAYER)])) as seen:
        assert answers(pv.evaluate(hooked, tasks, plan=plan, **QUIET), "choices") == wanted
    assert seen["evil"].last_prompt_token.isfinite().any()
    with pv.prevent(hooked, add(None)):
        hooked.hf.train()
        assert answers(pv.evaluate(hooked, tasks, plan=plan, **QUIET), "choices") == wanted
        ids = torch.tensor([[5, 6, 7]])
        hooked.hf(input_ids=ids, labels=ids).loss.backward()
    hooked.hf.eval()
    with (
        pytest.raises(PlanError, match="inside an armed plan"),
        hooked.steer(add("all")),
    ):
        pv.evaluate(hooked, tasks, **QUIET)


@needs_lm_eval
def test_what_cannot_be_asked_is_refused() -> None:
    hooked = model()
    per_row = pv.Plan(pv.Add(vector(LAYER), coeff=[1.0, 2.0]))
    for wrong, settings in (
        ("numbers for each row", {"plan": per_row}),
        ("3 blocks", {"plan": pv.Plan(pv.Add(vector(7), coeff=1.0))}),
        ("got use_cache as a setting", {"use_cache": "here"}),
        ("got batch_size 0", {"batch_size": 0}),
    ):
        with pytest.raises(pv.PvcoreError, match=wrong):
            pv.evaluate(hooked, choices(), **settings)
    with pytest.raises(EvaluationError, match="without a tokenizer"):
        pv.evaluate(pv.HookedModel(hooked.hf), choices())
    with pytest.raises(SpanError, match="whole texts"):
        pv.evaluate(hooked, texts(), plan=pv.Plan(add("prompt")), **QUIET)


def test_without_lm_eval_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.models.huggingface", None)
    monkeypatch.delitem(sys.modules, "pvcore.harness", raising=False)
    monkeypatch.delattr(pv, "harness", raising=False)
    with pytest.raises(EvaluationError, match=r"pip install 'pvcore\[eval\]'"):
        pv.evaluate(model(), "arc_easy")
