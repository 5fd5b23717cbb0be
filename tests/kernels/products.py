"""Which matrix products ran, and whether each ran within `reference.precise`."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

ATEN = torch.ops.aten
PRODUCTS = (ATEN.mm, ATEN.addmm, ATEN.addmm_, ATEN.bmm, ATEN.baddbmm)


class Products(TorchDispatchMode):
    """`seen` holds, for each product in order, its name and whether it was within."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *modules: ModuleType) -> None:
        super().__init__()
        self.seen: list[tuple[str, bool]] = []
        self._depth = 0
        for module in modules:
            monkeypatch.setattr(module, "precise", self._within)

    @contextmanager
    def _within(self, device: torch.device) -> Iterator[None]:
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in PRODUCTS:
            self.seen.append((str(func), self._depth > 0))
        return func(*args, **(kwargs or {}))
