"""The heap of the process: memory that one batch frees should be there for the next."""

import torch

# The allocator follows blocks up to this size, their header counted (mallopt(3), M_MMAP_THRESHOLD).
FOLLOWED, HEADER = 1 << 25, 1 << 16


def keep_freed() -> None:
    """Have glibc keep what a batch on the CPU frees, up to 64 MiB.

    Out of the box it gives large blocks and free ends of its heap back to the system, and the next
    batch pays for every page again: a sixth of a forward of a small model. How much it keeps is
    twice the largest block that the process has freed so far; so one is freed here that nobody
    touched and that took no memory. Other allocators take no notice, and neither does this one
    where somebody has set its limits.
    """
    torch.empty(FOLLOWED - HEADER, dtype=torch.uint8, device="cpu")
