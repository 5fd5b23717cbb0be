"""What a batch on the CPU frees stays in the process, and nothing is taken for that."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
GLIBC = platform.libc_ver()[0] == "glibc"
BATCHES, BLOCK = 50, 10 << 20
# Three blocks a batch, as the inner products of a block of a model are: together they are more than
# twice the largest, which is what glibc keeps by itself.
PROGRAM = f"""
import resource, torch
from pvcore.heap import keep_freed

def used(kind):
    return getattr(resource.getrusage(resource.RUSAGE_SELF), kind)

def batch():
    held = [torch.ones({BLOCK}, dtype=torch.uint8) for _ in range(3)]

before = used("ru_maxrss")
CALL
taken = used("ru_maxrss") - before
batch()
before = used("ru_minflt")
for _ in range({BATCHES}):
    batch()
print(used("ru_minflt") - before, taken)
"""


def measured(call: str) -> tuple[int, int]:
    """Pages that the batches had to ask for again, and the KiB that the call itself took."""
    path = os.pathsep.join((str(ROOT), str(ROOT / "kernels")))
    own = {"GLIBC_TUNABLES", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_"}
    unset = {name: value for name, value in os.environ.items() if name not in own}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.replace("CALL", call)],
        capture_output=True,
        text=True,
        check=True,
        env=unset | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )
    pages, taken = done.stdout.split()
    return int(pages), int(taken)


@pytest.mark.skipif(not GLIBC, reason="another allocator, which keeps what it likes")
def test_a_batch_finds_the_memory_of_the_one_before() -> None:
    without, _ = measured("")
    kept, taken = measured("keep_freed()")
    assert without > 3 * BATCHES  # asked for again and again, if only in huge pages
    assert kept < without / 10
    assert taken < 4096
