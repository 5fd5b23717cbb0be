"""Monitor: transcripts agree with reads of single turns and with raw hooks, token by token."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import pvcore as pv
from pvcore import report
from pvcore.chat_view import chat_view
from pvcore.errors import ChatError, PlanError, StatisticsError
from pvcore.exports import write_jsonl, write_parquet
from tests.families import build, tokenizer
from tests.oracle import padded
from tests.subjects import point, prompts, subject, unit, vector, worst
from tests.test_alarms import crossings
from tests.test_conversations import CHAT
from tests.test_graph import GRAPH

SITES = (pv.resid_post(0), pv.resid_post(2))
BANK = pv.VectorBank([vector("evil", SITES, seed=1), vector("humor", SITES, seed=2)])
SHORT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Good day to you."}]
PROMPT = [{"role": "user", "content": "Well, is it 3 or is it 4?"}]
BOUND = 1e-5


def raw_scores(name: str, ids: Tensor) -> Tensor:
    """Float64 projections `[trait, site, token]` of one unpadded row, by raw hooks."""
    found = subject(name)
    _, tape = found.oracle.forward(*padded([ids], side="right"))
    residuals = tape.frames[0].residuals
    return torch.stack(
        [
            torch.stack([residuals[point(site)][0].double() @ unit(one, site) for site in SITES])
            for one in BANK
        ]
    )


@pytest.mark.parametrize("name", ["qwen2", "gpt2", "gemma2"])
def test_all_turns_of_a_conversation_are_read_in_one_forward(name: str) -> None:
    found = subject(name)
    forwards: list[int] = []
    handle = found.model.hf.get_input_embeddings().register_forward_hook(
        lambda *_: forwards.append(1)
    )
    read = pv.Monitor(found.model, BANK).read([CHAT, SHORT, CHAT[:2]])
    handle.remove()
    assert len(forwards) == 1
    assert [[reply.message for reply in one.replies] for one in read] == [[2, 6], [1], []]
    for one, chat in zip(read[:2], (CHAT, SHORT), strict=True):
        ids = found.model.tokenizer.apply_chat_template(chat, return_dict=False)
        scores = raw_scores(name, torch.tensor(ids))
        for reply in one.replies:
            text = chat[reply.message]["content"]
            assert "".join(reply.tokens) == text
            before = found.model.tokenizer.apply_chat_template(
                chat[: reply.message], add_generation_prompt=True, return_dict=False
            )
            start, length = len(before), len(reply.tokens)
            assert worst(reply.projections, scores[..., start : start + length]) < BOUND
            assert worst(reply.before, scores[..., start - 1]) < BOUND
    drift = read[0].drift("humor")
    assert drift.shape == (2, 2)
    single = found.model.read([CHAT[:3]], sites=SITES, span="response")
    for place, site in enumerate(SITES):
        wanted = single[site][0].double() @ unit(BANK["humor"], site)
        assert abs(float(drift[0, place] - wanted)) < BOUND
    assert worst(drift[0], drift[1]) > 1e-3


@pytest.mark.parametrize("engine", ["eager", GRAPH])
def test_a_generated_reply_is_the_same_when_it_is_read_again(engine: Any) -> None:
    model = subject("qwen2").model
    settings = {"max_new_tokens": 6, "do_sample": False}
    free = model.generate_ids([CHAT[:4], PROMPT], **settings)
    end = int(free[1][3])
    settings |= {"eos_token_id": end, "pad_token_id": 0}
    made = pv.Monitor(model, BANK, engine=engine).generate([CHAT[:4], PROMPT], **settings)
    ids = model.generate_ids([CHAT[:4], PROMPT], **settings)
    assert len(ids[0]) != len(ids[1])
    for one, row, chat in zip(made, ids, (CHAT[:4], PROMPT), strict=True):
        prompt = model.tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_dict=False
        )
        scores = raw_scores("qwen2", torch.cat([torch.tensor(prompt), row]))
        reply = one.replies[-1]
        known = reply.projections[..., :-1]
        start = len(prompt)
        assert worst(known, scores[..., start : start + known.shape[-1]]) < BOUND
        assert worst(reply.before, scores[..., start - 1]) < BOUND
        assert one.messages[-1] == {"role": "assistant", "content": "".join(reply.tokens)}
        assert len(reply.tokens) == reply.projections.shape[-1]
        assert reply.projections[..., -1].isnan().all()
    (earlier,) = pv.Monitor(model, BANK).read([CHAT[:3]])
    assert worst(made[0].replies[0].projections, earlier.replies[0].projections) < BOUND
    assert len(made[0].replies) == 2


def test_an_end_token_is_not_part_of_the_text_and_all_of_the_text_is_known() -> None:
    model = subject("qwen2").model
    end = model.tokenizer.convert_tokens_to_ids("<|im_end|>")
    ids = model.tokenizer.apply_chat_template(PROMPT, add_generation_prompt=True, return_dict=False)

    def ending(input_ids: Tensor, scores: Tensor) -> Tensor:
        if input_ids.shape[1] == len(ids) + 3:
            scores = scores.clone()
            scores[:, end] = 1e9
        return scores

    (one,) = pv.Monitor(model, BANK).generate(
        [PROMPT], max_new_tokens=9, do_sample=False, eos_token_id=end, logits_processor=[ending]
    )
    assert len(one.replies[0].tokens) == 3
    assert not one.replies[0].projections.isnan().any()
    assert "im_end" not in str(one.messages[-1]["content"])


def test_an_empty_reply_is_a_reply_of_which_only_the_prompt_is_known(tmp_path: Path) -> None:
    model = subject("qwen2").model
    end = int(model.generate_ids([PROMPT], max_new_tokens=1, do_sample=False)[0])
    token = model.tokenizer.convert_ids_to_tokens(end)
    silent = tokenizer()
    silent.add_special_tokens({"additional_special_tokens": [token]})
    quiet = pv.HookedModel(model.hf, silent, model_id=model.model_id)
    (one,) = pv.Monitor(quiet, BANK).generate(
        [PROMPT], max_new_tokens=4, do_sample=False, eos_token_id=end
    )
    assert (one.replies[0].tokens, one.messages[-1]["content"]) == ((), "")
    assert not one.replies[0].before.isnan().any()
    assert all(math.isnan(summary.mean) for summary in one.summaries())
    write_jsonl([one], tmp_path / "seen.jsonl")
    write_parquet([one], tmp_path / "seen.parquet")
    assert "<svg" not in report.render(chat_view([one]))


def test_summaries_tell_mean_highest_last_and_first_alarm() -> None:
    model = subject("qwen2").model
    settings = {"max_new_tokens": 8, "do_sample": False}
    (plain,) = pv.Monitor(model, BANK).generate([PROMPT], **settings)
    level = float(plain.replies[0].projections[0, 1, 3]) - 1e-3
    monitor = pv.Monitor(model, BANK, alarms={"evil": {2: level}})
    (one,) = monitor.generate([PROMPT], **settings)
    values = one.replies[0].projections[0, 1, :7].tolist()
    course = [float(one.replies[0].before[0, 1]), *values]
    first = next(step for step, value in enumerate(course) if value > level)
    (summary,) = [s for s in one.summaries() if (s.trait, s.site) == ("evil", SITES[1])]
    assert summary.mean == pytest.approx(sum(values) / 7, abs=1e-6)
    assert summary.max == pytest.approx(max(values), abs=1e-6)
    assert summary.last == pytest.approx(values[-1], abs=1e-6)
    assert summary.first_alarm == first == one.alarms[0].step
    assert sum(s.first_alarm is None for s in one.summaries()) == 3
    steps = list(monitor.stream([PROMPT], **settings))
    told = [replace(alarm, message=1) for step in steps for alarm in step.alarms]
    assert told == list(one.alarms)


def courses(chat: list[dict[str, str]]) -> dict[int, Tensor]:
    """By reply, float64 projections `[trait, site, step]`: before it, then at its tokens."""
    template = subject("qwen2").model.tokenizer.apply_chat_template
    scores = raw_scores("qwen2", torch.tensor(template(chat, return_dict=False)))
    found = {}
    for place, message in enumerate(chat):
        if message["role"] == "assistant" and message["content"]:
            start = len(template(chat[:place], add_generation_prompt=True, return_dict=False))
            found[place] = scores[..., start - 1 : start + len(message["content"])]
    return found


def test_alarms_sound_in_every_reply_that_is_read(tmp_path: Path) -> None:
    model = subject("qwen2").model
    given = courses(CHAT)
    spread = torch.cat(list(given.values()), dim=-1)[0, 1].sort().values.tolist()
    # Between two values, so that rounding cannot decide.
    high = (spread[-5] + spread[-6]) / 2
    low = (spread[4] + spread[5]) / 2
    rules = {"evil": {2: pv.Threshold(high, low)}}
    _, one = pv.Monitor(model, BANK, alarms=rules).read([SHORT[:1], CHAT])
    wanted = [
        (message, step)
        for message, course in given.items()
        for step in crossings(course[0, 1].tolist(), high, low)
    ]
    assert [(alarm.message, alarm.step) for alarm in one.alarms] == wanted
    assert {message for message, _ in wanted} == {2, 6}
    for alarm in one.alarms:
        assert (alarm.trait, alarm.site) == ("evil", SITES[1])
        assert abs(alarm.value - float(given[alarm.message][0, 1, alarm.step])) < BOUND
    (summary,) = [s for s in one.summaries() if s.first_alarm is not None]
    assert (summary.alarm_message, summary.first_alarm) == wanted[0]
    (plain,) = pv.Monitor(model, BANK).read([CHAT])
    assert plain.alarms == ()
    page = report.render(chat_view([one], site=2, levels={"evil": high}))
    assert page.count('class="bell"') == len(wanted)
    write_jsonl([plain, one], tmp_path / "seen.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "seen.jsonl").read_text().split("\n")[:-1]]
    assert [(a["message"], a["step"]) for a in lines[1]["alarms"]] == wanted
    assert "chat" not in lines[1]["alarms"][0]


def test_alarms_of_a_reply_just_made_come_after_those_of_the_replies_before_it() -> None:
    model = subject("qwen2").model
    settings = {"max_new_tokens": 8, "do_sample": False}
    (free,) = pv.Monitor(model, BANK).generate([CHAT[:4]], **settings)
    values = torch.cat([one.projections[1, 0] for one in free.replies])
    level = float(values[~values.isnan()].median()) + 1e-4
    monitor = pv.Monitor(model, BANK, alarms={"humor": {0: level}})
    (made,) = monitor.generate([CHAT[:4]], **settings)
    last = made.replies[-1]
    course = [float(last.before[1, 0]), *last.projections[1, 0].tolist()]
    (earlier,) = monitor.read([CHAT[:3]])
    wanted = [
        *((2, alarm.step) for alarm in earlier.alarms),
        *((4, step) for step in crossings(course, level, level)),
    ]
    assert [(alarm.message, alarm.step) for alarm in made.alarms] == wanted
    assert {message for message, _ in wanted} == {2, 4}


def neutral_chats(count: int) -> list[list[dict[str, str]]]:
    words = ["yes", "no", "well", "so", "hm", "ok"]
    return [
        [
            {"role": "user", "content": f"Is it {k}?"},
            {"role": "assistant", "content": " ".join(words[(k * j + k) % 6] for j in range(1, 5))},
        ]
        for k in range(count)
    ]


def test_calibrated_alarms_are_percentiles_of_the_highest_tokens() -> None:
    monitor = pv.Monitor(subject("qwen2").model, BANK)
    chats = neutral_chats(60)
    highest = torch.stack(
        [
            torch.maximum(one.replies[0].projections.amax(-1), one.replies[0].before)
            for one in monitor.read(chats)
        ]
    )
    found = monitor.alarm_levels(chats, percentile=80)
    assert len(found.levels) == 4
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    for level in found.levels:
        k, place = list(BANK.traits).index(level.trait), SITES.index(level.site)
        values = highest[:, k, place].double()
        assert level.threshold.high == pytest.approx(
            float(torch.quantile(values[order[::2]], 0.8)), abs=1e-6
        )
        hits = int((values[order[1::2]] > level.threshold.high).sum())
        assert level.false_positive_rate == hits / 30
        assert level.interval.low <= level.false_positive_rate <= level.interval.high
    armed = pv.Monitor(monitor.model, BANK, alarms=found.at(2).alarms)
    (one,) = armed.generate([PROMPT], max_new_tokens=4, do_sample=False)
    assert {alarm.site for alarm in one.alarms} <= {SITES[1]}
    with pytest.raises(StatisticsError, match="19 neutral values"):
        monitor.alarm_levels(chats[:19])


def test_what_a_monitor_cannot_do_is_refused_when_it_is_made() -> None:
    model = subject("qwen2").model
    with pytest.raises(ChatError, match="no tokenizer"):
        pv.Monitor(pv.HookedModel(build("qwen2")), BANK)
    with pytest.raises(PlanError, match="an alarm for envy"):
        pv.Monitor(model, BANK, alarms={"envy": 1.0})
    wide = pv.PersonaVector(
        trait="wide", sites=[SITES[0]], directions=torch.ones(1, 65), model_id=""
    )
    with pytest.raises(PlanError, match="width 65"):
        pv.Monitor(model, pv.VectorBank([wide]))
    with pytest.raises(ChatError, match=r"chat 1: .* token ids"):
        pv.Monitor(model, BANK).read([CHAT, *prompts([4])])
