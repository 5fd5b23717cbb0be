"""The demo: extract, steer, monitor and time one model, and say which claims hold."""

import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from pvcore.vector_files import pvcore_version
from pvcore.world.demo_caps import capped
from pvcore.world.demo_chats import shown_chats
from pvcore.world.demo_claims import with_claims
from pvcore.world.demo_finetune import finetuned
from pvcore.world.demo_flags import flagged
from pvcore.world.demo_measures import (
    cosines,
    dose_responses,
    extract_all,
    monitoring,
    vector_figures,
    zero_changes_nothing,
)
from pvcore.world.demo_overhead import overhead
from pvcore.world.demo_record import DemoError, DemoRecord, Workload
from pvcore.world.demo_subject import Subject


def run_demo(subject: Subject, work: Workload, *, command: str, quiet: bool = False) -> DemoRecord:
    """Measure everything and judge the claims; progress goes to standard error."""
    _require_layers(subject, work)
    with _bar(quiet) as bar:
        extractions = extract_all(subject, work, bar)
        vectors = {name: extraction.vector for name, extraction in extractions.items()}
        doses = dose_responses(subject, vectors, work, bar)
        monitored = monitoring(subject, vectors, work, bar)
        caps = capped(subject, vectors, work, bar)
        found = flagged(subject, vectors, work, bar)
        trained = finetuned(subject, vectors, work, bar)
        timed = overhead(subject, vectors, work, bar)
    record = DemoRecord(
        command=command,
        commit=commit(),
        date=datetime.now(UTC).date().isoformat(),
        versions=versions(),
        device=str(subject.model.device),
        threads=torch.get_num_threads(),
        model=subject.model.model_id,
        judge=type(subject.judge).__name__,
        in_world=subject.in_world,
        workload=work,
        vectors=tuple(map(vector_figures, extractions.values())),
        cosines=cosines(vectors, work.layer),
        doses=doses,
        monitoring=monitored,
        zero=zero_changes_nothing(subject, vectors, work),
        caps=caps,
        chats=shown_chats(subject, vectors, doses, caps, work),
        overhead=timed,
        flags=found,
        finetunes=trained,
    )
    return with_claims(record)


def _bar(quiet: bool) -> Progress:
    columns = (TextColumn("{task.description:<20}"), BarColumn())
    ends = (MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, *ends, console=Console(stderr=True), disable=quiet)


def _require_layers(subject: Subject, work: Workload) -> None:
    n_layers = subject.model.n_layers
    for layer in (*work.layers, work.monitoring_layer):
        if not 0 <= layer < n_layers:
            raise DemoError(
                f"got layer {layer}; this model has layers 0 to {n_layers - 1}: choose among them"
            )


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries whose change could change a figure."""
    libraries = {name: version(name) for name in ("torch", "transformers")}
    return {"python": platform.python_version(), "pvcore": pvcore_version()} | libraries


def commit() -> str:
    """The commit this code stands at, "+dirty" when files differ from it; "" outside a checkout."""
    here = Path(__file__)
    known = _git("ls-files", "--error-unmatch", here.name).returncode == 0
    if not known:
        return ""
    changed = _git("diff", "--quiet", "HEAD").returncode != 0
    return _git("rev-parse", "HEAD").stdout.strip() + ("+dirty" if changed else "")


def _git(*command: str) -> subprocess.CompletedProcess[str]:
    folder = str(Path(__file__).parent)
    try:
        return subprocess.run(
            ["git", "-C", folder, *command], capture_output=True, text=True, check=False
        )
    except OSError:  # no git on this machine
        return subprocess.CompletedProcess(command, returncode=1, stdout="")
