"""Compiles kernels for a GPU that is not here, through the launchers that would launch them.

`resources` reads from the binary what it takes: registers, memory it spills to, shared memory and
the instructions that move and multiply.
"""

import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver
from triton.runtime.jit import JITFunction

TOOLS = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")


class CompileOnly(DriverBase):
    """A driver for one architecture that never launches."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target
        self.get_current_device = lambda: 0
        self.get_current_stream = lambda device=None: 0
        self.set_current_device = lambda device: None
        self.get_device_capability = lambda device=0: divmod(int(target.arch), 10)

    @classmethod
    def is_active(cls) -> bool:
        return False

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_interface(self) -> Any:
        return torch.cuda

    def get_benchmarker(self) -> Any:
        return lambda *args, **kwargs: 0.0

    def get_empty_cache_for_benchmark(self) -> torch.Tensor:
        return torch.empty(1)

    def clear_cache(self, cache: Any) -> None:
        """There is none."""

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty


@contextmanager
def compiling(target: GPUTarget) -> Iterator[list[Any]]:
    """What the launchers inside the block would launch is compiled for `target` and listed."""
    made: list[Any] = []
    usual, before = JITFunction.__getitem__, driver._active

    def compile_only(kernel: JITFunction, grid: Any) -> Callable[..., None]:
        # What was compiled is remembered by device alone, whatever its architecture.
        kernel.device_caches.clear()
        return lambda *args, **kwargs: made.append(
            kernel.run(*args, grid=grid, warmup=True, **kwargs)
        )

    driver.set_active(CompileOnly(target))
    JITFunction.__getitem__ = compile_only  # type: ignore[method-assign]
    try:
        yield made
    finally:
        JITFunction.__getitem__ = usual  # type: ignore[method-assign]
        driver.set_active(before)


@dataclass(frozen=True, slots=True, kw_only=True)
class Resources:
    """What a compiled kernel takes. `stack` and `local` are bytes spilled; the rest are counts."""

    registers: int
    stack: int
    local: int
    shared: int
    wide_loads: int
    narrow_loads: int
    wide_stores: int
    narrow_stores: int
    products: int


def resources(kernel: Any) -> Resources:
    """Read a CUDA binary with the tools that come with Triton."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage, sass = (_tool(option, file.name) for option in ("-res-usage", "-sass"))
    found = {name: int(size) for name, size in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    # Of 16-bit rows and of four bytes: what is left when a load is not sixteen bytes.
    narrow = r"\.(?:U16|S16|U8|S8)\b"
    return Resources(
        registers=found["REG"],
        stack=found["STACK"],
        local=found["LOCAL"],
        shared=int(kernel.metadata.shared),
        wide_loads=len(re.findall(r"\b(?:LDG|LDGSTS)\.E[\w.]*\.128\b", sass)),
        narrow_loads=len(re.findall(rf"\bLDG\.E[\w.]*{narrow}", sass)),
        wide_stores=len(re.findall(r"\bSTG\.E[\w.]*\.128\b", sass)),
        narrow_stores=len(re.findall(rf"\bSTG\.E[\w.]*{narrow}", sass)),
        products=len(re.findall(r"\b(?:HGMMA|HMMA)\b", sass)),
    )


def _tool(option: str, path: str) -> str:
    words = [os.path.join(TOOLS, "cuobjdump"), option, path]
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout
