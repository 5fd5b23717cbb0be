"""The study: the paper's claims on the persona world, over several seeds.

    python -m pvcore.world.study [--folder study] [--workers 2] [--quick]

Every cell is kept when it is done: a study that was stopped goes on where it stopped.
"""

import json
import multiprocessing
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from pvcore.files import write_whole
from pvcore.report import write
from pvcore.world.demo import commit, versions
from pvcore.world.study_cells import QUICK, Cell, Design, cells, preparing
from pvcore.world.study_claims import claims
from pvcore.world.study_measures import Figures, measure
from pvcore.world.study_report import page
from pvcore.world.study_store import Store
from pvcore.world.study_summary import Summary, summarize

app = typer.Typer(add_completion=False)


def run(design: Design, folder: Path, *, workers: int = 2, quiet: bool = False) -> Summary:
    """Measure whatever is missing in the folder, and sum up. `StudyError` for another design."""
    store = Store(folder, design)
    measured: dict[Cell, Figures] = {}
    stages = [list(preparing(design)), list(cells(design))]
    columns = (
        TextColumn("{task.description:<44}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), disable=quiet) as bar:
        task = bar.add_task("study", total=sum(map(len, stages)))
        for stage in stages:
            for cell, figures in _measured(stage, design, store, workers):
                measured[cell] = figures
                bar.update(task, advance=1, description=cell.name)
    return summarize(design, measured)


def _measured(
    stage: Iterable[Cell], design: Design, store: Store, workers: int
) -> Iterator[tuple[Cell, Figures]]:
    """The cells of a stage as they are known; each new one is kept before it is given."""
    missing = []
    for cell in stage:
        figures = store.get(cell)
        if figures is None:
            missing.append(cell)
        else:
            yield cell, figures
    if workers == 1 or len(missing) < 2:
        for cell in missing:
            store.put(cell, figures := _timed(cell, design, store.folder))
            yield cell, figures
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_one_thread) as pool:
        waiting: dict[Future[Figures], Cell] = {
            pool.submit(_timed, cell, design, store.folder): cell for cell in missing
        }
        try:
            for done in as_completed(waiting):
                store.put(waiting[done], figures := done.result())
                yield waiting[done], figures
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _timed(cell: Cell, design: Design, folder: Path) -> Figures:
    """The figures of a cell and its processor time, which a busy machine does not lengthen."""
    begun = time.process_time()
    figures = measure(cell, design, folder)
    return {**figures, "seconds": time.process_time() - begun}


def _one_thread() -> None:
    from transformers.utils import logging

    torch.set_num_threads(1)
    logging.disable_progress_bar()


def record_of(design: Design, summary: Summary, command: str) -> dict[str, Any]:
    """The study as plain data; figures that are undefined are None."""
    content = {
        "command": command,
        "commit": commit(),
        "date": datetime.now(UTC).date().isoformat(),
        "versions": versions(),
        "device": "cpu",
        "design": asdict(design),
        "summary": asdict(summary),
        "claims": [asdict(one) for one in claims(design, summary)],
    }
    plain: dict[str, Any] = json.loads(json.dumps(content), parse_constant=lambda _: None)
    return plain


@app.command()
def main(
    folder: Annotated[Path, typer.Option(help="Where cells are kept.")] = Path("study"),
    workers: Annotated[int, typer.Option(min=1, help="Processes, of one thread each.")] = 2,
    quick: Annotated[
        bool, typer.Option("--quick", help="Tiny: proves the code, no claim.")
    ] = False,
    record: Annotated[Path | None, typer.Option(help="Write the record to this file.")] = None,
) -> None:
    """Run the study, or what is left of it, and write its report."""
    design = QUICK if quick else Design()
    _one_thread()
    summary = run(design, folder, workers=workers)
    content = record_of(design, summary, "python -m pvcore.world.study")
    write(page(design, summary, content), folder / "report.html")
    written = [folder / "report.html"]
    if record is not None:
        write_whole(record, f"{json.dumps(content, indent=1)}\n".encode())
        written.append(record)
    console = Console()
    for claim in content["claims"]:
        console.print(
            f"{'holds' if claim['passed'] else 'fails'}: {claim['claim']}: "
            f"{claim['measured']} (wanted {claim['bound']})",
            markup=False,
        )
    console.print(f"wrote {', '.join(map(str, written))}", markup=False)


if __name__ == "__main__":
    app()
