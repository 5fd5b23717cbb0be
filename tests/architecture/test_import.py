"""`import pvcore` loads no heavy library and leaves the process as it found it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("nnsight", "triton", "transformer_lens", "transformers")
# torch comes first: pvcore imports it, and what torch does to the process is torch's affair.
PROBE = """
import builtins, json, logging, os, random, signal, sys, threading, warnings
import torch

def state():
    return {
        "torch.Tensor": {name: id(value) for name, value in vars(torch.Tensor).items()},
        "torch.nn.Module": {name: id(value) for name, value in vars(torch.nn.Module).items()},
        "torch.autograd.backward": id(torch.autograd.backward),
        "torch settings": (
            torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads(),
            torch.are_deterministic_algorithms_enabled(), torch.initial_seed(),
        ),
        "object": (hasattr(object, "save"), len(object.__subclasses__()) > 0),
        "builtins": {name: id(value) for name, value in vars(builtins).items() if name != "_"},
        "warnings.filters": list(warnings.filters),
        "os.environ": dict(os.environ),
        "sys.excepthook": (id(sys.excepthook), id(threading.excepthook)),
        "sys.displayhook": id(sys.displayhook),
        "sys.path": list(sys.path),
        "sys.meta_path": [id(finder) for finder in sys.meta_path],
        "recursion limit": sys.getrecursionlimit(),
        "random state": hash(random.getstate()),
        "root logger": (logging.root.level, len(logging.root.handlers)),
        "signal handlers": [id(signal.getsignal(s)) for s in (signal.SIGINT, signal.SIGTERM)],
        "threads": threading.active_count(),
    }

before = state()
import pvcore
after = state()
print(json.dumps({
    "file": pvcore.__file__,
    "loaded": sorted(set(sys.modules) & set(HEAVY)),
    "changed": [name for name in before if before[name] != after[name]],
}))
"""


def import_pvcore(root: Path) -> dict[str, str | list[str]]:
    command = [sys.executable, "-c", f"HEAVY = {HEAVY}\n{PROBE}"]
    environment = os.environ | {"PYTHONPATH": str(root / "kernels")}
    result = subprocess.run(
        command, cwd=root, env=environment, capture_output=True, text=True, check=True
    )
    report: dict[str, str | list[str]] = json.loads(result.stdout)
    assert Path(str(report["file"])).is_relative_to(root)
    return report


def test_importing_pvcore_loads_nothing_heavy_and_changes_nothing() -> None:
    report = import_pvcore(ROOT)
    assert report["loaded"] == []
    assert report["changed"] == []


def test_the_import_guard_can_fail(tmp_path: Path) -> None:
    package = tmp_path / "pvcore"
    package.mkdir()
    for name in HEAVY:
        (tmp_path / f"{name}.py").touch()
    (package / "__init__.py").write_text(
        """
import logging, os, sys, threading, warnings
import nnsight, torch, transformer_lens, transformers, triton
torch.Tensor.backward = lambda self: None
torch.nn.Module.steer = None
torch.autograd.backward = None
torch.set_num_threads(torch.get_num_threads() + 1)
__builtins__["save"] = None
warnings.simplefilter("ignore")
os.environ["PVCORE"] = "1"
sys.excepthook = print
sys.displayhook = print
sys.path.append("elsewhere")
sys.meta_path.append(None)
sys.setrecursionlimit(4321)
logging.basicConfig()
threading.Thread(target=threading.Event().wait, daemon=True).start()
"""
    )
    report = import_pvcore(tmp_path)
    assert report["loaded"] == sorted(HEAVY)
    unbroken = {"object", "random state", "signal handlers"}
    everything = {
        line.split('"')[1] for line in PROBE.splitlines() if line.startswith(" " * 8 + '"')
    }
    assert set(report["changed"]) == everything - unbroken
