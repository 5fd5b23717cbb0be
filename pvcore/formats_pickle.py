"""Pickles: the only door to them. Zip files of `torch.save`, plain containers and tensors only.

Before torch unpickles anything, the names in the pickle are compared with a list that is closed
here: what a process added to torch's own list (`add_safe_globals`) opens nothing. torch is given
an archive built here from what was checked, never the one that came.
"""

import io
import pickletools
import struct
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pvcore.errors import FormatError

OLDEST_TORCH = (2, 10)
PICKLE = "/data.pkl"
# Far above any vector file (126 layers of width 16384 are 2 million numbers), far below a machine.
MOST_NUMBERS = 2**26
PLAIN = frozenset(
    {
        "collections OrderedDict",
        "_codecs encode",  # how pickles of protocol 2 spell bytes
        "torch._utils _rebuild_tensor_v2",
        *(f"torch {kind}Storage" for kind in ("Float", "Double", "Half", "BFloat16")),
    }
)
# How NumPy 1 and 2 pickle one number, as in a threshold that was computed with NumPy, and what is
# called instead: names of our own, which mean nothing to what else unpickles in this process.
NUMPY = {
    "numpy.core.multiarray scalar": b"cpvcore\nnumpy_number\n",
    "numpy._core.multiarray scalar": b"cpvcore\nnumpy_number\n",
    "numpy dtype": b"cpvcore\nnumpy_dtype\n",
}
NUMPY_NUMBERS = {"f2": "<e", "f4": "<f", "f8": "<d", "i1": "<b", "i2": "<h", "i4": "<i", "i8": "<q"}
_allowing = threading.Lock()


def load(data: bytes) -> object:
    """What `torch.save` wrote: dicts, lists, tuples, texts, numbers and CPU tensors.

    Raises `FormatError` for older torch, other classes, compressed or damaged files.
    """
    _require_torch()
    entries = _entries(data)
    (name,) = [name for name in entries if name.endswith(PICKLE)]
    entries[name] = _vetted(entries[name])
    try:
        with _numpy_stand_ins():
            return torch.load(_archive(entries), map_location="cpu", weights_only=True)
    # Hostile bytes make the unpickler fail in any way: its stack machine trusts its input.
    except Exception as error:
        raise FormatError(
            f"got a damaged torch file ({type(error).__name__}: {str(error)[:120]}); wanted it "
            "as torch.save wrote it: copy it again"
        ) from None


def dump(value: object) -> bytes:
    """The bytes that `torch.save` writes; equal values give equal bytes."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def matrix(value: object, field: str) -> Tensor:
    """`value` as float32 `[rows, d_model]`, copied; `FormatError` names `field`."""
    return _numbers(value, field, 2)


def row(value: object, field: str) -> Tensor:
    """`value` as float32 `[d_model]`, copied; `FormatError` names `field`."""
    return _numbers(value, field, 1)


def _numbers(value: object, field: str, n_dims: int) -> Tensor:
    wanted = "[rows, d_model]" if n_dims == 2 else "[d_model]"
    if type(value) is not Tensor or not value.is_floating_point():
        kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise FormatError(f"got {field} as {kind}; wanted a floating-point tensor {wanted}")
    if value.layout != torch.strided or value.device.type != "cpu":
        raise FormatError(f"got {field} as {value.layout} on {value.device}; wanted a dense tensor")
    if value.ndim != n_dims or 0 in value.shape:
        raise FormatError(f"got {field} of shape {list(value.shape)}; wanted {wanted}")
    # A view may claim any shape over a storage of one number; only then would copying it be a bomb.
    if value.numel() > MOST_NUMBERS:
        raise FormatError(
            f"got {field} of shape {list(value.shape)}; wanted at most {MOST_NUMBERS} numbers"
        )
    return value.detach().to(torch.float32, copy=True).contiguous()


def _require_torch() -> None:
    digits = torch.__version__.split("+")[0].split(".")[:2]
    if tuple(map(int, digits)) < OLDEST_TORCH:
        raise FormatError(
            f"got torch {torch.__version__}, whose unpickler a hostile file can corrupt "
            "(CVE-2026-24747); wanted 2.10 or newer: update torch, or convert the file elsewhere"
        )


def _entries(data: bytes) -> dict[str, bytes]:
    """The entries of an archive with one pickle. torch compresses none, so none may be."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            listed = archive.infolist()
            packed = [entry.filename for entry in listed if entry.compress_type]
            claimed = sum(entry.file_size for entry in listed)
            pickles = [entry for entry in listed if entry.filename.endswith(PICKLE)]
            if packed or claimed > len(data) or len(pickles) != 1:
                raise FormatError(
                    f"got a zip file with {len(pickles)} data.pkl, {len(packed)} compressed "
                    f"entries and {claimed} bytes claimed in {len(data)}; wanted it as torch.save "
                    "writes it"
                )
            return {entry.filename: archive.read(entry) for entry in listed}
    except FormatError:
        raise
    except Exception as error:  # zipfile raises a dozen types on damaged archives
        raise FormatError(
            f"got no whole zip file of torch.save ({str(error)[:120]}); wanted one: files older "
            "than torch 1.6 must be loaded and saved again where they are trusted"
        ) from None


def _archive(entries: dict[str, bytes]) -> io.BytesIO:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    buffer.seek(0)
    return buffer


def _vetted(pickled: bytes) -> bytes:
    """The pickle with NumPy's names replaced by ours; `FormatError` for names on no list."""
    pieces, taken, foreign = [], 0, set()
    try:
        for opcode, argument, at in pickletools.genops(pickled):
            if opcode.name == "GLOBAL" and argument in NUMPY:
                start = at or 0  # None for streams that cannot tell; bytes can
                pieces += [pickled[taken:start], NUMPY[argument]]
                taken = start + len(f"c{argument}\n")
            elif opcode.name in {"STACK_GLOBAL", "EXT1", "EXT2", "EXT4"}:
                foreign.add(opcode.name)  # a name put together at run time is on no list
            elif opcode.name in {"GLOBAL", "INST"} and argument not in PLAIN:
                foreign.add(str(argument))
    except Exception as error:  # as for any bytes that are no pickle
        raise FormatError(
            f"got a damaged pickle ({str(error)[:120]}); wanted it as torch.save wrote it: "
            "copy the file again"
        ) from None
    if foreign:
        raise FormatError(
            f"got a pickle that asks for {', '.join(sorted(foreign))[:200]}; wanted plain "
            "containers and tensors only, and nothing was run: save a dict of tensors with "
            "torch.save instead"
        )
    return b"".join([*pieces, pickled[taken:]])


@dataclass(slots=True)
class _NumpyDtype:
    """Stands in for `numpy.dtype`: of a pickled number only the code of its type is needed."""

    code: Any = ""
    align: Any = False
    copy: Any = True
    order: Any = "<"

    def __setstate__(self, state: Any) -> None:
        self.order = state[1]


def _numpy_number(dtype: Any, raw: Any) -> float | int:
    """Stands in for `numpy.core.multiarray.scalar`."""
    layout = NUMPY_NUMBERS[dtype.code]
    if dtype.order not in {"<", "|"}:
        raise ValueError(f"byte order {dtype.order!r}")
    number: float | int = struct.unpack(layout, raw)[0]
    return number


@contextmanager
def _numpy_stand_ins() -> Iterator[None]:
    """Let torch read NumPy's numbers through our own classes, in one thread at a time."""
    ours: list[Any] = [
        (_NumpyDtype, "pvcore.numpy_dtype"),
        (_numpy_number, "pvcore.numpy_number"),
    ]
    with _allowing, torch.serialization.safe_globals(ours):
        yield
