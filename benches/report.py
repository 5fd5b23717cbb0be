"""Figures in documents: rendered from records between markers, and checked for drift.

`<!-- figures: overhead -->` ... `<!-- end -->` holds the tables of a record,
`<!-- figure: overhead/batch 1/steer one layer/CPU time -->` ... `<!-- end -->` one median, and
`<!-- plot: overhead -->` ... `<!-- end -->` an image that lies beside the records.
"""

import re
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from benches import plots, record, tables
from benches.demo_table import demo_summary
from benches.extraction_table import extraction_summary
from benches.record import RESULTS, ROOT, RecordError
from benches.study_table import study_summary
from pvcore.files import write_whole

KNOWN = (
    *(
        "overhead",
        "breakdown",
        "compiled",
        "grid",
        "gpu_grid",
        "gpu_grid_llama",
        "memory",
        "reading",
        "peers",
        "scaling",
    ),
    *("kernels", "gpu_kernels", "training", "pooling", "flagging", "flags", "million", "kills"),
    *("demo", "extraction", "study"),
)
# Records that are no measurements of speed have tables of their own.
OWN = {"demo": demo_summary, "extraction": extraction_summary, "study": study_summary}
REGION = re.compile(
    r"<!-- (?P<kind>figures?|plot): (?P<what>[^\n]+?) -->(?P<held>.*?)<!-- end -->", re.DOTALL
)
OPENING = re.compile(r"<!-- (?:figures?|plot): ")
NOT_MEASURED = "not measured"
README = ROOT / "README.md"
DOCUMENTS = (README, ROOT / "benches" / "FIGURES.md", ROOT / "kernels" / "README.md")

app = typer.Typer(add_completion=False)


def rendered(document: str, results: Path = RESULTS) -> str:
    """The document with every region as its record says."""
    if len(OPENING.findall(document)) != len(REGION.findall(document)):
        raise RecordError("got a figure region without its own '<!-- end -->'; close each one")

    def fill(region: re.Match[str]) -> str:
        kind, what = region["kind"], region["what"]
        if kind == "figure":
            held = _single(what, results)
        else:
            held = f"\n{(_block if kind == 'figures' else _image)(what, results)}\n"
        return f"<!-- {kind}: {what} -->{held}<!-- end -->"

    return REGION.sub(fill, document)


def regions(document: str) -> list[str]:
    """What the regions of a document show, in order."""
    return [region["what"] for region in REGION.finditer(document)]


def images(document: str) -> list[str]:
    """The plots that a document shows."""
    return [region["what"] for region in REGION.finditer(document) if region["kind"] == "plot"]


def stale(document: str, results: Path = RESULTS) -> dict[str, str | None]:
    """Images of a document that are not what their records give, with what they should be; None
    where there should be no image.
    """
    found = {}
    for name in images(document):
        wanted, path = _drawn(name, results), results / f"{name}.svg"
        held = path.read_bytes() if path.exists() else None
        if held != (None if wanted is None else wanted.encode()):
            found[name] = wanted
    return found


def drifted(document: str, results: Path = RESULTS) -> list[str]:
    """The regions that differ from their records."""
    wanted = rendered(document, results)
    pairs = zip(REGION.finditer(document), REGION.finditer(wanted), strict=True)
    return [got["what"] for got, right in pairs if got["held"] != right["held"]]


def _path(name: str, results: Path) -> Path:
    if name not in KNOWN:
        raise RecordError(f"got a region of record {name!r}; wanted one of {', '.join(KNOWN)}")
    return results / f"{name}.json"


def _block(name: str, results: Path) -> str:
    path = _path(name, results)
    if not path.exists():
        return f"*{name}: {NOT_MEASURED}*"
    if name in OWN:
        return OWN[name](record.read_json(path))
    found = record.read(path)
    if found.cells and all(cell.status == NOT_MEASURED for cell in found.cells.values()):
        reasons = dict.fromkeys(cell.reason for cell in found.cells.values() if cell.reason)
        return f"*{name}: {', '.join([NOT_MEASURED, *reasons])}*"
    return tables.summary(found)


def _image(name: str, results: Path) -> str:
    if name not in plots.PLOTS:
        raise RecordError(f"got a plot {name!r}; wanted one of {', '.join(plots.PLOTS)}")
    try:
        plots.drawn(name, results)
    except plots.Absent as reason:
        return f"*{name}: {reason}*"
    return f"![{plots.PLOTS[name].says}](benches/results/{name}.svg)"


def _drawn(name: str, results: Path) -> str | None:
    try:
        return plots.drawn(name, results)
    except plots.Absent:
        return None


def _single(what: str, results: Path) -> str:
    name, _, label = what.partition("/")
    path = _path(name, results)
    if not path.exists():
        return NOT_MEASURED
    cells = record.read(path).cells
    if label not in cells:
        raise RecordError(f"got figure {label!r}; record {name} has {', '.join(cells)}")
    return tables.figure(cells[label])


@app.command()
def main(
    documents: Annotated[
        list[Path] | None, typer.Argument(help="Documents with figure regions.")
    ] = None,
    results: Annotated[Path, typer.Option(help="The folder of records.")] = RESULTS,
    check: Annotated[
        bool, typer.Option("--check", help="Change nothing; fail if a region differs.")
    ] = False,
) -> None:
    """Fill the figure regions of documents, by default the READMEs, from the records."""
    console = Console(stderr=True, soft_wrap=True)
    wrong = False
    for document in documents or DOCUMENTS:
        try:
            found = _treat(document, results, check=check)
        except (OSError, RecordError) as error:
            console.print(f"{document.name}: {error}", markup=False)
            raise typer.Exit(code=1) from error
        wrong |= bool(found)
        state = "differs from its record; run python -m benches.report" if check else "rendered"
        for what in found:
            console.print(f"{document.name}: {what} {state}", markup=False)
    if check and wrong:
        raise typer.Exit(code=1)


def _treat(document: Path, results: Path, *, check: bool) -> list[str]:
    """The regions and images that differed; unless only checked, they are written anew."""
    text = document.read_text(encoding="utf-8")
    found = drifted(text, results)
    files = stale(text, results)
    if check:
        return [*found, *(f"{name}.svg" for name in files)]
    if found:
        write_whole(document, rendered(text, results).encode())
    for name, svg in files.items():
        path = results / f"{name}.svg"
        if svg is None:
            path.unlink()
        else:
            write_whole(path, svg.encode())
    return [*found, *(f"{name}.svg" for name in files)]


if __name__ == "__main__":
    app()
