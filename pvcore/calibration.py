"""Calibration: where the projections of neutral chats lie, so that a threshold means something.

A projection has no zero of its own: chats without a trait project anywhere, and each model, site
and vector has its own spread. Percentiles over neutral chats say how unusual a projection is (the
paper takes the 95th as the bar above which training data is suspect, arXiv 2507.21509, K).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from typing import Any, Literal, cast, get_args

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from pvcore.chats import Chats
from pvcore.errors import CalibrationError
from pvcore.model import HookedModel
from pvcore.plan import Plan
from pvcore.sites import Site
from pvcore.spans import Span, check_span
from pvcore.vectors import PersonaVector, VectorBank

Per = Literal["chat", "token"]
PERCENTILES = (1.0, 5.0, 25.0, 50.0, 75.0, 95.0, 99.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """Percentiles, mean and standard deviation of projections on unit vectors, by site and trait.

    `per="chat"`: one projection a chat, of the mean over its span (for `last_prompt_token` of that
    token). `per="token"`: one for each token of the span. `count` is how many there were at each
    site. Numbers are in units of the residual.
    """

    bank: VectorBank
    span: Span
    per: Per
    percentiles: tuple[float, ...]
    values: Float[Tensor, "n_sites n_vec n_percentiles"]
    means: Float[Tensor, "n_sites n_vec"]
    deviations: Float[Tensor, "n_sites n_vec"]
    chats: int
    count: int

    @property
    def key(self) -> str:
        """What was calibrated: `response_mean`, `response_tokens`, `last_prompt_token`, ..."""
        return calibration_key(self.span, self.per)

    def threshold(self, trait: str, site: Site, percentile: float | int) -> float:
        """The projection that `percentile` percent of the neutral ones do not exceed."""
        if percentile not in self.percentiles:
            known = ", ".join(f"{one:g}" for one in self.percentiles)
            raise CalibrationError(
                f"got percentile {percentile!r}; this calibration has {known}. "
                "Calibrate again with percentiles=(...)"
            )
        return float(self._at(self.values, trait, site)[self.percentiles.index(percentile)])

    def standardised(self, trait: str, site: Site, projection: float | int) -> float:
        """How many standard deviations of neutral projections lie below a projection."""
        mean = float(self._at(self.means, trait, site))
        deviation = float(self._at(self.deviations, trait, site))
        if deviation <= 1e-6 * abs(mean):  # what rounding leaves of chats that are one and the same
            raise CalibrationError(
                f"got neutral chats that all project alike on {trait!r} at {site}; wanted some "
                "spread to measure by. Calibrate on more and other chats"
            )
        return (projection - mean) / deviation

    def vectors(self) -> VectorBank:
        """The vectors of the bank with these numbers in their `calibration`, for their files.

        They stand under the name of each site and then under `key`, beside what stood there.
        """
        calibrated = []
        for vector in self.bank:
            found = {site: dict(held) for site, held in _by_site(vector).items()}
            for site in self.bank.sites:
                found.setdefault(str(site), {})[self.key] = self._record(vector.trait, site)
            calibrated.append(replace(vector, calibration={**vector.calibration, **found}))
        return VectorBank(calibrated, layers=self.bank.sites)

    def _record(self, trait: str, site: Site) -> dict[str, Any]:
        numbers = self._at(self.values, trait, site).tolist()
        return {
            "chats": self.chats,
            "count": self.count,
            "mean": float(self._at(self.means, trait, site)),
            "deviation": float(self._at(self.deviations, trait, site)),
            "percentiles": dict(
                zip((f"{one:g}" for one in self.percentiles), numbers, strict=True)
            ),
        }

    def _at(self, table: Tensor, trait: str, site: Site) -> Tensor:
        if site not in self.bank.sites:
            raise CalibrationError(
                f"got {site}; calibrated are {', '.join(map(str, self.bank.sites))}"
            )
        if trait not in self.bank.traits:
            raise CalibrationError(f"got {trait!r}; calibrated are {', '.join(self.bank.traits)}")
        return table[self.bank.sites.index(site), self.bank.traits.index(trait)]


def calibrate(
    model: HookedModel,
    bank: VectorBank | PersonaVector,
    neutral_chats: Chats,
    *,
    span: Span | str = "response",
    per: Per | str = "chat",
    percentiles: Iterable[float | int] = PERCENTILES,
    batch_size: int = 16,
    check_model: bool = True,
) -> Calibration:
    """How neutral chats project on the vectors of a bank, at each of its sites.

    `per="chat"` averages over the span of each chat, `per="token"` keeps every token's projection
    (one number a token, site and vector). Raises `CalibrationError` for percentiles outside 0 to
    100 and fewer than two projections, and the errors of `model.read` for chats without the span.
    """
    wanted = _checked(percentiles)
    known, unit = check_span(span), _check_per(per)
    stacked = VectorBank(bank) if isinstance(bank, PersonaVector) else bank
    model.check(Plan(monitor=stacked), check_model=check_model)
    projections, chats = _projections(model, stacked, neutral_chats, known, unit, batch_size)
    if projections.shape[-1] < 2:
        raise CalibrationError(
            "got a single projection to calibrate on; wanted two at least, better hundreds. "
            "Give more neutral chats"
        )
    return Calibration(
        bank=stacked,
        span=known,
        per=unit,
        percentiles=wanted,
        values=_tensor(np.moveaxis(np.percentile(projections, wanted, axis=-1), 0, -1)),
        means=_tensor(projections.mean(-1)),
        deviations=_tensor(projections.std(-1)),
        chats=chats,
        count=projections.shape[-1],
    )


def _projections(
    model: HookedModel, bank: VectorBank, chats: Chats, span: Span, per: Per, batch_size: int
) -> tuple[NDArray[np.float64], int]:
    """Projections `[site, vector, chat or token]`, and how many chats they are of."""
    units = bank.units.double()
    parts, n_chats = [], 0
    reduce = "none" if per == "token" else "mean"
    for chosen, acts in model.read_batches(
        chats, sites=bank.sites, span=span, reduce=reduce, batch_size=batch_size
    ):
        assert acts.values is not None, "neither reduction gives moments"
        rows = acts.values.flatten(1, -2)
        inside = ~rows[0].isnan().any(-1)  # tokens past the end of a chat's span are NaN
        parts.append(torch.einsum("srd,skd->skr", rows[:, inside].double(), units))
        n_chats += len(chosen)
    return torch.cat(parts, dim=-1).numpy(), n_chats


def calibration_key(span: Span, per: Per) -> str:
    """The name under which a vector's `calibration` holds such numbers at each site."""
    if span == "last_prompt_token":
        return span
    return f"{span}_tokens" if per == "token" else f"{span}_mean"


def stored_threshold(
    vector: PersonaVector, site: Site, percentile: float | int, *, key: str = "response_mean"
) -> float:
    """A percentile out of a vector's own `calibration`; `CalibrationError` if it has none."""
    held = _by_site(vector).get(str(site), {}).get(key, {})
    found = held.get("percentiles", {}) if isinstance(held, Mapping) else {}
    number = found.get(f"{percentile:g}")
    if not isinstance(number, int | float):
        raise CalibrationError(
            f"got {vector.trait!r} without percentile {percentile:g} of {key} at {site}; wanted a "
            "calibrated vector. Make one with calibrate(model, vector, neutral_chats).vectors()"
        )
    return float(number)


def _by_site(vector: PersonaVector) -> dict[str, Mapping[str, Any]]:
    named = set(map(str, vector.sites))
    return {
        key: held
        for key, held in vector.calibration.items()
        if key in named and isinstance(held, Mapping)
    }


def _check_per(per: str) -> Per:
    if per not in get_args(Per):
        raise CalibrationError(f"got per={per!r}; wanted one of {', '.join(get_args(Per))}")
    return cast(Per, per)


def _checked(percentiles: Iterable[float | int]) -> tuple[float, ...]:
    given = tuple(percentiles)
    fits = all(isinstance(one, int | float) and isfinite(one) and 0 <= one <= 100 for one in given)
    if not given or not fits or len(set(given)) < len(given):
        raise CalibrationError(
            f"got percentiles {', '.join(map(str, given)) or 'none'}; wanted numbers from 0 to "
            "100, each once"
        )
    return tuple(sorted(map(float, given)))


def _tensor(numbers: NDArray[np.float64] | Sequence[float]) -> Float[Tensor, "..."]:
    return torch.from_numpy(np.ascontiguousarray(numbers, dtype=np.float64))
