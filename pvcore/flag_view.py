"""What readers of a finished scan are given: its columns and rows, without knowing its class."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pvcore.flag_rows import Message
from pvcore.flag_sources import Source
from pvcore.sites import Site


class Row(Protocol):
    """One row and the score it was ranked by."""

    @property
    def id(self) -> str: ...
    @property
    def source(self) -> str: ...
    @property
    def row(self) -> int: ...
    @property
    def score(self) -> float: ...
    @property
    def n_response_tokens(self) -> int: ...


class Scanned(Protocol):
    """A finished scan."""

    @property
    def manifest(self) -> dict[str, Any]: ...
    @property
    def traits(self) -> tuple[str, ...]: ...
    @property
    def columns(self) -> list[str]: ...
    @property
    def sources(self) -> tuple[Source, ...]: ...
    @property
    def datasets(self) -> Mapping[str, Any]: ...

    def column(self, trait: str, *, site: Site | None = None, score: str = "difference") -> str: ...

    def rejected(self) -> Iterator[dict[str, Any]]: ...

    def values(self, columns: Sequence[str]) -> Iterator[tuple[Any, NDArray[np.float64]]]: ...

    def top(
        self, trait: str, n: int = 20, *, site: Site | None = None, score: str = "difference"
    ) -> Sequence[Row]: ...

    def conversations(self, rows: Sequence[Any]) -> list[list[Message]]: ...
