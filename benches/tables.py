"""Tables in Markdown, rendered from records."""

from collections.abc import Iterable, Sequence

from benches.record import Cell, Record
from pvcore.numerals import TIMES


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose first column is text and whose others are figures, set right."""
    rule = ["---", *["---:"] * (len(columns) - 1)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (columns, rule, *rows))


def figure(cell: Cell) -> str:
    """The median alone, or the status."""
    if cell.status != "measured" or cell.p50 is None:
        return cell.status
    return _amount(cell.p50, cell)


def summary(record: Record) -> str:
    """All cells, group by group, with what they are and where they were measured.

    A record without cells shows its checks, which are then the claims themselves.
    """
    parts = [_what(record), *_figures(record)]
    for group, rows in _groups(record).items():
        columns = list(dict.fromkeys(column for cells in rows.values() for column in cells))
        targets = any(cell.target is not None for cells in rows.values() for cell in cells.values())
        head = [group, *columns, *(["wanted"] if targets else [])]
        lines = []
        for row, cells in rows.items():
            known = [cells.get(column, Cell(status="not measured")) for column in columns]
            wanted = next((cell for cell in known if cell.target is not None), None)
            line = [row, *map(spread, known)]
            lines.append([*line, _bound(wanted)] if targets else line)
        parts.append(table(head, lines))
    failed = [cell for cell in record.cells.values() if cell.status == "failed"]
    reasons = dict.fromkeys(cell.reason for cell in failed if cell.reason)
    parts += [f"No figures, because a check failed: {reason}." for reason in reasons]
    if not record.cells:
        parts.append(_claims(record))
    parts.append(_where(record))
    return "\n\n".join(parts)


def provenance(
    *, date: str, device: str, versions: Iterable[tuple[str, str]], commit: str, command: str
) -> str:
    """One line that says where figures come from; empty parts are left out."""
    packages = ", ".join(f"{name} {version}" for name, version in versions)
    parts = (date, device, packages, f"commit {_short(commit)}", f"`{command}`")
    return f"Measured: {'; '.join(filter(None, parts))}."


def counted(value: object, what: str) -> str:
    """A count and its noun, given in the plural."""
    return f"{value} {what.removesuffix('s') if value == 1 else what}"


def _groups(record: Record) -> dict[str, dict[str, dict[str, Cell]]]:
    groups: dict[str, dict[str, dict[str, Cell]]] = {}
    for label, cell in record.cells.items():
        group, row, column = label.split("/")
        groups.setdefault(group, {}).setdefault(row, {})[column] = cell
    return groups


def _what(record: Record) -> str:
    plain = {key: value for key, value in record.workload.items() if not is_figure(key)}
    rest = ", ".join(f"{key} {value}" for key, value in plain.items() if key != "ratio")
    what = str(plain.get("ratio", "ratios"))
    band = ": median (p20 to p80)" if any(cell.n > 1 for cell in record.cells.values()) else ""
    if any(cell.low is not None for cell in record.cells.values()):
        band = ": median [95% interval of the median] (p20 to p80)"
    return f"{what[:1].upper()}{what[1:]}{band}. {rest[:1].upper()}{rest[1:]}."


def is_figure(key: str) -> bool:
    """Whether an entry of the workload is a figure, labelled `group/row/column` as cells are."""
    return key.count("/") == 2


def _figures(record: Record) -> list[str]:
    groups: dict[str, dict[str, dict[str, str]]] = {}
    for key, value in record.workload.items():
        if is_figure(key):
            group, row, column = key.split("/")
            groups.setdefault(group, {}).setdefault(row, {})[column] = str(value)
    found = []
    for group, rows in groups.items():
        columns = list(dict.fromkeys(column for cells in rows.values() for column in cells))
        lines = [[row, *(cells.get(name, "") for name in columns)] for row, cells in rows.items()]
        found.append(table([group, *columns], lines))
    return found


def _claims(record: Record) -> str:
    lines = [
        [name, f"{check.worst:g}", f"≤ {check.bound:g}"] for name, check in record.checks.items()
    ]
    return table(["claim", "measured", "wanted"], lines)


def _where(record: Record) -> str:
    device = ", ".join(
        str(value) if key == "kind" else counted(value, key) for key, value in record.device.items()
    )
    passed = sum(check.passed for check in record.checks.values())
    line = provenance(
        date=record.date,
        device=device,
        versions=record.versions.items(),
        commit=record.commit,
        command=record.command,
    )
    what = "Checks passed before timing" if record.cells else "Claims that hold"
    return f"{what}: {passed} of {len(record.checks)}. {line}"


def _short(commit: str) -> str:
    head, plus, mark = commit.partition("+")
    return f"{head[:12]}{plus}{mark}"


def _ratio(value: float) -> str:
    return f"{value:.3f}{TIMES}" if value < 2 else f"{value:.2f}{TIMES}"


def spread(cell: Cell) -> str:
    """The median with its interval, and with p20 and p80 where they differ, or the status."""
    if cell.status != "measured" or cell.p20 is None or cell.p80 is None:
        return figure(cell)
    if cell.p20 == cell.p80:
        return figure(cell)
    sure = ""
    if cell.low is not None and cell.high is not None:
        sure = f" [{_bare(cell.low, cell)} to {_bare(cell.high, cell)}]"
    return f"{figure(cell)}{sure} ({_bare(cell.p20, cell)} to {_bare(cell.p80, cell)})"


def _bare(value: float, cell: Cell) -> str:
    """A figure without its unit."""
    return _amount(value, cell).split(" ")[0].removesuffix(TIMES)


def _amount(value: float, cell: Cell) -> str:
    return _ratio(value) if cell.unit == "ratio" else f"{value:.4g} {cell.unit}"


def _bound(cell: Cell | None) -> str:
    if cell is None or cell.target is None:
        return ""
    return (
        f"≤ {cell.target:g}{TIMES}" if cell.unit == "ratio" else f"≤ {cell.target:.4g} {cell.unit}"
    )
