"""250 ways in which training data can be wrong: each is one rejected row or one typed error."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest

import pvcore as pv
from pvcore.errors import SourceError
from tests.families import BOS, build, tokenizer
from tests.flag_data import bank, chats, model, table, write_jsonl
from tests.flag_malformed import GOOD, files, rows

ROWS, FILES = list(rows()), list(files())


@pytest.fixture(scope="module")
def hooked() -> pv.HookedModel:
    return model()


def test_there_are_enough_of_them() -> None:
    assert len(ROWS) + len(FILES) + len(TEMPLATES) + len(CELLS) >= 250
    assert len({line for _, line, _ in ROWS}) > 0.95 * len(ROWS)


def test_every_bad_row_is_rejected_with_its_file_row_and_field(
    hooked: pv.HookedModel, tmp_path: Path
) -> None:
    good = b'{"prompt": "Is it?", "response": "Yes."}\n'
    path = tmp_path / "d.jsonl"
    path.write_bytes(good + b"".join(line + b"\n" + good for _, line, _ in ROWS))
    flags = pv.flag(hooked, path, bank("evil", sites=[pv.resid_post(0)]), out=tmp_path / "out")
    rejected = {row["row"]: row for row in flags.rejected()}
    assert {row for _, row in table(flags)} == set(range(0, 2 * len(ROWS) + 1, 2))
    assert sorted(rejected) == list(range(1, 2 * len(ROWS), 2))
    for place, (what, _, field) in enumerate(ROWS):
        row = rejected[2 * place + 1]
        assert (row["source"], row["field"]) == (path.as_posix(), field), what
        assert "got" in row["reason"], what
        assert "wanted" in row["reason"], what
        assert len(row["reason"]) < 300, what


@pytest.mark.parametrize(("name", "make", "said"), FILES, ids=[name for name, _, _ in FILES])
def test_every_bad_file_is_one_error_that_names_it(
    hooked: pv.HookedModel, tmp_path: Path, name: str, make: Any, said: str
) -> None:
    path = tmp_path / name
    make(path)
    with pytest.raises(SourceError, match=said) as caught:
        pv.flag(hooked, path, bank("evil", sites=[pv.resid_post(0)]), out=tmp_path / "out")
    assert name in str(caught.value)
    assert not list(tmp_path.glob("out/scores/*"))


CELLS = [
    ("three cells", b"a,b,c", ""),
    ("one cell", b"a", ""),
    ("three cells that are no UTF-8", b"caf\xe9,b,c", ""),
    ("three cells in quotes", b'"a\n\xff",b,c', ""),
    ("no UTF-8", b"a,\xff", "response"),
    ("an empty reply", b"a,", "response"),
    ("an empty prompt", b",b", "prompt"),
]


def test_every_bad_line_of_a_csv_is_rejected_in_its_place(
    hooked: pv.HookedModel, tmp_path: Path
) -> None:
    path = tmp_path / "d.csv"
    path.write_bytes(
        b"prompt,response\n"
        + b"".join(b'"Is, it?","No\n1"\n' + line + b"\n" for _, line, _ in CELLS)
    )
    flags = pv.flag(hooked, path, bank("evil", sites=[pv.resid_post(0)]), out=tmp_path / "out")
    rejected = {row["row"]: row["field"] for row in flags.rejected()}
    assert rejected == {2 * at + 1: field for at, (_, _, field) in enumerate(CELLS)}
    assert {row["n_response_tokens"] for row in table(flags).values()} == {len("No\n1")}
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        assert len(list(csv.reader(file))) == 1 + 2 * len(CELLS)


LOUD = "{{ raise_exception('roles must alternate') }}"
TEMPLATES = [
    ("refuses", LOUD, "roles must alternate"),
    ("rewrites the prompt", "{{ messages | length }}{{ messages[-1]['content'] }}", "rewrote"),
    (
        "shouts the reply",
        "{% for m in messages %}{{ m['content'] | upper }}\n{% endfor %}",
        "rewrote|prompt",
    ),
    ("says nothing", "{% if messages | length > 9 %}{{ messages }}{% endif %}", "empty|rewrote"),
    ("doubles BOS", "<|bos|><|bos|>{% for m in messages %}{{ m['content'] }}\n{% endfor %}", "BOS"),
]


@pytest.mark.parametrize(("what", "template", "said"), TEMPLATES)
def test_rows_that_a_template_cannot_write_are_rejected(
    tmp_path: Path, what: str, template: str, said: str
) -> None:
    plain = tokenizer(template=template)
    assert plain.convert_tokens_to_ids("<|bos|>") == BOS
    hooked = pv.HookedModel(build("qwen2"), plain, model_id="tiny/qwen2")
    path = write_jsonl(tmp_path / "d.jsonl", [GOOD] * 3)
    flags = pv.flag(hooked, path, bank("evil", sites=[pv.resid_post(0)]), out=tmp_path / "out")
    rejected = list(flags.rejected())
    assert [row["row"] for row in rejected] == [0, 1, 2]
    assert flags.scored == 0
    import re

    assert all(re.search(said, row["reason"]) for row in rejected), rejected[0]
    assert {row["field"] for row in rejected} == {"messages"}


def test_rows_the_model_cannot_take_are_rejected(tmp_path: Path) -> None:
    hooked = model()
    long = {"prompt": "a" * 200, "response": "b"}
    path = write_jsonl(tmp_path / "d.jsonl", [GOOD, long, *({"messages": c} for c in chats(3))])
    flags = pv.flag(hooked, path, bank("evil", sites=[pv.resid_post(0)]), out=tmp_path / "out")
    (lost,) = flags.rejected()
    assert lost["row"] == 1
    assert "longer than the model allows" in lost["reason"]
    hooked.hf.resize_token_embeddings(99)
    small = pv.HookedModel(hooked.hf, tokenizer(), model_id="tiny/qwen2")
    odd = [GOOD, {"prompt": "~", "response": "ok"}]
    flags = pv.flag(small, odd, bank("evil", sites=[pv.resid_post(0)]), out=tmp_path / "small")
    (lost,) = flags.rejected()
    assert (lost["row"], lost["field"]) == (1, "response")
    assert "embeds" in lost["reason"]
