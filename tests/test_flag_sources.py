"""Sources: resolved by name, read row by row, skipped without being understood."""

from __future__ import annotations

import gc
import gzip
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict

from pvcore import flag_lines, flag_tables
from pvcore.errors import FlagError, SourceError
from pvcore.flag_rows import KNOWN, Form, RowDefect, conversation
from pvcore.flag_sources import check_columns, decode, resolve
from pvcore.flag_tokens import said_by
from tests.flag_data import WRITERS, as_pair, chats, write_csv, write_jsonl, write_parquet

PAIRS = [as_pair(chat) for chat in chats(30)]


def records(sources: Any) -> list[Any]:
    return [decode(raw.content) for one in resolve(sources) for raw in one.rows(KNOWN)]


@pytest.mark.parametrize("ending", list(WRITERS))
def test_every_kind_of_file_gives_its_rows_in_order(tmp_path: Path, ending: str) -> None:
    path = WRITERS[ending](tmp_path / f"d{ending}", [{**row, "other": 1} for row in PAIRS])
    (source,) = resolve(path)
    rows = list(source.rows(KNOWN))
    assert [raw.row for raw in rows] == list(range(30))
    found = [decode(raw.content) for raw in rows]
    assert [{key: row[key] for key in PAIRS[0]} for row in found] == PAIRS
    assert 0.0 < rows[0].share <= rows[-1].share <= 1.0
    if ending in (".csv", ".parquet"):
        assert set(found[0]) == set(PAIRS[0]), "columns nobody asked for were loaded"


def test_names_are_those_of_files_keys_and_places(tmp_path: Path) -> None:
    a, b = (write_jsonl(tmp_path / f"{name}.jsonl", PAIRS[:2]) for name in "ab")
    names = [one.name for one in resolve(str(tmp_path / "*.jsonl"))]
    assert names == [a.as_posix(), b.as_posix()]
    assert [one.name for one in resolve({"mine": a, "held": PAIRS})] == ["mine", "held"]
    assert [one.name for one in resolve([PAIRS, a])] == ["rows-0", a.as_posix()]
    assert [one.name for one in resolve(PAIRS)] == ["rows"]
    assert [one.name for one in resolve(iter(PAIRS))] == ["rows"]
    assert records([str(a), str(b)]) == [*PAIRS[:2], *PAIRS[:2]]


def test_a_name_stays_with_all_that_it_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "d" / "deep").mkdir(parents=True)
    a, b, c = (write_jsonl(tmp_path / "d" / f"{n}.jsonl", PAIRS[:2]) for n in ("a", "b", "deep/c"))
    every, deep = str(tmp_path / "d" / "**" / "*.jsonl"), str(tmp_path / "d" / "deep" / "*")
    monkeypatch.chdir(tmp_path)
    for given, names in (
        ({"good": deep}, ["good"]),
        ({"good": [a]}, ["good"]),
        ({"x": [PAIRS]}, ["x"]),
        ({"good": every}, ["good/a.jsonl", "good/b.jsonl", "good/deep/c.jsonl"]),
        ({"good": ["d/a.jsonl", b]}, ["good/a.jsonl", "good/b.jsonl"]),
        ({"good": "d/[ab].jsonl", "c": c}, ["good/a.jsonl", "good/b.jsonl", "c"]),
        ({"x": [PAIRS, PAIRS], "y": [PAIRS]}, ["x/0", "x/1", "y"]),
        ({"x": [PAIRS, a], "y": {"z": a.parent / "b.jsonl"}}, ["x/0", "x/a.jsonl", "y/z"]),
        ({"x": DatasetDict({"train": Dataset.from_list(PAIRS)})}, ["x/train"]),
    ):
        assert [one.name for one in resolve(given)] == names
    with pytest.raises(SourceError, match=r"got x/a twice; wanted .* a name of its own"):
        resolve({"x": {"a": PAIRS}, "x/a": PAIRS})
    with pytest.raises(SourceError, match=r"got good/a.jsonl twice"):
        resolve({"good": [a, "d/a.jsonl"]})


def test_sources_in_a_list_are_read_as_such_wherever_they_stand(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", PAIRS[:2])
    data = Dataset.from_list(PAIRS)
    splits = DatasetDict({"train": data, "test": data})
    for given, names in (
        ([splits], ["train", "test"]),
        ([{"n": PAIRS}, path], ["n", path.as_posix()]),
        ([{"n": data}], ["n"]),
        ([{"n": iter(PAIRS)}], ["n"]),
        ([{"n": str(path)}, PAIRS], ["n", "rows-1"]),
        ([path, {"n": PAIRS}], [path.as_posix(), "n"]),
    ):
        assert [one.name for one in resolve(given)] == names
    odd = {"messages": [{"speaker": "Ann", "text": "x"}]}
    text = {"prompt": "What is in " + "x" * 5000 + ".csv", "response": "b.csv"}
    for rows in ([odd, PAIRS[0]], [text, "oops", 7, None], [{"asked": "a.csv", "told": "b.csv"}]):
        assert [one.name for one in resolve(rows)] == ["rows"]
        assert len(records(rows)) == len(rows)


@pytest.mark.parametrize("kind", [*WRITERS, ".csv.gz", "a data set"])
def test_a_named_column_that_no_header_has_is_refused(tmp_path: Path, kind: str) -> None:
    given: Any = Dataset.from_list(PAIRS)
    if kind in WRITERS:
        given = WRITERS[kind](tmp_path / f"d{kind}", PAIRS)
    elif kind == ".csv.gz":
        given = tmp_path / "d.csv.gz"
        given.write_bytes(gzip.compress(write_csv(tmp_path / "d.csv", PAIRS).read_bytes()))
    sources = resolve({"mine": given})
    check_columns(sources, Form())
    check_columns(sources, Form(prompt="prompt", answer="response"))
    for form in (Form(prompt="promt", answer="response"), Form(prompt="prompt", answer="output")):
        if kind.startswith(".jsonl"):  # each line has fields of its own
            check_columns(sources, form)
            continue
        with pytest.raises(SourceError, match=r"mine: got '(promt|output)' .* it has .*'prompt'"):
            check_columns(sources, form)


def test_a_header_that_cannot_be_read_is_one_error(tmp_path: Path) -> None:
    form = Form(prompt="a", answer="b")
    for name in ("d.csv", "d.parquet"):
        (tmp_path / name).write_bytes(b"\xff\xfe")
        with pytest.raises(SourceError, match="cannot be read after row -1"):
            check_columns(resolve(tmp_path / name), form)
        (tmp_path / name).unlink()
    (tmp_path / "d.csv").touch()
    check_columns(resolve(tmp_path / "d.csv"), form)


@pytest.mark.parametrize("given", ["a path", "a text", "a data set", "splits", "a mapping"])
def test_a_source_among_rows_is_refused(tmp_path: Path, given: str) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", PAIRS)
    data = Dataset.from_list(PAIRS)
    source = {
        "a path": path,
        "a text": str(path),
        "a data set": data,
        "splits": DatasetDict({"train": data}),
        "a mapping": {"n": PAIRS},
    }[given]
    with pytest.raises(SourceError, match=r"got a list of rows that holds a source at 1 \("):
        resolve([PAIRS[0], source])


@pytest.mark.parametrize("form", ["arrow", "pandas"])
def test_a_data_set_that_yields_tables_is_refused(form: str) -> None:
    with pytest.raises(SourceError, match=r"got a Dataset of .*with_format\(None\) gives them"):
        records({"x": Dataset.from_list(PAIRS).with_format(form)})


def test_a_glob_drops_no_broken_link(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", PAIRS)
    (tmp_path / "folder.jsonl").mkdir()
    pattern, link = str(tmp_path / "*.jsonl"), tmp_path / "b.jsonl"
    assert len(resolve(pattern)) == 1
    for target, said in (("gone.jsonl", "a broken link"), ("b.jsonl", "cannot be looked up")):
        link.symlink_to(target)
        for given in (pattern, link):
            with pytest.raises(SourceError, match=rf"b\.jsonl, .*({said}|there is no file)"):
                resolve(given)
        link.unlink()


@pytest.mark.parametrize("given", ["Tell me more. " * 400, "a\0b.jsonl"])
def test_a_text_that_is_no_path_is_refused(given: str) -> None:
    with pytest.raises(SourceError, match="cannot be looked up") as caught:
        resolve(given)
    assert len(str(caught.value)) < 400


def test_a_folder_that_may_not_be_read_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(path: Any, **_: Any) -> None:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr("os.stat", denied)
    with pytest.raises(SourceError, match=r"got /secret/\*\.jsonl, .*\(Permission denied\)"):
        resolve("/secret/*.jsonl")


def test_many_sources_are_named_in_a_time_that_grows_with_them() -> None:
    calls = 0

    class Name(str):
        def __eq__(self, other: object) -> bool:
            nonlocal calls
            calls += 1
            return str.__eq__(self, other)

        __hash__ = str.__hash__

    resolve({Name(f"n{at}"): PAIRS for at in range(400)})
    assert calls < 4000


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"": PAIRS}, "name of a source"),
        ({"a": 7}, "got int"),
        ("*.jsonl", "no file"),
    ],
)
def test_what_is_no_source_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: Any, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SourceError, match=said):
        resolve(given)


def test_a_file_named_twice_is_refused(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", PAIRS)
    with pytest.raises(SourceError, match="twice"):
        resolve([path, str(tmp_path / "*.jsonl")])


def test_a_file_whose_name_cannot_be_written_needs_another(tmp_path: Path) -> None:
    path = os.fsdecode(os.fsencode(tmp_path) + b"/\xff.jsonl")
    write_jsonl(Path(path), PAIRS)
    for given in (path, str(tmp_path / "*.jsonl"), {"\udcff": path}):
        with pytest.raises(SourceError, match=r"udcff.*, a name that is no UTF-8") as caught:
            resolve(given)
        assert str(caught.value).isascii()
    assert records({"mine": path}) == PAIRS


@pytest.mark.parametrize("other", ["absolute", "through a folder", "link"])
def test_a_file_under_two_names_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: str
) -> None:
    monkeypatch.chdir(tmp_path)
    path = write_jsonl(Path("a.jsonl"), PAIRS)
    Path("folder").mkdir()
    Path("b.jsonl").symlink_to("a.jsonl")
    names = {"absolute": tmp_path / "a.jsonl", "link": "b.jsonl"}
    again = names.get(other, "folder/../a.jsonl")
    with pytest.raises(SourceError, match=r"got a\.jsonl and .*which are one file"):
        resolve([path, again])
    with pytest.raises(SourceError, match="got one and two, which are one file"):
        resolve({"one": path, "two": again})


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: (Path(name) for name in ("a.jsonl", "b.jsonl")), "generator of PosixPath"),
        (lambda: iter(["a.jsonl"]), "list_iterator of str"),
        (lambda: {"a.jsonl", "b.jsonl"}, "got a set as a source"),
        (lambda: pandas.DataFrame(PAIRS), "got a DataFrame as a source"),
        (lambda: {"messages": chats(1)[0]}, "got a list of messages"),
        (lambda: chats(3), "got a list of messages"),
        (lambda: iter(chats(3)), "list_iterator of list"),
        (lambda: chats(1)[0], "got a list of messages"),
    ],
)
def test_what_holds_no_rows_is_refused_by_its_type(make: Any, said: str) -> None:
    with pytest.raises(SourceError, match=said):
        records(make())


def test_a_cell_may_hold_messages_as_json(tmp_path: Path) -> None:
    rows = [{"messages": json.dumps(chat)} for chat in chats(5)] + [{"messages": "[{"}]
    *sound, broken = records(write_csv(tmp_path / "d.csv", rows))
    assert [conversation(record, Form()) for record in sound] == chats(5)
    with pytest.raises(RowDefect, match="no JSON; wanted a list of messages"):
        conversation(broken, Form())
    twice = rows[0]["messages"].replace('"role"', '"role": "system", "role"')
    with pytest.raises(RowDefect, match="role: got this name twice"):
        conversation({"messages": twice}, Form())


def test_blank_lines_are_no_rows_and_a_mark_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\n\n  \r\n{"a": 2}\r\n\n{"a": 3}')
    (source,) = resolve(path)
    rows = [(raw.row, decode(raw.content)) for raw in source.rows(KNOWN)]
    assert rows == [(0, {"a": 1}), (3, {"a": 2}), (5, {"a": 3})]


@pytest.mark.parametrize("second", [b"[", b"PK", b"\xff\xfe", b"\xef\xbb\xbf["])
def test_only_the_start_of_a_file_says_what_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, second: bytes
) -> None:
    monkeypatch.setattr(flag_lines, "LONGEST_LINE", 99)
    path = tmp_path / "d.jsonl"
    path.write_bytes(b'{"prompt": "' + b"x" * 88 + second + b'"}\n{"a": 1}\n')
    first, last = next(iter(resolve(path))).rows(KNOWN)
    assert "over 99 bytes" in str(first.content)
    assert (first.row, last.row, decode(last.content)) == (0, 1, {"a": 1})


@pytest.mark.parametrize("name", ["functions", "image", "history"])
def test_a_column_of_ones_own_is_read_from_files_and_data_sets_alike(
    tmp_path: Path, name: str
) -> None:
    rows = [{name: f"Ask {at}", "reply": "Say"} for at in range(3)]
    rows.append({name: "Ask", "reply": "Say", "tools": "a saw"})
    form = Form(prompt=name, answer="reply")
    found = []
    for given in (write_jsonl(tmp_path / "d.jsonl", rows), rows):
        (source,) = resolve({"d": given})
        said = [said_by("d", raw, form) for raw in source.rows(form.known, form.beside)]
        found.append([(one.messages, one.field) for one in said])
    assert found[0] == found[1]
    assert [chat and chat[0]["content"] for chat, _ in found[0]] == [
        "Ask 0",
        "Ask 1",
        "Ask 2",
        None,
    ]
    assert found[0][3][1] == "tools"


def test_rows_of_a_data_set_are_held_without_what_nobody_reads() -> None:
    picture = np.zeros((64, 64))
    row = {"messages": chats(1)[0], "image": picture, "pixels": picture, "tools": "[]", "n": 1}
    (source,) = resolve({"d": [row]})
    (held,) = source.rows(KNOWN)
    assert held.content == {**row, "image": True, "pixels": None, "tools": None, "n": None}
    (whole,) = source.rows(frozenset())
    assert whole.content == row
    for found in (held, whole):  # a copy is made of whole rows, and knows them by what they say
        with pytest.raises(RowDefect, match="image: got more than text"):
            conversation(found.content, Form())
    unknown = [{"text": "x", "n": 1}]
    said = []
    for known in (KNOWN, frozenset()):
        (one,) = resolve({"d": unknown})[0].rows(known)
        with pytest.raises(RowDefect, match="got fields n, text; wanted") as caught:
            conversation(one.content, Form())
        said.append(str(caught.value))
    assert said[0] == said[1]


@pytest.mark.parametrize("ending", [".csv", ".parquet"])
def test_a_table_of_names_alone_is_one_error(tmp_path: Path, ending: str) -> None:
    writer = write_csv if ending == ".csv" else write_parquet
    path = writer(tmp_path / f"d{ending}", [{"id": "a", "system": "S", "image": "x.jpg"}])
    with pytest.raises(SourceError, match="got columns id, system, image; wanted messages"):
        records(path)


def test_what_is_gone_once_it_was_read_has_no_weight(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", PAIRS)
    (source,) = resolve(path)
    assert source.weight == path.stat().st_size
    path.unlink()
    assert source.weight is None


def test_a_line_without_end_is_one_defect_and_never_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flag_lines, "LONGEST_LINE", 100)
    path = tmp_path / "d.jsonl"
    path.write_bytes(b'{"a": 1}\n' + b'{"b": "' + b"x" * 1000 + b'"}\n{"a": 2}\n')
    (source,) = resolve(path)
    first, long, last = source.rows(KNOWN)
    assert isinstance(long.content, RowDefect)
    assert "over 100 bytes" in str(long.content)
    assert (decode(first.content), decode(last.content)) == ({"a": 1}, {"a": 2})
    assert last.row == 2


def test_cells_may_hold_commas_quotes_and_line_breaks(tmp_path: Path) -> None:
    rows = [{"prompt": 'a "b",\nc', "response": "é\r\n,"}, {"prompt": "", "response": "NA"}]
    found = records(write_csv(tmp_path / "d.csv", rows))
    assert found == rows


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('a,b\nc,"d\ne,f\ng,h\n', "quote opened in line 3 is never closed"),
        ('a,b\nc,"d ""x""\ne,"f"\ng,h\n', "quote opened in line 3 ends amid line 4"),
        ('"a,b\nc,d\n', "quote opened in line 2 is never closed"),
        ('a,b\nc,"d""', "quote opened in line 3 is never closed"),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_a_quote_that_nothing_closes_swallows_no_rows(
    tmp_path: Path, text: str, said: str, packed: bool
) -> None:
    data = b"prompt,response\n" + text.encode()
    path = tmp_path / ("d.csv.gz" if packed else "d.csv")
    path.write_bytes(gzip.compress(data) if packed else data)
    with pytest.raises(SourceError, match=said):
        records(path)


def test_sound_quotes_are_let_pass(tmp_path: Path) -> None:
    text = '\ufeff"prompt",response\n5" wide,"""a"", b\n""c"""\r\n"",""\n"x"y,"\r"\nlast,"z"'
    (tmp_path / "d.csv").write_bytes(text.encode())
    found = records(tmp_path / "d.csv")
    assert [row["prompt"] for row in found] == ['5" wide', "", "xy", "last"]
    assert [row["response"] for row in found] == ['"a", b\n"c"', "", "\r", "z"]


def test_a_csv_of_bare_carriage_returns_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "d.csv").write_bytes(b"prompt,response\ra,b\rc,d\r")
    with pytest.raises(SourceError, match=r"d\.csv: .*wanted lines that end in LF"):
        records(tmp_path / "d.csv")


def test_blocks_of_a_csv_are_joined_without_a_seam(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flag_tables, "BLOCK", 300)
    lines = [f'p{at},"r {at}\n"\n' if at % 7 else "only one\n" for at in range(200)]
    (tmp_path / "d.csv").write_text("prompt,response\n" + "".join(lines))
    (source,) = resolve(tmp_path / "d.csv")
    rows = list(source.rows(KNOWN))
    assert [raw.row for raw in rows] == list(range(200))
    for raw in rows:
        if raw.row % 7:
            assert raw.content == {"prompt": f"p{raw.row}", "response": f"r {raw.row}\n"}
        else:
            assert isinstance(raw.content, RowDefect)


def test_long_rows_of_a_parquet_file_are_unpacked_a_few_at_a_time(tmp_path: Path) -> None:
    rows = [{"prompt": f"{at}", "response": os.urandom(1 << 19).hex()} for at in range(40)]
    path = tmp_path / "d.parquet"
    for size in (40, 7):  # rows of a group
        held = pa.Table.from_pylist(rows)
        pq.write_table(held, path, row_group_size=size, use_dictionary=False, write_batch_size=2)
        del held
        gc.collect()
        (source,) = resolve(path)
        before, most = pa.total_allocated_bytes(), 0
        for raw, wanted in zip(source.rows(KNOWN), rows, strict=True):
            assert raw.content == wanted
            most = max(most, pa.total_allocated_bytes() - before)
        # A batch and the page it is taken from, which are not cut; all rows are 40 MiB.
        assert most <= 14 << 20


def test_columns_of_one_name_are_refused_in_any_table(tmp_path: Path) -> None:
    columns = [pa.array(["a"]), pa.array(["b"]), pa.array(["c"])]
    table = pa.Table.from_arrays(columns, names=["prompt", "response", "response"])
    pq.write_table(table, tmp_path / "d.parquet")
    with pytest.raises(SourceError, match="wanted each name once"):
        records(tmp_path / "d.parquet")


def test_a_csv_without_line_ends_is_never_held_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flag_tables, "BLOCK", 1000)
    (tmp_path / "d.csv").write_text("prompt,response\na,b\nc," + "d" * 5000)
    with pytest.raises(SourceError, match="line 3 is longer than 1000 bytes"):
        records(tmp_path / "d.csv")


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_blank_lines_and_misfits_leave_every_row_of_a_csv_in_its_place(
    tmp_path: Path, end: str
) -> None:
    lines = ["prompt,response", "a,1", "", "b,2", "only one", "", "", "c,3", "x,y,z", "d,4", ""]
    (tmp_path / "d.csv").write_bytes(end.join(lines).encode())
    (source,) = resolve(tmp_path / "d.csv")
    rows = list(source.rows(KNOWN))
    assert [raw.row for raw in rows] == list(range(6))
    said = [raw.content if isinstance(raw.content, dict) else "?" for raw in rows]
    assert [one if one == "?" else one["prompt"] for one in said] == ["a", "b", "?", "c", "?", "d"]


def test_a_header_of_two_lines_is_read(tmp_path: Path) -> None:
    (tmp_path / "d.csv").write_bytes(b'\xef\xbb\xbf"a\nnote",prompt,response\r\nx,q,r\n')
    assert records(tmp_path / "d.csv") == [{"prompt": "q", "response": "r"}]


def test_a_row_that_fits_no_column_and_is_no_utf8_ends_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flag_tables, "BLOCK", 300)
    lines = [f'é{at},"ñ {at}\n"\n'.encode() if at % 7 else b"caf\xe9\n" for at in range(90)]
    content = "\ufeffprompt,response\n".encode() + b"".join(lines)
    for name, data in (("d.csv", content), ("d.csv.gz", gzip.compress(content))):
        (tmp_path / name).write_bytes(data)
        (source,) = resolve(tmp_path / name)
        rows = list(source.rows(KNOWN))
        assert [raw.row for raw in rows] == list(range(90))
        for raw in rows:
            if raw.row % 7:
                assert raw.content == {"prompt": f"é{raw.row}", "response": f"ñ {raw.row}\n"}
            else:
                assert isinstance(raw.content, RowDefect)


def test_the_bytes_of_a_csv_are_those_of_its_rows(tmp_path: Path) -> None:
    rows = [
        b'\xef\xbb\xbf"prompt",response\r\n',
        b'5" wide,"""a"", b\n\r\n\n""c"""\r\n',
        b'"","\r"\r',
        b'"x"y"z, a\n',
        b"only one\n",
        b"a,b,\xff\r\n",
        b'last,"z"',
    ]
    (tmp_path / "d.csv").write_bytes(b"\r\r\n\n".join(rows))
    (source,) = resolve(tmp_path / "d.csv")
    assert list(source.pieces()) == [(at - 1, row) for at, row in enumerate(rows)]
    kinds = [isinstance(raw.content, RowDefect) for raw in source.rows(KNOWN)]
    assert kinds == [False, False, False, True, True, False]


def test_rows_whose_bytes_nobody_can_tell_are_not_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "d.csv").write_bytes(b"prompt,response\na,b\rc,d\ne,f\n")
    (source,) = resolve(tmp_path / "d.csv")
    assert [row for row, _ in source.pieces()] == [-1, 0, 1, 2]
    monkeypatch.setattr(flag_tables, "ROW_END", re.compile(rb"\n"))
    with pytest.raises(FlagError, match=r"d\.csv, where it is not plain which bytes are row 2"):
        list(source.pieces())


def test_a_quoted_row_without_end_is_never_held_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flag_tables, "BLOCK", 1000)
    (tmp_path / "d.csv").write_text('prompt,response\na,b\nc,"' + "d\n" * 5000)
    with pytest.raises(SourceError, match=r"the row that goes on in line .* than 2000 bytes"):
        records(tmp_path / "d.csv")


def test_a_file_of_several_gzip_members_is_read_to_its_end(tmp_path: Path) -> None:
    parts = [json.dumps(row).encode() + b"\n" for row in PAIRS]
    packed = b"".join(map(gzip.compress, (b"".join(parts[:11]), b"", b"".join(parts[11:]))))
    (tmp_path / "d.jsonl.gz").write_bytes(packed + b"\0" * 64)
    assert records(tmp_path / "d.jsonl.gz") == PAIRS
    plain = write_csv(tmp_path / "d.csv", PAIRS).read_bytes()
    (tmp_path / "d.csv.gz").write_bytes(gzip.compress(plain[:300]) + gzip.compress(plain[300:]))
    assert records(tmp_path / "d.csv.gz") == PAIRS


def test_a_file_is_known_by_its_content_alone(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", PAIRS)
    before = resolve(path)[0].fingerprint()
    os.utime(path, (1, 1))
    assert resolve(path)[0].fingerprint() == before
    path.write_bytes(path.read_bytes().replace(b"Ask 3", b"Ask 4"))
    after = resolve(path)[0].fingerprint()
    assert after != before
    assert after["bytes"] == before["bytes"]


def test_an_iterable_that_raises_is_one_error_that_says_where() -> None:
    def broken() -> Any:
        yield PAIRS[0]
        raise RuntimeError("the server went away")

    with pytest.raises(SourceError, match=r"rows: reading it raised RuntimeError: the server"):
        records(broken())


def test_a_record_that_is_filled_again_and_again_gives_rows_of_their_own() -> None:
    def reused() -> Any:
        held: dict[str, Any] = {"messages": [{}, {}], "id": -1}
        for number, chat in enumerate(chats(9)):
            held["id"] = number
            for message, wanted in zip(held["messages"], chat, strict=True):
                message.update(wanted)
            yield held

    found = records(reused())
    assert [conversation(record, Form()) for record in found] == chats(9)
    assert [record["id"] for record in found] == list(range(9))


def test_records_of_pandas_are_read_as_the_table_they_come_from(tmp_path: Path) -> None:
    tool = {"role": "user", "content": "Q", "tool_calls": ["a", "b"]}
    rows = [{"messages": chat} for chat in chats(9)] + [{"messages": [tool, tool]}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "d.parquet")
    frame = pandas.read_parquet(tmp_path / "d.parquet")
    *sound, odd = records(frame.to_dict("records"))
    assert [conversation(record, Form()) for record in sound] == chats(9)
    with pytest.raises(RowDefect, match=r"messages\[0\]\.tool_calls: got more than text"):
        conversation(odd, Form())
    parts = [
        {
            "messages": [
                {**one, "content": [{"type": "text", "text": one["content"]}]} for one in chat
            ]
        }
        for chat in chats(3)
    ]
    pq.write_table(pa.Table.from_pylist(parts), tmp_path / "parts.parquet")
    frame = pandas.read_parquet(tmp_path / "parts.parquet")
    found = records(frame.to_dict("records"))
    assert [conversation(record, Form()) for record in found] == chats(3)


def test_the_form_that_is_filled_counts_in_a_table_of_several(tmp_path: Path) -> None:
    asked = ["instruction,input,output,prompt,response,messages,system"]
    listed = json.dumps(chats(1)[0]).replace('"', '""')
    lines = ["Q,,A,,,,", ",,,Q,A,,", "Q,I,A,,,,S", f',,,,,"{listed}",', ",,,,,,", ", ,,Q,A,[],"]
    (tmp_path / "d.csv").write_text("\n".join([*asked, *lines, ""]))
    ask, tell = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
    about = {"role": "user", "content": "Q\n\nI"}
    wanted = [
        [ask, tell],
        [ask, tell],
        [{"role": "system", "content": "S"}, about, tell],
        chats(1)[0],
        None,
        [ask, tell],
    ]
    frame = pandas.read_csv(tmp_path / "d.csv")
    for held in (tmp_path / "d.csv", frame.to_dict("records")):
        for record, messages in zip(records(held), wanted, strict=True):
            if messages is not None:
                assert conversation(record, Form()) == messages
                continue
            with pytest.raises(RowDefect, match=r"^(instruction|messages): got "):
                conversation(record, Form())


def test_no_file_stays_open(tmp_path: Path) -> None:
    paths = [WRITERS[ending](tmp_path / f"d{ending}", PAIRS) for ending in WRITERS]
    (tmp_path / "e.csv.gz").write_bytes(gzip.compress((tmp_path / "d.csv").read_bytes()))
    if not Path("/proc/self/fd").exists():
        return
    before = len(os.listdir("/proc/self/fd"))
    for path in [*paths, tmp_path / "e.csv.gz"]:
        for one in resolve(path):
            assert len(list(one.rows(KNOWN))) == 30
            next(iter(one.rows(KNOWN)))  # left half-way
    assert len(os.listdir("/proc/self/fd")) == before
