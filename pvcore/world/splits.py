"""Seeds and the split into training and held-out material, stable across processes and machines."""

import hashlib
import random
from typing import Literal

Split = Literal["train", "held_out"]

_HELD_OUT_SHARE = 5  # one key in five


def digest(*key: object) -> int:
    """A 64-bit number that depends on nothing but the written form of `key`."""
    text = "\x1f".join(str(part) for part in key)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def seeded(*key: object) -> random.Random:
    """A random stream of its own for `key`."""
    return random.Random(digest(*key))


def split_of(*key: object) -> Split:
    """Which side of the split the material named by `key` is on."""
    return "held_out" if digest("split", *key) % _HELD_OUT_SHARE == 0 else "train"
