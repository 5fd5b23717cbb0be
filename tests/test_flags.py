"""Flags: data sets, the highest rows, thresholds, judges, cleaned copies."""

from __future__ import annotations

import csv
import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import pvcore as pv
from pvcore import flag_lines
from pvcore.errors import FlagError
from tests import flag_data
from tests.families import tokenizer
from tests.flag_data import WRITERS, as_pair, bank, chats, model, table, write_jsonl

ENUMERATED = list(enumerate(chats(10)))
COLUMN = "evil/resid_post.2/difference"


@pytest.fixture(scope="module")
def hooked() -> pv.HookedModel:
    return model()


@pytest.fixture(scope="module")
def flags(hooked: pv.HookedModel, tmp_path_factory: pytest.TempPathFactory) -> pv.Flags:
    folder = tmp_path_factory.mktemp("flags")
    rows = [flag_data.as_messages(chat) for chat in chats(50)]
    write_jsonl(folder / "a.jsonl", [{"bad": 1}, *rows[:30]])
    write_jsonl(folder / "b.jsonl", [*rows[30:], {"bad": 2}])
    return pv.flag(hooked, str(folder / "*.jsonl"), bank(), out=folder / "out", shard_rows=7)


def test_data_sets_are_counted_and_averaged(flags: pv.Flags) -> None:
    rows = list(table(flags).values())
    for name, count in zip(flags.datasets, (30, 20), strict=True):
        one = flags.datasets[name]
        mine = [row for row in rows if row["source"] == name]
        assert (one.scored, one.rejected) == (count, 1)
        assert one.prompt_tokens == sum(row["n_prompt_tokens"] for row in mine)
        assert one.response_tokens == sum(row["n_response_tokens"] for row in mine)
        for column in flags.columns:
            mean = np.mean([row[column] for row in mine], dtype=np.float64)
            assert one[column].mean == pytest.approx(mean, abs=1e-6)
    means = [one[COLUMN].mean for one in flags.datasets.values()]
    assert means[0] != means[1]
    with pytest.raises(FlagError, match="got column 'evil'"):
        one["evil"]


@pytest.mark.parametrize("lowest", [False, True])
@pytest.mark.parametrize("score", ["difference", "response_mean"])
def test_the_top_is_that_of_all_rows_sorted(flags: pv.Flags, lowest: bool, score: str) -> None:
    column = f"evil/resid_post.2/{score}"
    rows = sorted(table(flags).values(), key=lambda row: row[column], reverse=not lowest)
    for n in (1, 9, 50, 99):
        found = flags.top("evil", n, score=score, lowest=lowest)
        assert [(one.source, one.row) for one in found] == [
            (row["source"], row["row"]) for row in rows[:n]
        ]
    assert found[0].score == rows[0][column]
    assert found[0].scores["humor/resid_post.0/difference"] == pytest.approx(
        rows[0]["humor/resid_post.0/difference"]
    )


def test_the_top_of_one_source_and_site(flags: pv.Flags) -> None:
    name = list(flags.datasets)[1]
    site = pv.resid_post(0)
    column = "evil/resid_post.0/difference"
    mine = [row for row in table(flags).values() if row["source"] == name]
    wanted = sorted((row[column] for row in mine), reverse=True)
    found = flags.top("evil", 5, source=name, site=site)
    assert [one.score for one in found] == wanted[:5]
    assert flags.top("evil", 0) == []
    with pytest.raises(FlagError, match="got -1 rows to show"):
        flags.top("evil", -1)
    assert flags.site == pv.resid_post(2)


def test_the_top_of_a_rare_source_is_found_and_an_unknown_source_refused(
    flags: pv.Flags,
) -> None:
    name = list(flags.datasets)[1]
    mine = [row for row in table(flags).values() if row["source"] == name]
    wanted = sorted(mine, key=lambda row: -row[COLUMN])[:20]
    assert [one.row for one in flags.top("evil", 30, source=name)] == [row["row"] for row in wanted]
    for other in ("a.jsonl", Path(name).name, ""):
        with pytest.raises(FlagError, match=r"got source .*; this scan has '"):
            flags.top("evil", 0, source=other)


def test_no_rows_may_be_asked_for(flags: pv.Flags) -> None:
    assert flags.top("evil", 0) == flags.top("evil", 0, source=next(iter(flags.datasets))) == []


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"trait": "humour"}, "got trait humour; this scan has evil, humor"),
        ({"site": pv.resid_post(7)}, r"got site resid_post\.7"),
        ({"score": "mean"}, "got score mean"),
    ],
)
def test_what_was_not_scanned_is_refused(flags: pv.Flags, given: dict[str, Any], said: str) -> None:
    asked = {"trait": "evil", **given}
    for ask in (flags.top, flags.filter):
        with pytest.raises(FlagError, match=said):
            ask(asked["trait"], **{key: v for key, v in asked.items() if key != "trait"})


def test_text_comes_back_from_the_sources(flags: pv.Flags) -> None:
    rows = flags.top("evil", 6)
    texts = flags.conversations(rows)
    every = chats(50)
    first = next(iter(flags.datasets))
    for row, chat in zip(rows, texts, strict=True):
        assert chat == every[row.row - 1 if row.source == first else row.row + 30]
    alone = pv.Flags.load(flags.folder)
    assert alone.top("evil", 6) == rows
    with pytest.raises(FlagError, match="without its sources"):
        alone.conversations(rows)
    with pytest.raises(FlagError, match="got no conversation at row 0"):
        flags.conversations([replace(rows[0], row=0)])


def test_a_filter_flags_what_is_above_a_percentile_of_clean_data(
    flags: pv.Flags, hooked: pv.HookedModel, tmp_path: Path
) -> None:
    rows = [{"messages": chat} for chat in chats(40, first=100)]
    clean = pv.flag(hooked, rows, bank(), out=tmp_path / "clean", shard_rows=9)
    values = [row[COLUMN] for row in table(clean).values()]
    bound = float(np.percentile(values, 80))
    found = flags.filter("evil", percentile=80, clean=clean)
    wanted = {key for key, row in table(flags).items() if row[COLUMN] > bound}
    assert found.rules[0].threshold == pytest.approx(bound, abs=1e-6)
    assert {key for key in table(flags) if key in found} == wanted
    assert (found.n_flagged, found.scored) == (len(wanted), 50)
    assert 0 < len(wanted) < 50
    assert ("nowhere", 1) not in found
    assert 1 not in found


def test_a_threshold_may_be_given_or_calibrated(flags: pv.Flags, hooked: pv.HookedModel) -> None:
    values = sorted(row["evil/resid_post.2/response_mean"] for row in table(flags).values())
    evil = replace(
        bank()["evil"],
        calibration={"resid_post.2": {"response_mean": {"percentiles": {"95": values[-4]}}}},
    )
    calibrated = pv.VectorBank([evil, bank()["humor"]])
    loaded = pv.Flags.load(flags.folder, bank=calibrated)
    assert loaded.filter("evil", score="response_mean").n_flagged == 3
    assert loaded.filter("evil").rules == loaded.filter("evil", score="response_mean").rules
    assert flags.filter("evil", threshold=values[10], score="response_mean").n_flagged == 39
    with pytest.raises(FlagError, match=r"got no threshold for evil/resid_post\.2/difference"):
        loaded.filter("evil", score="difference")
    with pytest.raises(FlagError, match=r"got no threshold for evil/resid_post\.2/response_mean"):
        flags.filter("evil")
    for given, said in (
        ({"threshold": float("nan")}, "finite"),
        ({"percentile": 100}, "between 0 and 100"),
        ({"threshold": 1, "judge": {}}, "wanted both"),
        ({"threshold": 1, "combine": "some"}, "combine"),
    ):
        with pytest.raises(FlagError, match=said):
            flags.filter("evil", **given)  # type: ignore[arg-type]


def test_a_vector_calibrated_on_chats_needs_no_threshold(
    flags: pv.Flags, hooked: pv.HookedModel
) -> None:
    calibrated = pv.calibrate(hooked, bank(), chats(30)).vectors()
    loaded = pv.Flags.load(flags.folder, bank=calibrated)
    column = "evil/resid_post.2/response_mean"
    (rule,) = loaded.filter("evil").rules
    assert rule.column == column
    values = [row[column] for row in table(flags).values()]
    assert rule.threshold == pytest.approx(np.percentile(values[:30], 95), rel=1e-4)


def test_a_scan_is_read_with_the_bank_and_the_model_that_made_it(
    flags: pv.Flags, hooked: pv.HookedModel
) -> None:
    level = {"resid_post.2": {"response_mean": {"percentiles": {"95": 0.1}}}}
    other = replace(bank()["evil"], directions=bank()["humor"].directions, calibration=level)
    for given in (
        pv.VectorBank([other, bank()["humor"]]),
        bank("evil"),
        bank(sites=flag_data.SITES[:2]),
        pv.VectorBank(list(bank()), layers=[1]),
    ):
        with pytest.raises(FlagError, match="is not the vector that this scan was made with"):
            pv.Flags.load(flags.folder, bank=given)
    wider = pv.VectorBank([*bank(), *bank("apathy")][::-1])
    assert pv.Flags.load(flags.folder, bank=wider, model=model()).scored == 50
    for subject in (model(seed=1), pv.HookedModel(model().hf.double(), hooked.tokenizer)):
        with pytest.raises(FlagError, match=r"other than the one that scored, qwen2 in float32"):
            pv.Flags.load(flags.folder, model=subject)
    retold = pv.HookedModel(model().hf, tokenizer(template="{{ messages }}"), model_id="tiny/qwen2")
    with pytest.raises(FlagError, match="another tokenizer than the one"):
        pv.Flags.load(flags.folder, model=retold)


def test_a_judge_is_asked_too(flags: pv.Flags) -> None:
    rows = table(flags)
    order = sorted(rows, key=lambda key: -rows[key][COLUMN])
    high, bound = set(order[:12]), rows[order[12]][COLUMN]
    judged = {rows[key]["id"]: 90.0 if at % 2 else 10.0 for at, key in enumerate(order)}
    called = {key for key in rows if judged[rows[key]["id"]] > 50}
    silent = order[0], order[1], order[20], order[21]
    for key in silent[:2]:
        judged[rows[key]["id"]] = None  # type: ignore[assignment]
    for key in silent[2:]:
        del judged[rows[key]["id"]]
    for combine, wanted in (("all", high & called), ("any", high | called)):
        decided = (wanted - set(silent)) | {key for key in silent if key in high}
        found = flags.filter(
            "evil", threshold=bound, judge=judged, judge_threshold=50, combine=combine
        )
        assert {key for key in rows if key in found} == decided
        assert found.unjudged == 4


def test_a_judge_names_rows_by_number_too_and_nan_is_no_score(
    hooked: pv.HookedModel, tmp_path: Path
) -> None:
    rows = [{"id": 10 + at, "messages": chat} for at, chat in ENUMERATED]
    flags = pv.flag(hooked, rows, bank(), out=tmp_path / "out", shard_rows=4)
    judged = {10: 90.0, 11: 10.0, 12: float("nan")}
    found = flags.filter("evil", threshold=1e9, judge=judged, judge_threshold=50)
    assert [row for row in range(10) if ("rows", row) in found] == [0]
    assert found.unjudged == 8
    rows[9]["id"] = 10
    twice = pv.flag(hooked, rows, bank(), out=tmp_path / "twice", shard_rows=4)
    with pytest.raises(FlagError, match="id '10', which several rows have"):
        twice.filter("evil", threshold=0.0, judge=judged, judge_threshold=50)
    assert twice.filter("evil", threshold=0.0, judge={"11": 3}, judge_threshold=50).unjudged == 9


def test_a_judge_of_other_rows_is_refused_and_its_threshold_is_a_number(flags: pv.Flags) -> None:
    ids = [row["id"] for row in (*table(flags).values(), *flags.rejected())]
    assert len(ids) == 52
    judged = dict.fromkeys(ids, 90.0)
    ask: dict[str, Any] = {"threshold": 1e9, "judge_threshold": 50}
    assert flags.filter("evil", judge=judged, **ask).n_flagged == 50
    for other in ({"nope": 90.0}, {**judged, "nope": 1.0}):
        with pytest.raises(FlagError, match="for 1 ids that no row of this scan has, such as 'no"):
            flags.filter("evil", judge=other, **ask)
    for bound in (float("nan"), float("inf")):
        with pytest.raises(FlagError, match=r"judge_threshold (nan|inf); wanted a finite"):
            flags.filter("evil", judge=judged, **{**ask, "judge_threshold": bound})


def test_a_clean_scan_must_be_scored_alike(
    flags: pv.Flags, hooked: pv.HookedModel, tmp_path: Path
) -> None:
    rows = [{"messages": chat} for chat in chats(20, first=100)]
    other = pv.VectorBank([replace(bank()["evil"], directions=bank()["humor"].directions)])
    for name, subject, stacked, settings, said in (
        ("exact", hooked, bank(), {"difference": "exact", "max_new_tokens": 2}, "difference is"),
        ("vector", hooked, other, {}, "vector is"),
        ("sites", hooked, bank(sites=flag_data.SITES[:2]), {}, "without evil"),
        ("model", model(seed=1), bank(), {}, "model is"),
        ("turn", hooked, bank(), {"turn": "first"}, "turn is"),
    ):
        clean = pv.flag(subject, rows, stacked, out=tmp_path / name, **settings)  # type: ignore[arg-type]
        with pytest.raises(FlagError, match=f"got a clean scan .*{said}"):
            flags.filter("evil", clean=clean)
        if name == "exact":  # which changes no mean over a reply
            assert flags.filter("evil", clean=clean, score="response_mean").scored == 50
    alike = pv.flag(hooked, rows, bank(), out=tmp_path / "alike")
    assert flags.filter("evil", clean=alike).scored == 50
    few = pv.flag(hooked, rows[1:], bank(), out=tmp_path / "few")
    with pytest.raises(FlagError, match=r"in which 19 rows have .*; wanted 20 or more"):
        flags.filter("evil", clean=few)
    assert flags.filter("evil", clean=few, threshold=0.0).scored == 50


def test_a_model_of_which_a_mark_alone_was_trained_sets_no_threshold(
    flags: pv.Flags, tmp_path: Path
) -> None:
    rows = [{"messages": chat} for chat in chats(20, first=100)]
    other, mark = model(), tokenizer().convert_tokens_to_ids("<|im_start|>")
    with torch.no_grad():
        other.hf.get_input_embeddings().weight[mark, 1] += 50
    tuned = pv.flag(other, rows, bank(), out=tmp_path / "tuned")
    plain = pv.flag(model(), rows, bank(), out=tmp_path / "plain")
    probes = [one.manifest["asked"]["model"]["probe"] for one in (tuned, plain)]
    assert probes[0] == probes[1]  # which has no such mark
    means = [one.datasets["rows"]["evil/resid_post.2/response_mean"].mean for one in (tuned, plain)]
    assert abs(means[0] - means[1]) > 0.1
    with pytest.raises(FlagError, match="got a clean scan scored otherwise: its model is"):
        tuned.filter("evil", clean=plain, score="response_mean")
    with pytest.raises(FlagError, match="other than the one that scored, qwen2 in float32"):
        pv.Flags.load(tuned.folder, model=model(), bank=bank())
    assert pv.Flags.load(tuned.folder, model=other, bank=bank()).scored == 20


def test_a_clean_scan_may_have_other_sites_beside_the_one_that_counts(
    hooked: pv.HookedModel, tmp_path: Path
) -> None:
    rows = [{"messages": chat} for chat in chats(24, first=100)]
    two = [pv.resid_post(0), pv.resid_post(1)]
    clean = pv.flag(hooked, rows, bank(sites=two), out=tmp_path / "clean")
    whole = bank(sites=two)
    alone = pv.VectorBank([one.at([pv.resid_post(1)]) for one in whole])
    flags = pv.flag(hooked, rows, alone, out=tmp_path / "one")
    column = "evil/resid_post.1/difference"
    values = [row[column] for row in table(flags).values()]
    np.testing.assert_allclose(values, [row[column] for row in table(clean).values()], atol=1e-6)
    found = flags.filter("evil", clean=clean, percentile=80)
    assert found.rules[0].threshold == pytest.approx(np.percentile(values, 80), abs=1e-6)
    assert 0 < found.n_flagged < 24
    assert clean.filter("evil", clean=flags, site=pv.resid_post(1)).n_flagged > 0
    swapped = bank(sites=two)["humor"].at([pv.resid_post(1)])
    other = replace(alone["evil"], directions=swapped.directions)
    changed = pv.flag(hooked, rows, pv.VectorBank([other]), out=tmp_path / "other")
    with pytest.raises(FlagError, match="scored otherwise: its vector is"):
        changed.filter("evil", clean=clean)


def test_own_replies_of_clean_data_are_made_as_those_of_the_data(
    hooked: pv.HookedModel, tmp_path: Path
) -> None:
    rows = [{"messages": chat} for chat in chats(20)]
    own = [{"source": "rows", "row": at, "reply": f"own {at}"} for at in range(20)]
    file = write_jsonl(tmp_path / "own.jsonl", own)
    bent = model()
    bent.hf.generation_config.repetition_penalty = 1.7

    def scan(name: str, subject: pv.HookedModel = hooked, **settings: Any) -> pv.Flags:
        settings = {"difference": "exact", **settings}
        return pv.flag(subject, rows, bank("evil"), out=tmp_path / name, **settings)

    flags = scan("flags", max_new_tokens=3)
    subset = scan("subset", max_new_tokens=3, difference="subset", share=0.99, seed=1)
    assert flags.filter("evil", clean=subset).scored == 20
    for clean, said in (
        (scan("shorter", max_new_tokens=2), "its replies is 2, and this scan's 3"),
        (scan("file", replies=file), "its replies is 'from a file', and this scan's 3"),
        (scan("bent", bent, max_new_tokens=3), "its generation is"),
    ):
        with pytest.raises(FlagError, match=f"scored otherwise: {said}"):
            flags.filter("evil", clean=clean)
        assert flags.filter("evil", clean=clean, score="response_mean").scored == 20


@pytest.mark.parametrize("loss", ["gone", "cut", "rejected gone"])
def test_a_lost_shard_is_named(hooked: pv.HookedModel, tmp_path: Path, loss: str) -> None:
    rows = [{"messages": chat} for chat in chats(12)]
    rows[5] = {"messages": []}
    pv.flag(hooked, rows, bank(), out=tmp_path, shard_rows=4)
    assert pv.Flags.load(tmp_path).scored == 11
    part = tmp_path / "scores/part-000001.parquet"
    if loss == "cut":
        part.write_bytes(part.read_bytes()[:-9])
    else:
        (part if loss == "gone" else tmp_path / "rejected" / part.name).unlink()
    with pytest.raises(FlagError, match=r"part-000001\.parquet missing, cut short"):
        pv.Flags.load(tmp_path)
    assert pv.flag(hooked, rows, bank(), out=tmp_path, shard_rows=4).scored == 11


def test_two_filters_together_flag_what_either_does(flags: pv.Flags) -> None:
    one, other = flags.filter("evil", threshold=0.2), flags.filter("humor", threshold=0.2)
    both = one | other
    assert {key for key in table(flags) if key in both} == {
        key for key in table(flags) if key in one or key in other
    }
    assert both.n_flagged > max(one.n_flagged, other.n_flagged)
    with pytest.raises(FlagError, match="two scans"):
        one | replace(other, flags=pv.Flags.load(flags.folder))


def test_a_subset_cannot_be_filtered_by_what_it_lacks(
    hooked: pv.HookedModel, tmp_path: Path
) -> None:
    rows = [{"messages": chat} for chat in chats(12)]
    some = pv.flag(
        hooked, rows, bank(), out=tmp_path, difference="subset", share=0.3, max_new_tokens=2
    )
    with pytest.raises(FlagError, match="only a subset"):
        some.filter("evil", threshold=0.0)
    assert some.filter("evil", threshold=-1e9, score="response_mean").n_flagged == 12


@pytest.mark.parametrize("ending", [*WRITERS, ".csv.gz"])
def test_a_cleaned_copy_lacks_the_flagged_rows_and_nothing_else(
    hooked: pv.HookedModel, tmp_path: Path, ending: str
) -> None:
    rows: list[dict[str, Any]] = [
        {**as_pair(chat), "note": f'"{at}", é\n'} for at, chat in enumerate(chats(20))
    ]
    rows[4]["response"] = ""
    path = tmp_path / f"d{ending}"
    if ending == ".csv.gz":
        plain = flag_data.write_csv(tmp_path / "plain.csv", rows)
        path.write_bytes(gzip.compress(plain.read_bytes()))
    else:
        WRITERS[ending](path, rows)
    one = bank("evil", sites=[pv.resid_post(1)])
    flags = pv.flag(hooked, path, one, out=tmp_path / "out", shard_rows=6)
    flagged = {row.row for row in flags.top("evil", 6)}
    bound = flags.top("evil", 7)[-1].score
    found = flags.filter("evil", threshold=bound)
    for keep in (False, True):
        (made,) = found.write_clean(tmp_path / f"clean{keep}", keep_rejected=keep).values()
        left_out = flagged if keep else flagged | {4}
        wanted = [row for at, row in enumerate(rows) if at not in left_out]
        assert read_back(made.path) == wanted
        counts = (made.kept, made.flagged, made.rejected)
        assert counts == ((14, 6, 0) if keep else (13, 6, 1))
        assert made.path.name == path.name


@pytest.mark.parametrize("broken", ["\r", "\r\n", "\n"])
def test_a_cleaned_csv_keeps_every_line_break_in_a_cell(
    hooked: pv.HookedModel, tmp_path: Path, broken: str
) -> None:
    rows = [{**as_pair(chat), "note": f"a{broken}b" if at % 2 else "c"} for at, chat in ENUMERATED]
    rows[3]["response"] = f"one{broken}two"
    path = tmp_path / "d.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), quoting=csv.QUOTE_ALL)
        writer.writeheader()
        writer.writerows(rows)
    flags = pv.flag(hooked, path, bank("evil"), out=tmp_path / "out")
    found = flags.filter("evil", threshold=flags.top("evil", 4)[-1].score)
    (made,) = found.write_clean(tmp_path / "clean").values()
    with made.path.open(newline="") as file:
        kept = list(csv.DictReader(file))
    assert kept == [row for at, row in enumerate(rows) if (path.as_posix(), at) not in found]
    again = pv.flag(hooked, made.path, bank("evil"), out=tmp_path / "again")
    assert (again.scored, again.n_rejected) == (len(kept), 0)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_what_is_kept_of_a_text_file_keeps_its_bytes(
    hooked: pv.HookedModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    ending: str,
    packed: bool,
) -> None:
    monkeypatch.setattr(flag_lines, "LONGEST_LINE", 300)
    if ending == "csv":
        head = [b'\xef\xbb\xbf"prompt",response,"a\nnote"\r\n']
        rows = [b'"Is it %d?", "yes",\r\n' % at for at in range(6)]
        rows[1:1] = [b"caf\xe9\n"]
        rows[4:4] = [b'"a ""misfit""\r",b,c,d\r']
        rows += [b"last,one,"]
        bad, content = {1, 4}, b"\r\n\n".join([*head, *rows])
    else:
        head, rows = [], [json.dumps(as_pair(chat)).encode() + b" \r\n" for chat in chats(6)]
        rows[2:2] = [b'{"prompt": "' + b"x" * 1000 + b'"}\n', b"\xff\n"]
        rows += [json.dumps({"prompt": "last", "response": "one"}).encode()]
        bad, content = {2, 3}, b"".join(rows)
    path = tmp_path / (f"d.{ending}.gz" if packed else f"d.{ending}")
    path.write_bytes(gzip.compress(content) if packed else content)
    flags = pv.flag(hooked, path, bank("evil"), out=tmp_path / "out", shard_rows=4)
    assert {row["row"] for row in flags.rejected()} == bad
    found = flags.filter("evil", threshold=flags.top("evil", 3)[-1].score)
    flagged = {at for at in range(len(rows)) if (path.as_posix(), at) in found}
    assert len(flagged) == 2
    for keep in (True, False):
        left_out = flagged if keep else flagged | bad
        (made,) = found.write_clean(tmp_path / f"clean{keep}", keep_rejected=keep).values()
        data = made.path.read_bytes()
        kept = [row for at, row in enumerate(rows) if at not in left_out]
        assert (gzip.decompress(data) if packed else data) == b"".join([*head, *kept])
        assert (made.kept, made.flagged) == (len(kept), 2)
        assert made.rejected == (0 if keep else 2)


def test_a_parquet_file_of_any_types_is_copied_or_one_error(
    hooked: pv.HookedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = [as_pair(chat) for chat in chats(9)]
    columns = {name: [pair[name] for pair in pairs] for name in ("prompt", "response")}
    views = {name: pa.array(held, pa.string_view()) for name, held in columns.items()}
    whole = pa.table({**views, "tag": pa.array(["a", "b", "c"] * 3).dictionary_encode()})
    path = tmp_path / "d.parquet"
    pq.write_table(whole, path, row_group_size=4)
    flags = pv.flag(hooked, path, bank("evil"), out=tmp_path / "out")
    assert flags.scored == 9
    found = flags.filter("evil", threshold=flags.top("evil", 4)[-1].score)
    (made,) = found.write_clean(tmp_path / "clean").values()
    copy = pq.read_table(made.path)
    kept = [at for at in range(9) if (path.as_posix(), at) not in found]
    assert copy.to_pylist() == [whole.to_pylist()[at] for at in kept]
    assert len(kept) == 6
    assert copy.schema == pq.read_table(path).schema

    def broken(*_: Any) -> Any:
        raise pa.ArrowNotImplementedError("no such type")

    monkeypatch.setattr(pq.ParquetWriter, "write_table", broken)
    with pytest.raises(FlagError, match=r"cannot be copied .no such type"):
        found.write_clean(tmp_path / "again")
    assert not list((tmp_path / "again").iterdir())


def read_back(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".parquet":
        rows: list[dict[str, Any]] = pq.read_table(path).to_pylist()
        return rows
    data = path.read_bytes()
    text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
    if ".csv" in path.name:
        return list(csv.DictReader(text.splitlines(keepends=True)))
    return [json.loads(line) for line in text.splitlines()]


def test_a_cleaned_data_set_becomes_json_lines_and_overwrites_no_source(
    hooked: pv.HookedModel, tmp_path: Path
) -> None:
    rows = [{"messages": chat, "tag": at} for at, chat in enumerate(chats(8))]
    flags = pv.flag(hooked, {"my set/1": rows}, bank(), out=tmp_path / "out")
    found = flags.filter("evil", threshold=flags.top("evil", 3)[-1].score)
    (made,) = found.write_clean(tmp_path / "clean").values()
    assert made.path.name == "my-set-1.jsonl"
    kept = [json.loads(line) for line in made.path.read_text().splitlines()]
    assert kept == [row for at, row in enumerate(rows) if ("my set/1", at) not in found]
    assert len(kept) == 6
    path = write_jsonl(tmp_path / "d.jsonl", rows)
    before = path.read_bytes()
    named = pv.flag(hooked, path, bank(), out=tmp_path / "named")
    with pytest.raises(FlagError, match="itself lies"):
        named.filter("evil", threshold=0.0).write_clean(tmp_path)
    assert path.read_bytes() == before


def pruned() -> pv.HookedModel:
    """A model some of whose neurons write nothing: all but one column in each eight."""
    other = model()
    for block in other.hf.model.layers:
        weight = block.mlp.down_proj.weight.data
        kept = weight[:, ::8].clone()
        weight.zero_()
        weight[:, ::8] = kept
    return other


def test_pruned_neurons_make_another_model(flags: pv.Flags, tmp_path: Path) -> None:
    rows = [{"messages": chat} for chat in chats(20, first=100)]
    clean = pv.flag(pruned(), rows, bank(), out=tmp_path / "clean")
    with pytest.raises(FlagError, match="got a clean scan scored otherwise: its model is"):
        flags.filter("evil", clean=clean)
    with pytest.raises(FlagError, match="got a model other than the one that scored"):
        pv.Flags.load(flags.folder, model=pruned(), bank=bank())


def test_a_hook_around_a_clean_scan_is_noticed_and_colours_no_token(
    flags: pv.Flags, hooked: pv.HookedModel, tmp_path: Path
) -> None:
    rows = [{"messages": chat} for chat in chats(20, first=100)]
    plain = pv.flag(hooked, rows, bank(), out=tmp_path / "plain")
    handle = hooked.hf.model.layers[0].register_forward_hook(lambda _m, _given, h: h * 3)
    try:
        clean = pv.flag(hooked, rows, bank(), out=tmp_path / "clean")
        flags.report(tmp_path / "hooked.html")
    finally:
        handle.remove()
    means = [one.datasets["rows"]["evil/resid_post.2/difference"].mean for one in (clean, plain)]
    assert abs(means[0] - means[1]) > 0.01
    with pytest.raises(FlagError, match="same weights and gave other projections of the probe"):
        flags.filter("evil", clean=clean)
    assert flags.filter("evil", clean=plain).scored == 50
    refusal = "the model has the weights that scored, and gives other projections"
    assert refusal in (tmp_path / "hooked.html").read_text()
    flags.report(tmp_path / "plain.html")
    assert refusal not in (tmp_path / "plain.html").read_text()
