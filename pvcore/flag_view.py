"""What readers of a finished scan are given: its data sets, columns and rows."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pvcore.errors import FlagError
from pvcore.flag_estimates import Estimate
from pvcore.flag_origin import Origin
from pvcore.flag_rows import Message
from pvcore.flag_sources import Source
from pvcore.sites import Site


@dataclass(frozen=True, slots=True, kw_only=True)
class FlaggedRow:
    """One row of the data: where it is, the score it was ranked by, and all its scores."""

    id: str
    source: str
    row: int
    score: float
    n_prompt_tokens: int
    n_response_tokens: int
    scores: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetFlags:
    """One source: its counts, and the mean of every score under the name of its column.

    `unanswered` of the scored rows were drawn into a subset, and have no own reply to compare with.
    """

    name: str
    scored: int
    rejected: int
    prompt_tokens: int
    response_tokens: int
    estimates: Mapping[str, Estimate]
    unanswered: int = 0

    def __getitem__(self, column: str) -> Estimate:
        """The estimate of one column, as in `evil/resid_post.19/difference`."""
        if column not in self.estimates:
            raise FlagError(
                f"got column {column!r}; this scan has {', '.join(list(self.estimates)[:6])}, ..."
            )
        return self.estimates[column]


class Scanned(ABC):
    """A finished scan, as selections and reports see it."""

    manifest: dict[str, Any]
    origin: Origin

    @property
    @abstractmethod
    def traits(self) -> tuple[str, ...]: ...

    @property
    @abstractmethod
    def columns(self) -> list[str]: ...

    @property
    @abstractmethod
    def sources(self) -> tuple[Source, ...]: ...

    @property
    @abstractmethod
    def datasets(self) -> dict[str, DatasetFlags]: ...

    @abstractmethod
    def column(self, trait: str, *, site: Site | None = None, score: str = "difference") -> str: ...

    @abstractmethod
    def resolution(self, column: str) -> float: ...

    @abstractmethod
    def rejected(self) -> Iterator[dict[str, Any]]: ...

    @abstractmethod
    def unanswered(self) -> Iterator[dict[str, Any]]: ...

    @abstractmethod
    def values(self, columns: Sequence[str]) -> Iterator[tuple[Any, NDArray[np.float64]]]: ...

    @abstractmethod
    def top(self, trait: str, n: int = 20, *, site: Site | None = None) -> list[FlaggedRow]: ...

    @abstractmethod
    def conversations(self, rows: Sequence[FlaggedRow]) -> list[list[Message]]: ...
