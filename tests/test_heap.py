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
faults = [used("ru_minflt")]
for _ in range({BATCHES}):
    batch()
    faults.append(used("ru_minflt"))
print(faults[1] - faults[0], faults[-1] - faults[1], taken)
"""


def measured(call: str) -> tuple[float, int]:
    """How many batches' worth of pages the system was asked for again; KiB that the call took."""
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
    once, again, taken = map(int, done.stdout.split())
    return again / once, taken


@pytest.mark.skipif(not GLIBC, reason="another allocator, which keeps what it likes")
def test_a_batch_finds_the_memory_of_the_one_before() -> None:
    # Where the heap begins is drawn for each process, and in some it happens to keep the memory.
    assert any(measured("")[0] > BATCHES / 2 for _ in range(8))
    for _ in range(3):
        again, taken = measured("keep_freed()")
        assert again < 3
        assert taken < 4096
