"""The native vector file: golden bytes, atomic writes, and one error for every damaged file."""

import dataclasses
import json
import math
import os
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from pvcore import vector_files
from pvcore.errors import VectorError
from pvcore.sites import resid_mid, resid_post
from pvcore.vectors import PersonaVector, Provenance

GOLDEN = Path(__file__).parent / "data" / "golden_vector.safetensors"


def golden_vector():
    """Every field filled with numbers that float32 holds exactly."""
    return PersonaVector(
        trait="evil",
        sites=(resid_mid(2), resid_post(2), resid_post(3)),
        directions=torch.arange(-6.0, 6.0).reshape(3, 4) / 8,
        model_id="example/model",
        revision="0123abc",
        variant="response_mean",
        provenance=Provenance(
            thresholds={"trait": 50.0, "coherence": 50.0},
            judge="example judge",
            kept=40,
            dropped=10,
            prompt_hash="ff00",
            seeds=(0, 1),
            note="für den Test",
        ),
        statistics={"auc": torch.tensor([0.5, 0.75, 1.0]), "rms": torch.tensor([1.0, 2.0, 4.0])},
        calibration={"resid_post.3": {"p50": 0.25, "p99": 1.5}},
    )


def write_golden(path):
    """How the golden file is made, as version 0.1.0 of pvcore writes it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vector_files, "pvcore_version", lambda: "0.1.0")
        golden_vector().save(path)


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "evil.safetensors"
    golden_vector().save(path)
    return path


def edited(path, *, tensors=None, **changes):
    """Rewrite the file with other fields or tensors and a checksum that fits them."""
    record = vector_files.read(path)
    fields = {**record.fields, **changes}
    held = {"directions": record.directions}
    held |= {f"statistics.{name}": values for name, values in record.statistics.items()}
    held |= tensors or {}
    held = {name: values for name, values in held.items() if values is not None}
    fields = {name: value for name, value in fields.items() if value is not ...}
    if "checksum" in fields:
        fields["checksum"] = vector_files.checksum(held, fields)
    write_raw(path, held, json.dumps(fields))


def write_raw(path, tensors, metadata):
    path.write_bytes(safetensors.torch.save(tensors, {"pvcore": metadata}))


def refused(path, *texts):
    """Loading raises one `VectorError` whose text names the file and holds every text."""
    with pytest.raises(VectorError) as caught:
        PersonaVector.load(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert message.count(str(path)) == 1
    for text in texts:
        assert text in message


# what a file holds


def test_the_golden_file_is_what_save_writes(tmp_path):
    write_golden(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == GOLDEN.read_bytes()


def test_the_golden_file_loads_as_the_vector_it_was_made_of():
    loaded = PersonaVector.load(GOLDEN)
    assert loaded == golden_vector()
    assert loaded.source == GOLDEN
    assert golden_vector().source is None


def test_other_readers_find_the_documented_layout():
    with safetensors.safe_open(GOLDEN, "pt") as file:
        assert set(file.keys()) == {"directions", "statistics.auc", "statistics.rms"}
        directions = file.get_tensor("directions")
        assert file.get_tensor("statistics.auc").tolist() == [0.5, 0.75, 1.0]
        assert file.metadata().keys() == {"pvcore"}
        fields = json.loads(file.metadata()["pvcore"])
    assert directions.dtype == torch.float32
    assert torch.equal(directions, golden_vector().directions)
    assert len(fields.pop("checksum")) == 64
    assert fields == {
        "format": 1,
        "trait": "evil",
        "model_id": "example/model",
        "revision": "0123abc",
        "d_model": 4,
        "sites": ["resid_mid.2", "resid_post.2", "resid_post.3"],
        "variant": "response_mean",
        "provenance": {
            "thresholds": {"trait": 50.0, "coherence": 50.0},
            "judge": "example judge",
            "kept": 40,
            "dropped": 10,
            "prompt_hash": "ff00",
            "seeds": [0, 1],
            "note": "für den Test",
        },
        "calibration": {"resid_post.3": {"p50": 0.25, "p99": 1.5}},
        "pvcore_version": "0.1.0",
        "content_hash": golden_vector().content_hash,
    }


def test_equal_vectors_have_equal_bytes(saved, tmp_path):
    other = tmp_path / "other.safetensors"
    PersonaVector.load(saved).save(other)
    assert other.read_bytes() == saved.read_bytes()
    golden_vector().rename("malice").save(other)
    assert other.read_bytes() != saved.read_bytes()


def test_derived_vectors_forget_the_file(saved):
    loaded = PersonaVector.load(str(saved))
    assert loaded.source == saved
    derived = [loaded.at([2]), loaded.unit(), -loaded, 2 * loaded, loaded.rename("malice")]
    assert all(vector.source is None for vector in derived)


names = st.text(st.characters(exclude_categories=["Cc", "Cs", "Zl", "Zp"], exclude_characters="/"))
names = names.filter(str.strip)
finite = st.floats(-(2.0**100), 2.0**100, width=32)
texts = st.text(max_size=5)
counts = st.none() | st.integers(0, 10**20)
plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | texts,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(texts, inner, max_size=2),
    max_leaves=5,
)


# Plain values: the checker of annotations draws random numbers, which a strategy must not do.
provenances = st.fixed_dictionaries(
    {
        "thresholds": st.dictionaries(texts, finite, max_size=2),
        "judge": texts,
        "kept": counts,
        "dropped": counts,
        "prompt_hash": texts,
        "seeds": st.lists(st.integers(), max_size=2).map(tuple),
        "note": texts,
    }
)
contents = st.fixed_dictionaries(
    {
        "trait": names,
        "model_id": texts,
        "revision": st.none() | texts,
        "variant": st.sampled_from(["response_mean", "prompt_mean", "prompt_last"]),
        "calibration": st.dictionaries(texts, plain, max_size=2),
    }
)


@st.composite
def tables(draw):
    """Layers, one row of numbers for each, and statistics."""
    layers = draw(st.lists(st.integers(0, 99), min_size=1, max_size=3, unique=True))
    width = draw(st.integers(1, 4))
    rows = st.lists(finite, min_size=width, max_size=width)
    rows = rows.filter(lambda row: math.hypot(*row) > 1e-30)
    numbers = st.lists(finite, min_size=len(layers), max_size=len(layers))
    return (
        layers,
        [draw(rows) for _ in layers],
        draw(st.dictionaries(names, numbers, max_size=2)),
    )


@given(contents, provenances, tables())
def test_load_returns_what_was_saved(tmp_path_factory, fields, provenance, table):
    layers, rows, statistics = table
    vector = PersonaVector(
        sites=tuple(map(resid_post, layers)),
        directions=torch.tensor(rows),
        provenance=Provenance(**provenance),
        statistics={name: torch.tensor(values) for name, values in statistics.items()},
        **fields,
    )
    path = tmp_path_factory.getbasetemp() / "drawn.safetensors"
    vector.save(path)
    loaded = PersonaVector.load(path)
    assert loaded == vector
    assert loaded.trait == vector.trait
    assert loaded.sites == vector.sites
    assert torch.equal(loaded.directions, vector.directions)
    assert loaded.provenance == vector.provenance
    assert loaded.calibration == vector.calibration
    assert loaded.statistics.keys() == vector.statistics.keys()
    for name, values in vector.statistics.items():
        assert torch.equal(loaded.statistics[name], values)


# writing


def test_save_refuses_a_missing_folder(tmp_path):
    path = tmp_path / "missing" / "evil.safetensors"
    text = "that is not there; wanted an existing one: create it first"
    with pytest.raises(VectorError, match=text):
        golden_vector().save(path)
    assert list(tmp_path.iterdir()) == []


def test_save_refuses_a_folder_as_target(tmp_path):
    with pytest.raises(VectorError, match="wanted a writable file path: nothing was changed there"):
        golden_vector().save(tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert [path.name for path in tmp_path.parent.glob(".*.tmp")] == []


@pytest.mark.parametrize("name", ["x" * 300, "nul\0byte"])
def test_save_refuses_impossible_names(tmp_path, name):
    with pytest.raises(VectorError, match="cannot be written"):
        golden_vector().save(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_an_interrupted_save_leaves_the_old_file(saved, monkeypatch, step, failure):
    before = saved.read_bytes()

    def fail(*_):
        raise failure

    monkeypatch.setattr(os, step, fail)
    wanted = VectorError if isinstance(failure, OSError) else KeyboardInterrupt
    with pytest.raises(wanted) as caught:
        golden_vector().rename("malice").save(saved)
    if wanted is VectorError:
        assert str(caught.value).startswith(f"{saved}: cannot be written (No space left on device)")
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]
    monkeypatch.undo()
    golden_vector().rename("malice").save(saved)
    assert saved.read_bytes() != before
    assert list(saved.parent.iterdir()) == [saved]


def test_a_file_is_on_disk_before_it_has_its_name(tmp_path, monkeypatch):
    steps = []
    fsync, rename = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (steps.append("fsync"), fsync(file)))
    monkeypatch.setattr(
        os, "replace", lambda a, b: (steps.append(a.parent == b.parent), rename(a, b))
    )
    golden_vector().save(tmp_path / "evil.safetensors")
    assert steps == ["fsync", True]


# damaged files


def test_load_refuses_what_cannot_be_read(tmp_path):
    refused(tmp_path / "none.safetensors", "cannot be read (No such file or directory)")
    refused(tmp_path, "cannot be read (Is a directory); wanted a vector file: check the path")


@pytest.mark.parametrize("data", [b"", b"12345678", b"\x80\x04pickle", b"\0" * 64, b"\xff" * 64])
def test_load_refuses_other_formats(tmp_path, data):
    path = tmp_path / "evil.safetensors"
    path.write_bytes(data)
    refused(path, "got bytes that are no whole safetensors file (", "wanted a vector file")


def test_load_refuses_every_truncation(saved):
    whole = saved.read_bytes()
    for length in range(len(whole)):
        saved.write_bytes(whole[:length])
        refused(saved, "no whole safetensors file")
    saved.write_bytes(whole + b"\0")
    refused(saved, "no whole safetensors file")


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_load_refuses_a_file_without_metadata(tmp_path, metadata):
    path = tmp_path / "evil.safetensors"
    path.write_bytes(safetensors.torch.save({"directions": torch.ones(1, 4)}, metadata))
    refused(path, "got no 'pvcore' metadata", "make the vector anew from its directions")


def test_load_refuses_null_metadata(tmp_path):
    path = tmp_path / "evil.safetensors"
    header = b'{"__metadata__":null}'
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    refused(path, "got no 'pvcore' metadata")


@pytest.mark.parametrize(
    ("metadata", "text"),
    [
        ("{", "got metadata that is no JSON ("),
        ("", "got metadata that is no JSON ("),
        ('{"format": NaN}', "NaN is no finite number"),
        ('{"format": 1e999}', "1e999 is no finite number"),
        ('{"format": ' + "9" * 5000 + "}", "got metadata that is no JSON ("),
        ("[" * 100000, "got metadata that is no JSON ("),
        ("[]", "got metadata []; wanted a JSON object"),
        ("null", "got metadata None; wanted a JSON object"),
        (
            '{"format": 2}',
            "got vector file format 2; wanted format 1: read it with the pvcore that",
        ),
        ('{"format": "1"}', "got vector file format '1'; wanted format 1"),
        ("{}", "got metadata with no format, no trait, no model_id"),
        ('{"format": 1, "extra": 0}', "an unknown 'extra'; wanted exactly format, trait"),
    ],
)
def test_load_refuses_other_metadata(tmp_path, metadata, text):
    path = tmp_path / "evil.safetensors"
    write_raw(path, {"directions": torch.ones(1, 4)}, metadata)
    refused(path, text)


@pytest.mark.parametrize("field", vector_files.FIELDS)
def test_load_refuses_each_missing_field(saved, field):
    edited(saved, **{field: ...})
    refused(saved, f"got metadata with no {field}; wanted exactly")


WRONG = {
    "text": [None, 1, True, ["x"], {}],
    "text or null": [1, False, [], {}],
    "a whole number": [None, "1", True, 1.0, []],
    "a whole number or null": ["1", False, 1.0, []],
    "a list of texts": [None, "resid_post.1", [1], ["resid_post.1", None], {}],
    "a list of whole numbers": [None, 1, ["1"], [True], [1.5], {}],
    "an object": [None, [], "x", 1],
    "an object of numbers": [None, [], {"a": "1"}, {"a": True}, {"a": None}],
}
FIELD_CASES = [
    (name, value)
    for name, kind in vector_files.FIELDS.items()
    for value in WRONG[kind]
    if name not in ("format", "checksum")
]
PROVENANCE_CASES = [
    (name, value) for name, kind in vector_files.PROVENANCE_FIELDS.items() for value in WRONG[kind]
]


@pytest.mark.parametrize(("name", "value"), FIELD_CASES)
def test_load_refuses_a_field_of_another_type(saved, name, value):
    edited(saved, **{name: value})
    refused(saved, f"got metadata field {name} {value!r}; wanted {vector_files.FIELDS[name]}")


@pytest.mark.parametrize(("name", "value"), PROVENANCE_CASES)
def test_load_refuses_provenance_of_another_type(saved, name, value):
    provenance = vector_files.read(saved).fields["provenance"]
    edited(saved, provenance={**provenance, name: value})
    kind = vector_files.PROVENANCE_FIELDS[name]
    refused(saved, f"got provenance field {name} {value!r}; wanted {kind}")


WRITTEN_PROVENANCE = {**dataclasses.asdict(golden_vector().provenance), "seeds": [0, 1]}
VALUES = {
    "blank trait": ({"trait": " "}, "got trait ' '; wanted a name"),
    "other trait": ({"trait": "humor"}, "got content_hash '"),
    "other model": ({"model_id": "example/other"}, "got content_hash '"),
    "hash": ({"content_hash": "0" * 64}, "got content_hash '000000"),
    "d_model": ({"d_model": 5}, "got d_model 5; wanted 4, which the tensors have"),
    "variant": ({"variant": "mean"}, "got variant 'mean'; wanted one of response_mean"),
    "site": ({"sites": ["resid_post"] * 3}, "sites: got site 'resid_post'; wanted KIND.LAYER"),
    "huge site": ({"sites": ["resid_post." + "9" * 5000] * 3}, "sites: "),
    "site twice": ({"sites": ["resid_post.1"] * 3}, "sites of 'evil': got a site twice"),
    "no sites": ({"sites": []}, "sites of 'evil': got no layers"),
    "few sites": ({"sites": ["resid_post.1"]}, "of shape [3, 4] for 1 sites; wanted [1, d_model]"),
    "deep calibration": (
        {"calibration": {"a": [[[[[[[[[[[[[[[[[[1]]]]]]]]]]]]]]]]]]}},
        "at most 16",
    ),
    "provenance": ({"provenance": {}}, "got provenance with no thresholds, no judge"),
    "kept": (
        {"provenance": {**WRITTEN_PROVENANCE, "kept": -1}},
        "got kept -1; wanted a count from 0, or None",
    ),
}


@pytest.mark.parametrize(("changes", "text"), VALUES.values(), ids=VALUES)
def test_load_refuses_wrong_values(saved, changes, text):
    edited(saved, **changes)
    refused(saved, text)


def with_number(value):
    directions = golden_vector().directions.clone()
    directions[1, 2] = value
    return directions


TENSORS = {
    "no directions": ({"directions": None}, "got no tensor 'directions'; wanted one of"),
    "rank": ({"directions": torch.ones(3)}, "got tensor 'directions' of shape [3]; wanted ["),
    "scalar": ({"directions": torch.tensor(1.0)}, "got tensor 'directions' of shape []; wanted ["),
    "rows": ({"directions": torch.ones(2, 4)}, "got tensor 'statistics.auc' of shape [3]; wanted"),
    "no width": ({"directions": torch.ones(3, 0)}, "of shape [3, 0] for 3 sites"),
    "width": ({"directions": torch.ones(3, 5)}, "got d_model 4; wanted 5"),
    "numbers": ({"directions": torch.ones(3, 4)}, "got content_hash '"),
    "nan": ({"directions": with_number(math.nan)}, "NaN or infinite at resid_post.2"),
    "zero": (
        {"directions": golden_vector().directions * torch.tensor([[1.0], [1.0], [0.0]])},
        "norm zero at resid_post.3",
    ),
    "statistic rank": (
        {"statistics.auc": torch.ones(3, 1)},
        "got tensor 'statistics.auc' of shape [3, 1]; wanted one number for each row",
    ),
    "statistic nan": ({"statistics.auc": torch.full((3,), math.nan)}, "statistic 'auc' of 'evil'"),
    "statistic name": ({"statistics.": torch.ones(3)}, "got statistic ''; wanted a name"),
}


@pytest.mark.parametrize(("tensors", "text"), TENSORS.values(), ids=TENSORS)
def test_load_refuses_wrong_tensors(saved, tensors, text):
    edited(saved, tensors=tensors)
    refused(saved, text)


def test_load_refuses_other_tensors_and_dtypes(saved):
    metadata = json.dumps(vector_files.read(saved).fields)
    directions = golden_vector().directions
    for dtype, name in [(torch.float64, "F64"), (torch.bfloat16, "BF16"), (torch.int32, "I32")]:
        write_raw(saved, {"directions": directions.to(dtype)}, metadata)
        refused(saved, f"got tensor 'directions' of dtype {name}; wanted F32")
    write_raw(saved, {"directions": directions, "bias": torch.ones(1)}, metadata)
    refused(saved, "got a tensor 'bias'; wanted 'directions' and statistics.NAME only")


def test_a_changed_statistic_or_field_breaks_the_checksum(saved):
    record = vector_files.read(saved)
    fields = {**record.fields, "calibration": {}}
    write_raw(saved, {"directions": record.directions}, json.dumps(fields))
    refused(saved, "got a checksum that does not match the contents; wanted the file as it was")


def test_extra_metadata_of_other_tools_is_left_alone(saved):
    data = saved.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"]["format"] = "pt"
    text = json.dumps(header).encode()
    saved.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    assert PersonaVector.load(saved) == golden_vector()


def mutations(data):
    """Each byte flipped in one bit, and 300 random edits of several bytes."""
    for place in range(len(data)):
        yield data[:place] + bytes([data[place] ^ (1 << place % 8)]) + data[place + 1 :]
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        start, width, length = torch.randint(0, 2**31, (3,), generator=generator).tolist()
        start, width, length = start % len(data), width % 9, length % 9
        noise = bytes(torch.randint(0, 256, (length,), generator=generator).tolist())
        yield data[:start] + noise + data[start + width :]


def test_no_damaged_file_gives_another_vector(saved):
    whole = saved.read_bytes()
    refusals = []
    for data in mutations(whole):
        saved.write_bytes(data)
        try:
            loaded = PersonaVector.load(saved)
        except VectorError as error:
            refusals.append(str(error))
        else:
            assert loaded == golden_vector()
    assert len(refusals) > len(whole)
    assert all(message.startswith(f"{saved}: ") for message in refusals)


if __name__ == "__main__":
    write_golden(GOLDEN)
