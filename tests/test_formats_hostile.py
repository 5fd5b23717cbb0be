"""Wrong and hostile files: one typed error that names file and field, nothing run or written."""

from __future__ import annotations

import collections
import io
import os
import pickle
import re
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

import pvcore as pv
from pvcore import formats
from pvcore.errors import FormatError

PAPER = "evil_response_avg_diff.pt"
Reader = Callable[[Path], object]


class Executed:
    """A pickle of this makes a file when it is run."""

    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.sentinel),)


def make(folder: str) -> None:
    os.mkdir(folder)


class Allowed(Executed):
    """The same by a function that a process may have added to torch's list."""

    def __reduce__(self) -> Any:
        return make, (str(self.sentinel),)


def saved(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def rezipped(data: bytes, compression: int, **changes: bytes) -> bytes:
    """The archive with entries replaced by the ends of their names."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(buffer, "w", compression) as new:
        for entry in old.infolist():
            end = entry.filename.rpartition("/")[2].replace(".", "_")
            new.writestr(entry.filename, changes.get(end, old.read(entry)))
    return buffer.getvalue()


def gguf_bytes(
    *, arch: str | None = "controlvector", tensors: Any = None, extra: bytes = b"", n_extra: int = 0
) -> bytes:
    """A file put together by hand, so that it can be wrong: tensors are name, dims, type, data."""
    listed = [("direction.1", [4], 0, b"\0\0\x80\x3f" * 4)] if tensors is None else tensors

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value.encode())) + value.encode()

    entries = [] if arch is None else [text("general.architecture") + struct.pack("<I", 8)]
    if arch is not None:
        entries[0] += text(arch)
    head = b"GGUF" + struct.pack("<IQQ", 3, len(listed), len(entries) + n_extra)
    head += b"".join(entries) + extra
    body = b""
    for name, dims, kind, numbers in listed:
        head += text(name) + struct.pack("<I", len(dims))
        head += struct.pack(f"<{len(dims)}Q", *dims) + struct.pack("<IQ", kind, len(body))
        body += numbers + b"\0" * (-len(numbers) % 32)
    return head + b"\0" * (-len(head) % 32) + body


ONES = b"\0\0\x80\x3f" * 4
NAN = struct.pack("<f", float("nan")) * 4
HUGE_ARRAY = struct.pack("<Q", 1) + b"a" + struct.pack("<IIQ", 9, 0, 2**60)
HUGE_TEXT = struct.pack("<Q", 1) + b"a" + struct.pack("<IQ", 8, 2**60)
NESTED = struct.pack("<Q", 1) + b"a" + struct.pack("<IIQ", 9, 9, 1)
ODD_ALIGNMENT = struct.pack("<Q", 17) + b"general.alignment" + struct.pack("<II", 4, 3)
ARRAY_ALIGNMENT = struct.pack("<Q", 17) + b"general.alignment" + struct.pack("<IIQ", 9, 0, 0)

GGUF: dict[str, tuple[bytes, str]] = {
    "another arch": (gguf_bytes(arch="llama"), "general.architecture 'llama'"),
    "no arch": (gguf_bytes(arch=None), "general.architecture 'None'"),
    "N = 0": (gguf_bytes(tensors=[("direction.0", [4], 0, ONES)]), "direction.0.*N from 1"),
    "N < 0": (gguf_bytes(tensors=[("direction.-1", [4], 0, ONES)]), "direction.-1"),
    "N not whole": (gguf_bytes(tensors=[("direction.1.5", [4], 0, ONES)]), "direction.1.5"),
    "N in disguise": (gguf_bytes(tensors=[("direction.01", [4], 0, ONES)]), "direction.01"),
    "N in other digits": (gguf_bytes(tensors=[("direction.٣", [4], 0, ONES)]), "N from 1"),
    "another tensor": (gguf_bytes(tensors=[("output.weight", [4], 0, ONES)]), "output.weight"),
    "no tensor": (gguf_bytes(tensors=[]), "0 tensors"),
    "a layer twice": (gguf_bytes(tensors=[("direction.1", [4], 0, ONES)] * 2), "2 tensors for 1"),
    "two dimensions": (gguf_bytes(tensors=[("direction.1", [2, 2], 0, ONES)]), "2 dimensions"),
    "no numbers": (gguf_bytes(tensors=[("direction.1", [0], 0, b"")]), "direction.1 of 0 numbers"),
    "half precision": (gguf_bytes(tensors=[("direction.1", [4], 1, ONES)]), "type 1; wanted F32"),
    "mixed widths": (
        gguf_bytes(tensors=[("direction.1", [4], 0, ONES), ("direction.2", [2], 0, ONES[:8])]),
        r"widths \[2, 4\]",
    ),
    "NaN": (gguf_bytes(tensors=[("direction.3", [4], 0, NAN)]), r"NaN.*resid_post\.3"),
    "norm zero": (gguf_bytes(tensors=[("direction.3", [4], 0, bytes(16))]), r"zero.*resid_post\.3"),
    "claims numbers": (gguf_bytes(tensors=[("direction.1", [2**62], 0, ONES)]), "cut short"),
    "overlaps": (
        gguf_bytes(tensors=[(f"direction.{n}", [4], 0, b"") for n in range(1, 40)]) + ONES,
        "overlap",
    ),
    "a huge array": (gguf_bytes(extra=HUGE_ARRAY, n_extra=1), "claims more than it holds"),
    "a huge text": (gguf_bytes(extra=HUGE_TEXT, n_extra=1), "claims more than it holds"),
    "arrays in arrays": (gguf_bytes(extra=NESTED, n_extra=1), "'a' as an array of type 9"),
    "an odd alignment": (gguf_bytes(extra=ODD_ALIGNMENT, n_extra=1), "general.alignment 3"),
    "a list as alignment": (gguf_bytes(extra=ARRAY_ALIGNMENT, n_extra=1), "alignment None"),
    "a key twice": (gguf_bytes(extra=HUGE_TEXT[:9] + struct.pack("<IB", 7, 1) + HUGE_TEXT[:9]
                    + struct.pack("<IB", 7, 1), n_extra=2), "key 'a' twice"),
    "countless entries": (gguf_bytes(n_extra=2**40), "twice|cut short"),
    "version 1": (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "GGUF version 1"),
    "big endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "GGUF version 50331648"),
    "only a magic": (b"GGUF", "cut short"),
    "a name that is no text": (
        gguf_bytes().replace(b"direction.1", b"direction\xff1"),
        "tensor name that is no UTF-8",
    ),
}  # fmt: skip


def paper(value: object) -> bytes:
    return saved(value)


DEFLATED = zipfile.ZIP_DEFLATED
VIEW = torch.ones(1).expand(2**20, 2**20)
ROWS = torch.ones(5, 4)
PICKLES: dict[str, tuple[str, bytes, str]] = {
    "one row": (PAPER, paper(torch.ones(1, 4)), r"shape \[1, 4\]"),
    "two rows": (PAPER, paper(torch.ones(2, 4)), r"shape \[2, 4\]"),
    "one axis": (PAPER, paper(torch.ones(4)), r"tensor of shape \[4\]"),
    "three axes": (PAPER, paper(torch.ones(5, 4, 2)), r"shape \[5, 4, 2\]"),
    "no width": (PAPER, paper(torch.ones(5, 0)), r"shape \[5, 0\]"),
    "a list": (PAPER, paper([1.0, 2.0]), "tensor as list"),
    "nothing": (PAPER, paper(None), "tensor as NoneType"),
    "a sparse tensor": (PAPER, paper(ROWS.to_sparse()), "asks for .*_rebuild_sparse_tensor"),
    "a huge view": (PAPER, paper(VIEW), "wanted at most"),
    "NaN": (PAPER, paper(ROWS * float("nan")), r"NaN.*resid_post\.0"),
    "infinite": (PAPER, paper(ROWS * float("inf")), r"infinite.*resid_post\.0"),
    "norm zero": (PAPER, paper(ROWS * torch.tensor([[1.0], [1], [0], [1], [1]])), r"resid_post\.1"),
    "no zip": (PAPER, b"PK\x03\x04" + bytes(40), "no whole zip file"),
    "cut short": (PAPER, paper(ROWS)[:-30], "no whole zip file"),
    "old format": (PAPER, pickle.dumps([1]), "bytes that begin with"),
    "compressed": (PAPER, rezipped(paper(torch.zeros(500, 500)), DEFLATED), "compressed"),
    "no pickle": (PAPER, rezipped(paper(ROWS), 0, data_pkl=b""), "damaged"),
    "half a pickle": (PAPER, rezipped(paper(ROWS), 0, data_pkl=b"\x80\x02}q"), "damaged"),
    "a foreign zip": (PAPER, rezipped(b"PK\x05\x06" + bytes(18), 0), "0 data.pkl"),
    "a class": (PAPER, paper(collections.Counter("aab")), "asks for collections Counter"),
    "axis as text": ("axis.pt", saved({"axis": "none"}), "field 'axis' as str"),
    "layer_activations as list": ("sv.pt", saved({"layer_activations": [1]}), "no mapping"),
    "no layers": ("sv.pt", saved({"layer_activations": {}}), "width none"),
    "layer_type": (
        "sv.pt",
        saved({"layer_activations": {1: ROWS[0]}, "layer_type": "self_attn"}),
        "layer_type 'self_attn'",
    ),
    "negative layer": ("sv.pt", saved({"layer_activations": {-1: ROWS[0]}}), "layer '-1'"),
    "layer as text": ("sv.pt", saved({"layer_activations": {"1": ROWS[0]}}), "layer '1'"),
    "layer as truth": ("sv.pt", saved({"layer_activations": {True: ROWS[0]}}), "layer 'True'"),
    "whole numbers": ("axis.pt", saved({"axis": [torch.ones(2).half()]}), "field 'axis' as list"),
    "mixed widths": (
        "sv.pt",
        saved({"layer_activations": {1: torch.ones(3), 2: torch.ones(4)}}),
        r"3 at resid_post\.1, 4 at resid_post\.2",
    ),
    "NaN in a layer": (
        "sv.pt",
        saved({"layer_activations": {4: torch.full((3,), float("nan"))}}),
        r"NaN.*resid_post\.4",
    ),
    "a capping configuration": (
        "capping_config.pt",
        saved({"vectors": {}, "experiments": []}),
        "formats.read_capping",
    ),
}  # fmt: skip


def refused(path: Path, complaint: str, read: Reader = formats.read) -> None:
    """Exactly one `FormatError` that begins with the file and says the field; nothing appears."""
    before = sorted(path.parent.iterdir())
    with pytest.raises(FormatError) as raised:
        read(path)
    assert type(raised.value) is FormatError
    assert str(raised.value).startswith(f"{path}: ")
    assert str(raised.value).count(str(path)) == 1
    assert re.search(complaint, str(raised.value), re.DOTALL), str(raised.value)
    assert sorted(path.parent.iterdir()) == before


@pytest.mark.parametrize("name", GGUF)
def test_a_wrong_gguf_is_one_error(tmp_path: Path, name: str) -> None:
    content, complaint = GGUF[name]
    path = tmp_path / "evil.gguf"
    path.write_bytes(content)
    refused(path, complaint)


def test_the_gguf_built_by_hand_is_right_before_it_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "evil.gguf"
    path.write_bytes(gguf_bytes())
    assert formats.read(path).sites == (pv.resid_post(1),)
    (tensor,) = gguf.GGUFReader(path).tensors
    assert np.array_equal(tensor.data, np.ones(4, np.float32))


@pytest.mark.parametrize("name", PICKLES)
def test_a_wrong_torch_file_is_one_error(tmp_path: Path, name: str) -> None:
    file, content, complaint = PICKLES[name]
    path = tmp_path / file
    path.write_bytes(content)
    refused(path, complaint)


@pytest.mark.parametrize("read", [formats.read, formats.read_capping, formats.experiments])
@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("protocol", [2, 4])
def test_a_malicious_pickle_runs_nothing(
    tmp_path: Path, read: Reader, inside: bool, protocol: int
) -> None:
    sentinel = tmp_path / "executed"
    bomb = Executed(sentinel)
    value = {"layer_activations": {1: bomb}, "layer_type": bomb} if inside else bomb
    buffer = io.BytesIO()
    torch.save(value, buffer, pickle_protocol=protocol)
    path = tmp_path / PAPER
    path.write_bytes(buffer.getvalue())
    refused(path, "got a pickle that asks for .*and nothing was run", read)
    assert not sentinel.exists()
    torch.load(path, weights_only=False)  # the pickle is a real one
    assert sentinel.exists()


def test_names_that_a_process_allowed_stay_closed(tmp_path: Path) -> None:
    """torch's own list is open to all of a process; ours is not."""
    path = tmp_path / PAPER
    path.write_bytes(saved(Allowed(tmp_path / "executed")))
    with torch.serialization.safe_globals([make]):
        refused(path, "asks for .*make")
        torch.load(path, weights_only=True)
    assert (tmp_path / "executed").exists()


@pytest.mark.parametrize("cut", [0, 1, 7, 8, 40, -13])
@pytest.mark.parametrize("format", ["native", "gguf", "steering-vectors"])
def test_a_truncated_file_is_one_error(tmp_path: Path, format: Any, cut: int) -> None:
    path = tmp_path / "evil.file"
    one = pv.PersonaVector(trait="evil", sites=[pv.resid_post(1)], directions=torch.ones(1, 5))
    formats.write(one, path, format=format)
    path.write_bytes(path.read_bytes()[:cut])
    refused(path, "got|cannot")
    refused(path, "got|cannot", lambda file: formats.read(file, format=format))


def test_what_is_no_file_is_one_error(tmp_path: Path) -> None:
    refused(tmp_path / "none", r"cannot be read \(No such file")
    refused(tmp_path, "no regular file", formats.read)
    os.mkfifo(tmp_path / "pipe")
    refused(tmp_path / "pipe", "no regular file")
    (tmp_path / "huge").touch()
    os.truncate(tmp_path / "huge", 2**30 + 1)  # sparse: it takes no room
    refused(tmp_path / "huge", "wanted at most 1073741824: is this a model")
    (tmp_path / "nothing").touch()
    refused(tmp_path / "nothing", "bytes that begin with b''")


@pytest.mark.parametrize("setting", [{"format": "pt"}, {"variant": "mean"}, {"trait": "a/b"}])
def test_a_wrong_choice_is_one_error(tmp_path: Path, setting: dict[str, Any]) -> None:
    path = tmp_path / PAPER
    torch.save(ROWS, path)
    refused(path, f"got {next(iter(setting))}", lambda file: formats.read(file, **setting))


def test_a_folder_that_is_not_there_is_one_error(tmp_path: Path) -> None:
    one = pv.PersonaVector(trait="evil", sites=[pv.resid_post(1)], directions=torch.ones(1, 5))
    for format in ("native", "gguf", "steering-vectors"):
        with pytest.raises(FormatError, match=r"none/x: .*cannot be written"):
            formats.write(one, tmp_path / "none" / "x", format=format)
    assert list(tmp_path.iterdir()) == []
