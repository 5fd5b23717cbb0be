"""Progress of a scan: rows, tokens a second, time left, rejected rows."""

import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from math import isnan
from pathlib import Path

from pvcore.flag_shards import Footer, footer_of, footers
from pvcore.numerals import number


class Meter:
    """What the bar shows. Shards that were there already count as rows, and not as speed."""

    def __init__(self) -> None:
        self.rows = self.rejected = self.tokens = 0
        self.share = float("nan")
        self._began = time.monotonic()

    def add(self, footer: Footer, *, fresh: bool) -> None:
        self.rows += footer.scored
        self.rejected += footer.rejected
        self.tokens += footer.tokens if fresh else 0
        self.share = footer.share if footer.share >= 0 else float("nan")

    @property
    def text(self) -> str:
        """One line for a bar."""
        speed = self.tokens / max(time.monotonic() - self._began, 1e-9)
        return f"{self.rows} rows, {number(speed)} tokens/s, {self.rejected} rejected"


@contextmanager
def bar(*, shown: bool) -> Iterator[Callable[[Meter], None]]:
    """What shows a meter on standard error; silent unless `shown`."""
    # Imported here, because rich draws random numbers when it is imported.
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.progress import TimeRemainingColumn as Left

    columns = (TextColumn("flagging"), BarColumn(), TextColumn("{task.description}"))
    ends = (TimeElapsedColumn(), TextColumn("left"), Left())
    with Progress(*columns, *ends, console=Console(stderr=True), disable=not shown) as progress:
        task = progress.add_task("", total=None)

        def show(meter: Meter) -> None:
            total = None if isnan(meter.share) else 1.0
            share = 0.0 if isnan(meter.share) else meter.share
            progress.update(task, description=meter.text, total=total, completed=share)

        yield show


def follow(made: Iterable[int], folder: Path, left: Collection[int], *, shown: bool) -> Meter:
    """Show a scan that others do: which of the shards left come, as they are on the disk."""
    meter, done = Meter(), 0
    for footer in footers(folder):
        if footer.shard not in left:
            meter.add(footer, fresh=False)
            done += 1
    count = done + len(left)
    with bar(shown=shown) as show:
        for shard in made:
            here = footer_of(folder, shard)
            assert here is not None, "a shard is told when it is there"
            meter.add(here, fresh=True)
            done += 1
            meter.share = done / count
            show(meter)
    return meter
