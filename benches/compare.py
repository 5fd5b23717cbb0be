"""A record beside the record of the same name at another git revision: nothing is run again.

Figures are ratios that were each taken within one run, so that records of different days can be
compared where workload and device are the same. A change is marked where either median lies outside
the other record's p20 to p80: what it is less than that, either run could have shown by chance.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from subprocess import CalledProcessError
from typing import Any

from benches import record, tables
from benches.record import ROOT, Cell, Record, RecordError
from pvcore.numerals import MINUS, NONE

# How often something was timed decides how well a figure is known, not what it is a figure of.
REPEATS = {"rounds", "generations", "generations in turns", "whole generations"}
MARK = "◆"


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One figure in both records; None where a record does not have it."""

    label: str
    old: Cell | None
    new: Cell | None

    @property
    def share(self) -> float | None:
        """The change as a share of the old median."""
        old, new = (None if cell is None else cell.p50 for cell in (self.old, self.new))
        return None if old is None or new is None else new / old - 1.0

    @property
    def beyond(self) -> bool:
        """Whether each median lies outside the other record's p20 to p80."""
        if self.share is None or self.old is None or self.new is None:
            return False
        return _outside(self.new, self.old) and _outside(self.old, self.new)


def _outside(one: Cell, other: Cell) -> bool:
    assert one.p50 is not None
    assert other.p20 is not None
    assert other.p80 is not None
    return not other.p20 <= one.p50 <= other.p80


def at_revision(ref: str, name: str, root: Path = ROOT) -> Record:
    """The record as it stands in a commit; `RecordError` where there is none."""
    path = f"benches/results/{name}.json"
    if ref.startswith("-"):
        raise RecordError(f"got revision {ref!r}; wanted a commit, a tag or a branch")
    try:
        text = record.git(root, "show", f"{ref}:{path}")
    except (OSError, CalledProcessError) as error:
        said = (getattr(error, "stderr", "") or str(error)).strip().splitlines()[-1:]
        raise RecordError(
            f"got no {name}.json at {ref!r} ({''.join(said)}); wanted a revision that has the "
            "record: see git log -- benches/results"
        ) from error
    return record.parsed(record.object_in(text, f"{name}.json at {ref}"), f"{name}.json at {ref}")


def changes(old: Record, new: Record) -> list[Change]:
    """Figure by figure, in the new record's order; `RecordError` for another workload or device."""
    if not (old.cells and new.cells):
        raise RecordError(f"got record {new.name!r} without figures; there is nothing to compare")
    for what, before, now in (
        ("name", {"name": old.name}, {"name": new.name}),
        ("device", old.device, new.device),
        ("workload", _workload(old), _workload(new)),
    ):
        if before != now:
            raise RecordError(
                f"got records of another {what}: {'; '.join(_differing(before, now))}; measure "
                "both alike"
            )
    labels = dict.fromkeys([*new.cells, *old.cells])
    return [Change(label=one, old=old.cells.get(one), new=new.cells.get(one)) for one in labels]


def _workload(one: Record) -> dict[str, record.Plain]:
    return {
        key: value
        for key, value in one.workload.items()
        if key not in REPEATS and not tables.is_figure(key)
    }


def _differing(before: Any, now: Any) -> Iterator[str]:
    for key in dict.fromkeys([*before, *now]):
        if before.get(key) != now.get(key):
            yield f"{key} {before.get(key, NONE)} then, {now.get(key, NONE)} now"


def summary(old: Record, new: Record, ref: str) -> str:
    """The comparison in Markdown."""
    found = changes(old, new)
    lines = [
        [one.label, _told(one.old), _told(one.new), _percent(one), MARK if one.beyond else ""]
        for one in found
    ]
    marked = sum(one.beyond for one in found)
    parts = [
        f"{new.name}: {ref} ({old.commit[:12]}, {old.date}) beside now ({new.commit[:12]}, "
        f"{new.date}); {marked} of {len(found)} figures changed by more than both spreads.",
        tables.table(["figure", ref, "now", "change", MARK], lines),
    ]
    if versions := list(_differing(old.versions, new.versions)):
        parts.append(f"Other versions: {'; '.join(versions)}.")
    return "\n\n".join(parts)


def as_json(old: Record, new: Record, ref: str) -> dict[str, Any]:
    """The comparison as plain data."""
    return {
        "name": new.name,
        "base": {"revision": ref, "commit": old.commit, "date": old.date},
        "now": {"commit": new.commit, "date": new.date},
        "other versions": list(_differing(old.versions, new.versions)),
        "figures": {
            one.label: {
                "old": None if one.old is None else asdict(one.old),
                "new": None if one.new is None else asdict(one.new),
                "change": one.share,
                "beyond both spreads": one.beyond,
            }
            for one in changes(old, new)
        },
    }


def _told(cell: Cell | None) -> str:
    return NONE if cell is None else tables.spread(cell)


def _percent(one: Change) -> str:
    if one.share is None:
        return NONE
    # Adding zero to what was rounded takes the sign off a change too small to show.
    return f"{round(one.share, 3) + 0.0:+.1%}".replace("-", MINUS)
