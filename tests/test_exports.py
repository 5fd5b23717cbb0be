"""Exports: files that other tools read back to the same numbers, whole or not at all."""

import json
import math
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import pyarrow.parquet as parquet
import pytest
import torch
from opentelemetry.sdk.trace import TracerProvider

import pvcore as pv
from pvcore.errors import ExportError
from pvcore.exports import attributes, write_jsonl, write_parquet
from pvcore.transcripts import Reply, Transcript

SITES = (pv.resid_post(0), pv.resid_post(19))
NAN = float("nan")
ALARM = pv.Alarm(trait="evil", site=SITES[1], chat=0, step=1, value=4.5, threshold=4.0)


def reply(message: int, tokens: tuple[str, ...], seed: int) -> Reply:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(2, 2, len(tokens) + 1, generator=generator)
    return Reply(message=message, tokens=tokens, before=values[..., 0], projections=values[..., 1:])


def transcript(*, cut: bool = False, seed: int = 0) -> Transcript:
    last = reply(3, ("Wel", "l", " é\n"), seed + 1)
    if cut:
        last.projections[..., -1] = NAN
    return Transcript(
        messages=(
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": "Yes."},
            {"role": "user", "content": "<b>why?</b>"},
            {"role": "assistant", "content": "Well é\n"},
        ),
        replies=(reply(1, ("Yes", "."), seed), last),
        traits=("evil", "dry humor"),
        sites=SITES,
        alarms=(ALARM,),
    )


def test_lines_of_json_hold_every_number(tmp_path: Path) -> None:
    every = [transcript(cut=True), transcript(seed=5)]
    write_jsonl(every, tmp_path / "new" / "seen.jsonl")
    lines = (tmp_path / "new" / "seen.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 2
    for number, (line, one) in enumerate(zip(lines, every, strict=True)):
        read = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
        assert (read["conversation"], read["format"]) == (number, 1)
        assert read["messages"] == [dict(message) for message in one.messages]
        for got, wanted in zip(read["replies"], one.replies, strict=True):
            assert tuple(got["tokens"]) == wanted.tokens
            for k, trait in enumerate(one.traits):
                for place, site in enumerate(SITES):
                    name = f"{trait}/{site}"
                    values = [NAN if v is None else v for v in got["projections"][name]]
                    assert torch.equal(
                        torch.tensor(values).nan_to_num(9.0),
                        wanted.projections[k, place].nan_to_num(9.0),
                    )
                    assert got["before"][name] == float(wanted.before[k, place])
        assert read["alarms"] == [
            {
                "trait": "evil",
                "site": "resid_post.19",
                "chat": 0,
                "step": 1,
                "value": 4.5,
                "threshold": 4.0,
            }
        ]
        assert [s["first_alarm"] for s in read["summaries"]] == [None, 1, None, None]


def test_a_parquet_table_has_a_row_for_every_token(tmp_path: Path) -> None:
    every = [transcript(cut=True), transcript(seed=5)]
    write_parquet(every, tmp_path / "seen.parquet")
    table = parquet.read_table(tmp_path / "seen.parquet")
    assert table.column_names[:4] == ["conversation", "message", "token", "text"]
    assert set(table.column_names[4:]) == {
        f"{trait}/{site}" for trait in ("evil", "dry humor") for site in SITES
    }
    rows = table.to_pylist()
    assert len(rows) == 2 * (2 + 3 + 2)
    for number, one in enumerate(every):
        for reply_ in one.replies:
            own = [r for r in rows if (r["conversation"], r["message"]) == (number, reply_.message)]
            assert [row["token"] for row in own] == list(range(-1, len(reply_.tokens)))
            assert [row["text"] for row in own] == ["", *reply_.tokens]
            got = [row["dry humor/resid_post.19"] for row in own]
            wanted = [float(reply_.before[1, 1]), *reply_.projections[1, 1].tolist()]
            assert got == [None if math.isnan(value) else value for value in wanted]


def test_attributes_are_plain_values_under_dotted_names() -> None:
    one = transcript(cut=True)
    found = attributes(one, model="tiny/qwen2")
    assert found["gen_ai.request.model"] == "tiny/qwen2"
    assert found["pvcore.alarms"] == 1
    stem = "pvcore.projection.dry_humor.resid_post_19"
    every = torch.cat([reply.projections for reply in one.replies], dim=-1)[1, 1]
    assert found[f"{stem}.max"] == pytest.approx(float(every[~every.isnan()].max()))
    assert found["pvcore.projection.evil.resid_post_19.first_alarm"] == 1
    assert f"{stem}.first_alarm" not in found
    assert all(isinstance(value, str | int | float) and value == value for value in found.values())
    assert attributes(ALARM)["pvcore.alarm.site"] == "resid_post.19"


def test_the_names_are_those_opentelemetry_takes() -> None:
    """Its SDK drops, with a warning, what it cannot hold."""
    span = TracerProvider().get_tracer("test").start_span("chat")
    span.set_attributes(attributes(transcript()))
    span.add_event("alarm", attributes(ALARM))
    assert dict(span.attributes) == attributes(transcript())
    assert dict(span.events[0].attributes) == attributes(ALARM)


def test_an_alarm_of_what_overflowed_has_no_value_and_no_null() -> None:
    found = attributes(replace(ALARM, value=math.inf, message=3))
    assert "pvcore.alarm.value" not in found
    assert (found["pvcore.alarm.threshold"], found["pvcore.alarm.message"]) == (4.0, 3)
    assert "pvcore.alarm.chat" not in found
    assert None not in found.values()


@pytest.mark.parametrize("stray", [datetime(2024, 1, 1), math.nan, {"when": {1, 2}}])
def test_a_field_that_json_cannot_hold_is_named(tmp_path: Path, stray: object) -> None:
    one = transcript()
    first = {**one.messages[0], "timestamp": stray}
    dated = replace(one, messages=(first, *one.messages[1:]))
    with pytest.raises(ExportError, match=r"conversation 1: .* field 'timestamp' JSON cannot hold"):
        write_jsonl([one, dated], tmp_path / "seen.jsonl")
    assert not (tmp_path / "seen.jsonl").exists()
    kept = replace(one, messages=({**one.messages[0], "turn": [1, None]}, *one.messages[1:]))
    write_jsonl([kept], tmp_path / "seen.jsonl")
    assert json.loads((tmp_path / "seen.jsonl").read_text())["messages"][0]["turn"] == [1, None]


def test_half_a_character_is_written_escaped(tmp_path: Path) -> None:
    one = transcript()
    cut = replace(one, replies=(reply(1, ("\ud83d", "é"), 0),))
    write_jsonl([cut], tmp_path / "seen.jsonl")
    read = json.loads((tmp_path / "seen.jsonl").read_text(encoding="utf-8"))
    assert read["replies"][0]["tokens"] == ["\ud83d", "é"]


def test_what_cannot_be_written_is_one_error_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    for write in (write_jsonl, write_parquet):
        with pytest.raises(ExportError, match="cannot be written"):
            write([transcript()], tmp_path / "taken")
    with pytest.raises(ExportError, match="no conversations"):
        write_parquet([], tmp_path / "none.parquet")
    other = Transcript(messages=(), replies=(), traits=("evil",), sites=SITES)
    with pytest.raises(ExportError, match="different traits or sites"):
        write_parquet([transcript(), other], tmp_path / "none.parquet")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


@pytest.mark.parametrize("twins", [("evil", "Evil"), ("dry_humor", "dry humor"), ("a-b", "a.b")])
def test_traits_whose_attributes_would_overwrite_each_other_are_refused(
    twins: tuple[str, str],
) -> None:
    one = transcript()
    apart = attributes(replace(one, traits=("evil", "evils")))
    assert sum(name.endswith(".mean") for name in apart) == 4
    with pytest.raises(ExportError, match="whose attributes would both be named") as refusal:
        attributes(replace(one, traits=twins, alarms=()))
    assert all(repr(trait) in str(refusal.value) for trait in twins)
