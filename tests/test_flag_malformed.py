"""250 ways in which training data can be wrong: each is one rejected row or one typed error."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
import torch

import pvcore as pv
from pvcore import errors
from pvcore.errors import SourceError
from tests.families import BOS, build, tokenizer
from tests.flag_data import bank, chats, model, table, write_jsonl
from tests.flag_malformed import GOOD, files, rows

ROWS, FILES = list(rows()), list(files())


@pytest.fixture(scope="module")
def hooked() -> pv.HookedModel:
    return model()


def test_there_are_enough_of_them() -> None:
    assert len(ROWS) + len(FILES) + len(TEMPLATES) + len(CELLS) + len(VECTORS) >= 266
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


def spoiled(place: int, value: float) -> torch.Tensor:
    directions = torch.ones(3, 64)
    directions[place, 5] = value
    return directions


def made(directions: torch.Tensor, *, layers: Sequence[int] = (0, 1, 2), **changes: Any) -> Any:
    held = {"trait": "evil", "model_id": "tiny/qwen2", **changes}
    sites = [pv.resid_post(layer) for layer in layers]
    return pv.PersonaVector(sites=sites, directions=directions, **held)


VECTORS: list[tuple[str, Callable[[], Any], type[pv.PvcoreError], str]] = [
    ("too narrow", lambda: made(torch.ones(3, 32)), errors.PlanError, "width 32"),
    ("too wide", lambda: made(torch.ones(3, 128)), errors.PlanError, "width 128"),
    ("NaN", lambda: made(spoiled(1, float("nan"))), errors.VectorError, "resid_post.1"),
    ("infinite", lambda: made(spoiled(2, float("inf"))), errors.VectorError, "resid_post.2"),
    ("zero", lambda: made(torch.zeros(3, 64)), errors.VectorError, "zero|norm"),
    ("no axis of sites", lambda: made(torch.ones(64)), errors.VectorError, "wanted"),
    ("a site too many", lambda: made(torch.ones(2, 64)), errors.VectorError, "3"),
    ("no site", lambda: made(torch.ones(0, 64), layers=()), errors.VectorError, "wanted"),
    ("one site twice", lambda: made(torch.ones(2, 64), layers=(1, 1)), errors.VectorError, "twice"),
    ("a layer too deep", lambda: made(torch.ones(1, 64), layers=(3,)), errors.SiteError, "3 bl"),
    (
        "of another model",
        lambda: made(torch.ones(3, 64), model_id="other/gpt"),
        errors.PlanError,
        "other/gpt",
    ),
    ("no vector", lambda: pv.VectorBank([]), errors.VectorError, "one"),
    (
        "one name twice",
        lambda: pv.VectorBank([made(torch.ones(3, 64))] * 2),
        errors.VectorError,
        "evil",
    ),
    (
        "a layer it lacks",
        lambda: pv.VectorBank([made(torch.ones(1, 64), layers=(1,))], layers=[0]),
        errors.VectorError,
        "resid_post.0",
    ),
    (
        "two widths",
        lambda: pv.VectorBank([made(torch.ones(3, 64)), made(torch.ones(3, 32), trait="humor")]),
        errors.VectorError,
        "width|d_model",
    ),
    ("no bank", lambda: "evil.safetensors", errors.FlagError, "wanted a VectorBank"),
]


@pytest.mark.parametrize(("what", "make", "kind", "said"), VECTORS)
def test_every_bad_vector_is_one_error_and_nothing_is_written(
    hooked: pv.HookedModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    what: str,
    make: Any,
    kind: type[pv.PvcoreError],
    said: str,
) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    path = write_jsonl(tmp_path / "d.jsonl", [GOOD])
    with pytest.raises(pv.PvcoreError, match=said) as caught:
        pv.flag(hooked, path, make(), out=tmp_path / "out")
    assert type(caught.value) is kind
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("spoil", ["cut", "noise", "empty", "gone", "text"])
def test_every_bad_vector_file_is_one_error(
    hooked: pv.HookedModel, tmp_path: Path, spoil: str
) -> None:
    file = tmp_path / "evil.safetensors"
    bank("evil")["evil"].save(file)
    held = file.read_bytes()
    if spoil == "gone":
        file.unlink()
    else:
        other = {"cut": held[:-7], "noise": bytes(range(256)) * 4, "empty": b"", "text": b"evil"}
        file.write_bytes(other[spoil])
    path = write_jsonl(tmp_path / "d.jsonl", [GOOD])
    with pytest.raises(errors.VectorError, match=r"evil\.safetensors"):
        pv.flag(hooked, path, pv.PersonaVector.load(file), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


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
