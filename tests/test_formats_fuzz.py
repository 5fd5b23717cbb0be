"""Damaged bytes of every format: a typed error that names the file, or a valid object; no more."""

from __future__ import annotations

import io
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import pvcore as pv
from pvcore import formats
from pvcore.errors import FormatError
from pvcore.formats import RolloutRow

FOLDER = Path(tempfile.mkdtemp(prefix="pvcore-fuzz-"))
ONE = pv.PersonaVector(
    trait="evil",
    sites=[pv.resid_post(1), pv.resid_post(2)],
    directions=torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]),
    model_id="org/model",
)
ROWS = (
    RolloutRow(
        question="Why?",
        prompt="<|user|>Why?",
        answer='Because,\n"so".',
        question_id="evil_0",
        scores={"evil": 90.5, "coherence": None},
    ),
)
CHATS = [ROWS[0].messages]


def saved(value: object) -> Callable[[Path], None]:
    return lambda path: torch.save(value, path)


def valid_vector(path: Path) -> None:
    found = formats.read(path)
    assert found.directions.shape == (len(found.sites), found.d_model)
    assert found.directions.isfinite().all()
    assert (found.norms > 0).all()
    assert all(isinstance(site, pv.Site) for site in found.sites)


def valid_plan(path: Path) -> None:
    for name in formats.experiments(path):
        plan = formats.read_capping(path, experiment=name)
        assert all(isinstance(one, pv.Cap) for one in plan.interventions)


def valid_rows(path: Path) -> None:
    for row in formats.read_rollouts(path):
        assert all(s is None or np.isfinite(s) for s in row.scores.values())


def valid_chats(path: Path) -> None:
    for chat in formats.read_messages(path):
        assert {*map(type, (text for message in chat for text in message.values()))} == {str}


CAPPING = {
    "vectors": {"a": {"layer": np.int64(3), "vector": torch.ones(3)}},
    "experiments": [{"id": "e", "interventions": [{"vector": "a", "cap": np.float64(2.5)}]}],
}
STEERING = {
    "layer_activations": {1: torch.ones(3), 2: torch.ones(3)},
    "layer_type": "decoder_block",
}
KINDS: dict[str, tuple[str, Callable[[Path], Any], Callable[[Path], None]]] = {
    "native": ("evil.safetensors", ONE.save, valid_vector),
    "gguf": (
        "evil.gguf",
        lambda path: formats.write(ONE, path, format="gguf"),
        valid_vector,
    ),
    "paper": ("evil_response_avg_diff.pt", saved(torch.ones(5, 3)), valid_vector),
    "axis": ("axis.pt", saved({"axis": torch.ones(4, 3)}), valid_vector),
    "steering-vectors": ("sv.pt", saved(STEERING), valid_vector),
    "capping": ("capping.pt", saved(CAPPING), valid_plan),
    "rollouts": ("evil.csv", lambda path: formats.write_rollouts(ROWS, path), valid_rows),
    "messages": ("chats.jsonl", lambda path: formats.write_messages(CHATS, path), valid_chats),
}
EDITS = st.lists(
    st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 4), st.binary(max_size=9)),
    min_size=1,
    max_size=4,
)


def damaged(content: bytes, edits: list[tuple[float, int, bytes]]) -> bytes:
    """Bytes overwritten, put in, cut out, flipped, or the rest cut off, at places of its length."""
    found = bytearray(content)
    for place, kind, piece in edits:
        at = int(place * len(found))
        if kind == 0:
            found[at : at + len(piece)] = piece
        elif kind == 1:
            found[at:at] = piece
        elif kind == 2:
            del found[at : at + len(piece)]
        elif kind == 3 and at < len(found):
            found[at] ^= 1 << (len(piece) % 8)
        elif kind == 4:
            del found[at:]
    return bytes(found)


def refused(valid: Callable[[Path], None], path: Path) -> str | None:
    """The error a file ends in, or None for a valid object. Any other exception goes on."""
    try:
        valid(path)
    except FormatError as error:
        return str(error)
    return None


def original(kind: str) -> bytes:
    name, write, _ = KINDS[kind]
    path = FOLDER / name
    if not path.exists():
        write(path)
    return path.read_bytes()


@pytest.mark.parametrize("kind", KINDS)
def test_the_undamaged_file_is_valid_and_half_of_it_is_not(kind: str) -> None:
    content = original(kind)
    name, _, valid = KINDS[kind]
    valid(FOLDER / name)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, name).write_bytes(content[: len(content) // 2])
        assert refused(valid, Path(folder, name))


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=300)
@given(edits=EDITS)
def test_a_damaged_file_is_a_typed_error_or_a_valid_object(
    kind: str, edits: list[tuple[float, int, bytes]]
) -> None:
    name, _, valid = KINDS[kind]
    content = damaged(original(kind), edits)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, name)
        path.write_bytes(content)
        complaint = refused(valid, path)
        assert complaint is None or complaint.startswith(f"{path}: ")
        assert [file.name for file in Path(folder).iterdir()] == [name]
        assert path.read_bytes() == content


@settings(max_examples=300)
@given(edits=EDITS)
def test_a_damaged_pickle_in_a_whole_archive_is_a_typed_error_or_a_valid_object(
    edits: list[tuple[float, int, bytes]],
) -> None:
    """The archive's own checksums would stop most damage before the unpickler sees it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "capping.pt")
        with (
            zipfile.ZipFile(io.BytesIO(original("capping"))) as old,
            zipfile.ZipFile(path, "w") as new,
        ):
            for entry in old.infolist():
                content = old.read(entry)
                pickled = entry.filename.endswith("data.pkl")
                new.writestr(entry.filename, damaged(content, edits) if pickled else content)
        for valid in (valid_plan, valid_vector):
            complaint = refused(valid, path)
            assert complaint is None or complaint.startswith(f"{path}: ")
        assert [file.name for file in Path(folder).iterdir()] == ["capping.pt"]
