"""Pools so many conversations and prints the peak resident memory of the process, in KiB.

The conversations are 50 different ones over and over, so that the longest is the same in any run.
The peak is that of this program alone: `getrusage` would count what its parent held when it began.
"""

import sys
from pathlib import Path

import torch

from benches.pooling import RESAMPLES, task_of
from benches.random_models import Shape
from benches.reading import Case, chat_tokenizer

DIFFERENT = 50


def peak() -> int:
    """The most memory this program has held so far, in KiB; Linux keeps count."""
    lines = Path("/proc/self/status").read_text("utf-8").splitlines()
    (held,) = (line.split()[1] for line in lines if line.startswith("VmHWM:"))
    return int(held)


def main() -> None:
    hidden, layers, vocabulary, n = map(int, sys.argv[1:])
    torch.set_num_threads(1)
    shape = Shape(hidden=hidden, layers=layers, vocabulary=vocabulary)
    task = task_of(Case(shape=shape, conversations=DIFFERENT), chat_tokenizer(), seed=0)
    again = -(-n // DIFFERENT)
    task.encoded[:] = (task.encoded * again)[:n]
    task.passed(RESAMPLES)
    print(peak())


if __name__ == "__main__":
    main()
