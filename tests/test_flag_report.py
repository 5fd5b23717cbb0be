"""The page of a scan shows what was found, with and without the text and the model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers

import pvcore as pv
from pvcore import flag_report
from pvcore.flag_plots import histogram_edges, score_histogram, source_label
from pvcore.flag_report import MOST_COUNTED, MOST_REASONS, correlation_of, reasons_of, tokens_of
from pvcore.numerals import number
from pvcore.report import ReportError
from tests import flag_data
from tests.chat_templates import tokenizer_of
from tests.flag_data import bank, chats, model, table, write_jsonl


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> pv.Flags:
    folder = tmp_path_factory.mktemp("report")
    rows = [flag_data.as_messages(chat) for chat in chats(40)]
    rows[7]["messages"][1]["content"] = "<b>bold</b> & brash"
    write_jsonl(folder / "a.jsonl", [{"bad": 1}, *rows[:25]])
    write_jsonl(folder / "b.jsonl", rows[25:])
    return pv.flag(model(), str(folder / "*.jsonl"), bank(), out=folder / "out", shard_rows=9)


def test_the_page_has_sources_figures_and_coloured_tokens(flags: pv.Flags, tmp_path: Path) -> None:
    flags.report(tmp_path / "page.html", top=40)
    html = (tmp_path / "page.html").read_text()
    for name in flags.datasets:
        assert name in html
    assert html.count("share of rows") == 2
    assert "&lt;b&gt;bold" not in html  # each character is a token of its own
    assert re.search(r'data-v="\S\d', html)
    assert "wanted `messages`".replace("`", "") in re.sub("</?code>", "", html)
    assert "<script" not in html
    assert html.count('type="radio"') == 40 * 2 * 2
    assert "row 0 of" in html  # where the first row without a score is


def test_without_model_or_sources_it_shows_what_it_has(flags: pv.Flags, tmp_path: Path) -> None:
    known = pv.Flags(flags.folder, sources=flags.sources)
    known.report(tmp_path / "text.html", top=25, site=pv.resid_post(0))
    html = (tmp_path / "text.html").read_text()
    assert 'type="radio"' not in html
    assert "Say 7 no" in html
    pv.Flags.load(flags.folder).report(tmp_path / "bare.html")
    html = (tmp_path / "bare.html").read_text()
    assert "without its sources" in html
    assert "Say 7 no" not in html


def test_a_mean_of_one_row_of_a_subset_is_not_shown_as_certain(tmp_path: Path) -> None:
    rows = {name: [{"messages": chat} for chat in chats(6)] for name in ("a", "b", "c", "d")}
    settings: dict[str, Any] = {"difference": "subset", "share": 0.3, "max_new_tokens": 2}
    some = pv.flag(model(), rows, bank("evil"), out=tmp_path / "out", **settings)
    column = some.column("evil")
    counts = {name: one[column].n for name, one in some.datasets.items()}
    assert 1 in counts.values()
    assert max(counts.values()) > 1
    some.report(tmp_path / "page.html")
    html = (tmp_path / "page.html").read_text()
    assert html.count("± ?") == sum(n == 1 for n in counts.values())
    assert len(re.findall(r"± \d", html)) == sum(n > 1 for n in counts.values())


def test_a_page_of_a_subset_says_of_how_many_rows_it_speaks(
    flags: pv.Flags, tmp_path: Path
) -> None:
    rows = {"a": [{"messages": chat} for chat in chats(40)]}
    settings: dict[str, Any] = {"difference": "subset", "share": 0.3, "max_new_tokens": 2}
    some = pv.flag(model(), rows, bank(), out=tmp_path / "out", **settings)
    known = sum(row["evil/resid_post.2/difference"] is not None for row in table(some).values())
    assert 1 < known < 40
    for found, said in (
        (some, f"the {known} rows of 40 whose difference is known, drawn at a share of 0.3"),
        (flags, "all rows"),
    ):
        found.report(tmp_path / "page.html", top=3)
        html = (tmp_path / "page.html").read_text()
        for sentence in (
            f"one figure a trait, over {said}.",
            f"of two traits, over {said}.",
            f"The 3 rows with the highest difference on each trait, of {said}.",
        ):
            assert sentence in html
        assert ("whose difference is known" in html) == ("own replies</th>" in html)
        assert ("own replies</th>" in html) == (found is some)
    some.report(tmp_path / "page.html", top=0)
    row = re.search(r"<tr>.*?>a<.*?</tr>", (tmp_path / "page.html").read_text(), re.S)
    assert row is not None
    assert re.findall(r">(\d+)<", row[0]) == ["40", "0", str(known)]


def test_correlations_are_those_of_all_rows(flags: pv.Flags) -> None:
    columns = flags.columns[:4]
    rows = np.array([[row[name] for name in columns] for row in table(flags).values()])
    np.testing.assert_allclose(correlation_of(flags, columns), np.corrcoef(rows.T), atol=1e-9)
    assert abs(correlation_of(flags, columns)[0][1]) < 0.999


def test_histograms_count_every_row() -> None:
    edges = histogram_edges(-1.0, 3.0, 4)
    assert edges == [-1.0, 0.0, 1.0, 2.0, 3.0]
    low, high = histogram_edges(5.0, 5.0, 1)
    assert low == 5.0 < high
    svg = score_histogram(edges, {"a": [1, 2, 3, 0], "b": [0, 0, 0, 4]}, trait="evil", score="s")
    assert ">evil<" in svg
    for counts, said in (({}, "no sources"), ({str(n): [1] for n in range(9)}, "at most 8")):
        with pytest.raises(ReportError, match=said):
            score_histogram([0.0, 1.0], counts, trait="evil", score="s")
    with pytest.raises(ReportError, match="counts of a"):
        score_histogram(edges, {"a": [1]}, trait="evil", score="s")


def test_the_legend_names_every_source() -> None:
    long = [f"{'folder' * 9}/{name}/train.jsonl" for name in ("one", "two")]
    ends = [f"{name}/{'middle' * 9}/train.jsonl" for name in ("one", "two")]
    names = ["_raw/a.jsonl", "_default", "plain", *long, *ends]
    counts = {name: [1] for name in names}
    svg = score_histogram([0.0, 1.0], counts, trait="evil", score="s")
    for name in names:
        assert f">{source_label(name)}<" in svg
        assert source_label(name).strip()[:3] == name[:3]
    assert len(set(map(source_label, names))) == len(names)
    assert max(map(len, map(source_label, names))) < 42


def test_many_sources_share_a_line(tmp_path: Path) -> None:
    sets = {f"set {at}": [{"messages": chats(1, first=at)[0]}] for at in range(11)}
    flags = pv.flag(model(), sets, bank("evil"), out=tmp_path / "out")
    flags.report(tmp_path / "page.html", top=0)
    html = (tmp_path / "page.html").read_text()
    assert "all others" in html
    assert "Every row was scored." in html


def test_what_keeps_most_rows_out_is_shown_first_whatever_came_before(tmp_path: Path) -> None:
    torn = [b'{"messages": [' + b" " * at + b"x\n" for at in range(MOST_REASONS + 3)]
    empty = b'{"prompt": "Is it?", "response": ""}\n'
    sound = b'{"prompt": "Is it?", "response": "Yes."}\n'
    (tmp_path / "d.jsonl").write_bytes(b"".join(torn) + sound + empty * 30)
    one = bank("evil", sites=[pv.resid_post(0)])
    flags = pv.flag(model(), tmp_path / "d.jsonl", one, out=tmp_path / "out")
    assert len({row["reason"] for row in flags.rejected()}) > MOST_REASONS
    rows = reasons_of(flags.rejected())
    assert rows[0][:3] == ["got an empty reply; wanted text to score", "response", 30]
    assert rows[0][3].startswith(f"row {MOST_REASONS + 4} of ")
    assert (len(rows), rows[1][2]) == (2, MOST_REASONS + 3)
    assert rows[1][0].startswith("got no JSON")
    flags.report(tmp_path / "page.html", top=0)
    assert "got an empty reply" in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize("kinds", [MOST_REASONS, MOST_REASONS + 5, MOST_COUNTED + 5])
def test_reasons_are_counted_in_bounded_memory_and_all_of_them(kinds: int) -> None:
    letters = "abcdefghijklmnopqrstuvwxyz"

    def word(number: int) -> str:
        return letters[number % 26] + (word(number // 26) if number > 25 else "")

    rejected = [
        {"reason": f"got {word(at)!r}", "field": "messages[3]", "source": "d", "row": row}
        for row, at in enumerate([*range(kinds), *[kinds - 1] * 40, *[1] * 50])
    ]
    rows = reasons_of(rejected)
    assert sum(row[2] for row in rows) == len(rejected)
    assert len(rows) == MOST_REASONS
    assert rows[0][:3] == [f"got {word(1)!r}", "messages", 51]
    if kinds <= MOST_COUNTED:
        assert rows[1][:3] == [f"got {word(kinds - 1)!r}", "messages", 41]
    assert (rows[-1][0] == "other reasons") == (kinds > MOST_REASONS)


@pytest.mark.parametrize("family", ["qwen3", "llama3", "gemma", "mistral with a space"])
def test_coloured_tokens_read_as_the_reply(family: str) -> None:
    """Characters of several tokens, and tokens that begin with a space."""
    template = tokenizer_of(family)
    hf = transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(
            vocab_size=len(template),
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    ).eval()
    hooked = pv.HookedModel(hf, template, model_id="tiny/qwen2")
    reply = "It is so: a fox 🦊 lived, 狐 too. Why?"
    chat = [{"role": "user", "content": "Tell me."}, {"role": "assistant", "content": reply}]
    strip = tokens_of(hooked, template, bank("evil"), pv.resid_post(2), chat)
    assert "".join(strip.tokens).strip() == reply
    assert len(strip.tokens) == len(strip.values["evil"])
    assert [token for token in strip.tokens if "🦊" in token or "狐" in token]
    assert any(token.startswith(" ") and token.strip() for token in strip.tokens[1:])


def test_a_long_reply_shows_its_own_mean_and_that_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flag_report, "LONGEST_REPLY", 5)
    rows = [{"prompt": "Ask", "response": text} for text in ("ab~~~~~~~~", "short")]
    flags = pv.flag(model(), rows, bank("evil"), out=tmp_path / "out")
    flags.report(tmp_path / "page.html", top=2)
    html = (tmp_path / "page.html").read_text()
    shown = re.findall(r"over the reply\">evil<b>(\S+)</b>", html)
    means = [row["evil/resid_post.2/response_mean"] for row in table(flags).values()]
    assert sorted(shown) == sorted(number(mean, signed=True) for mean in means)
    assert html.count("…") == 1
