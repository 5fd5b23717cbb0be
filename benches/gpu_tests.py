"""Every test that needs a GPU, run on one, with a record of what passed.

    python -m benches.gpu_tests [--out FOLDER] [--wheels FOLDER]

`--wheels` is a folder of wheels for what the machine lacks (`make gpu-wheels` fills it); they are
put into a folder of their own, and the machine's packages stay as they are.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import torch
import typer

from benches import record
from benches.record import ROOT

NAME = "gpu_tests"
TESTS = (
    "tests/kernels",
    "tests/gpu",
    "tests/test_graph_compilers.py",
    "tests/test_resident.py",
    "tests/test_outflow.py",
)


def run(wheels: Path | None) -> dict[str, object]:
    """The outcome as plain data; without a GPU nothing is run and the record says so."""
    made: dict[str, object] = {
        "name": NAME,
        "command": "python -m benches.gpu_tests",
        "commit": record.commit(),
        "date": record.today(),
        "versions": record.versions(),
        "device": record.device(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
    }
    if not torch.cuda.is_available():
        return made | {"status": "not measured", "reason": "no GPU"}
    paths = [str(ROOT), str(ROOT / "kernels"), *installed(wheels)]
    words = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *TESTS]
    done = subprocess.run(
        words,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        check=False,
    )
    print(done.stdout[-8000:], done.stderr[-2000:])
    summary = (done.stdout.strip().splitlines() or ["nothing was printed"])[-1]
    return made | {"status": "measured" if done.returncode == 0 else "failed", "summary": summary}


def installed(wheels: Path | None) -> list[str]:
    """A folder with the wheels unpacked, to be put on the path behind what the machine has."""
    if wheels is None:
        return []
    target = wheels / "installed"
    if not target.exists():
        words = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
        files = map(str, sorted(wheels.glob("*.whl")))
        subprocess.run([*words, "--target", str(target), *files], check=True)
    return [str(target)]


def main(
    out: Annotated[Path | None, typer.Option(help="Folder for the record.")] = None,
    wheels: Annotated[Path | None, typer.Option(help="Wheels of what is missing.")] = None,
) -> None:
    folder = out or Path(os.environ.get("OUT", record.RESULTS))
    made = run(wheels)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{NAME}.json").write_text(json.dumps(made, indent=2) + "\n", encoding="utf-8")
    print(f"{NAME}: {made['status']}")
    raise typer.Exit(code=made["status"] == "failed")


if __name__ == "__main__":
    typer.run(main)
