"""What the kernels are measured on, and what of it a GPU could do at best. Knows no GPU."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from math import ceil

ROWS = (1, 32, 256, 8192, 65536)
VECTORS = (1, 7, 32, 128, 1024)
WIDTHS = (3584, 4096)  # Qwen2.5-7B and Llama-3.1-8B
LAYERS = 28
# Inputs are rotated until this many times the last cache has passed: decode shapes live in it.
COLD = 3


@dataclass(frozen=True, slots=True)
class Point:
    """Rows of `d` columns in bfloat16, scored on `k` vectors of `bank_bytes` each number."""

    t: int
    k: int
    d: int
    bank_bytes: int = 2

    def __str__(self) -> str:
        return f"{self.t} rows, {self.k} vectors"

    @property
    def read(self) -> int:
        """Bytes a projection moves: rows once, the bank once, scores in float32."""
        return 2 * self.t * self.d + self.bank_bytes * self.k * self.d + 4 * self.t * self.k

    @property
    def steered(self) -> int:
        """Bytes of steering and projecting: the rows are also written."""
        return self.read + 2 * self.t * self.d

    @property
    def flops(self) -> int:
        return 2 * self.t * self.k * self.d


@dataclass(frozen=True, slots=True)
class Ceilings:
    """What this GPU does at best, measured in the same run."""

    copy_bytes_per_us: float
    flops_per_us: float


def points(widths: tuple[int, ...] = WIDTHS) -> Iterator[Point]:
    for d, t, k in product(widths, ROWS, VECTORS):
        yield Point(t, k, d)


def floor_us(moved: int, flops: int, ceilings: Ceilings) -> float:
    """The least time: bytes or arithmetic, whichever binds."""
    return max(moved / ceilings.copy_bytes_per_us, flops / ceilings.flops_per_us)


def binds(point: Point, ceilings: Ceilings) -> str:
    """Whether bytes or arithmetic bind a projection."""
    by_bytes = point.read / ceilings.copy_bytes_per_us
    return "bytes" if by_bytes >= point.flops / ceilings.flops_per_us else "arithmetic"


def rotations(moved: int, cache_bytes: int) -> int:
    """How many copies of the inputs are needed for none to be found in the cache again."""
    return max(2, ceil(COLD * cache_bytes / max(moved, 1)) if moved < COLD * cache_bytes else 2)
