"""The bootstrap without the data agrees with one that has all of it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pvcore.bootstrap import Resamples

N_PAIRS, N_SITES, D_MODEL, N_RESAMPLES = 40, 2, 6, 300


def data(n_pairs: int = N_PAIRS, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Positive and negative rows `[site, pair, d_model]`, apart by a vector of unequal length."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(2, N_SITES, n_pairs, D_MODEL, generator=generator, dtype=torch.float64)
    gap = torch.tensor([0.5, 2.0], dtype=torch.float64)[:, None, None]
    return noise[0] + gap, noise[1]


def filled(positive: Tensor, negative: Tensor, *, batch: int, seed: int = 0) -> Resamples:
    """All pairs counted in, each side in batches of its own."""
    made = Resamples(N_RESAMPLES, N_SITES, D_MODEL, seed=seed)
    for side, rows in ((True, positive), (False, negative)):
        for first in range(0, rows.shape[1], batch):
            chosen = list(range(first, min(first + batch, rows.shape[1])))
            made.add(rows[:, chosen], chosen, [side] * len(chosen))
    return made


def weights(made: Resamples, n_pairs: int) -> Tensor:
    return torch.stack([made.weights(pair) for pair in range(n_pairs)], dim=1)


def test_sums_are_those_of_weighted_copies_of_all_pairs() -> None:
    positive, negative = data()
    made = filled(positive, negative, batch=7)
    held = weights(made, N_PAIRS)
    wanted = torch.einsum("rp,spd->rsd", held, positive - negative)
    assert float((made.sums - wanted).abs().max()) < 1e-10
    assert torch.equal(made.totals, held.sum(1))
    assert float(wanted.abs().max()) > 10


def test_the_order_of_the_pairs_changes_nothing_but_rounding() -> None:
    positive, negative = data()
    one, other = (filled(positive, negative, batch=batch) for batch in (1, 40))
    assert float((one.sums - other.sums).abs().max()) < 1e-10
    assert not torch.equal(one.sums, filled(positive, negative, batch=7, seed=1).sums)


def test_weights_are_of_mean_and_variance_one_and_of_each_pair_alone() -> None:
    made = Resamples(2000, 1, 1, seed=3)
    drawn = torch.stack([made.weights(pair) for pair in range(50)])
    assert float(drawn.mean()) == pytest.approx(1.0, abs=0.02)
    assert float(drawn.var()) == pytest.approx(1.0, abs=0.03)
    # Correlations of independent columns of 2000 are of the order of 0.022.
    assert float((torch.corrcoef(drawn) - torch.eye(50)).abs().max()) < 0.12
    assert torch.equal(made.weights(7), Resamples(2000, 4, 4, seed=3).weights(7))


def test_intervals_are_quantiles_over_resampled_data() -> None:
    positive, negative = data()
    made = filled(positive, negative, batch=9)
    vector = (positive - negative).mean(1)
    found = made.intervals(vector)
    copies = [
        torch.repeat_interleave(torch.arange(N_PAIRS), row.long()) for row in weights(made, N_PAIRS)
    ]
    resampled = torch.stack([(positive - negative)[:, rows].mean(1) for rows in copies])
    unit = vector / vector.norm(dim=1, keepdim=True)
    along = (resampled * unit).sum(-1)
    cosines = along / resampled.norm(dim=-1)
    assert found.low.tolist() == pytest.approx(along.quantile(0.025, dim=0).tolist(), abs=1e-9)
    assert found.high.tolist() == pytest.approx(along.quantile(0.975, dim=0).tolist(), abs=1e-9)
    lowest = cosines.quantile(0.025, dim=0).tolist()
    assert found.cosine_low.tolist() == pytest.approx(lowest, abs=1e-9)
    assert lowest[0] < lowest[1] - 0.05  # the shorter vector is the less certain one


def test_an_interval_holds_the_true_length_as_often_as_it_says() -> None:
    """Along a direction known beforehand, in 200 draws of 60 pairs."""
    inside = 0
    unit = torch.zeros(N_SITES, D_MODEL, dtype=torch.float64)
    unit[:, 0] = 1.0
    for seed in range(200):
        positive, negative = data(60, seed=seed)
        made = filled(positive, negative, batch=60, seed=seed)
        found = made.intervals(unit)
        inside += bool(found.low[1] <= 2.0 <= found.high[1])
    assert 0.88 <= inside / 200 <= 0.99


def test_resamples_without_any_pair_are_left_out() -> None:
    positive, negative = data(1)
    made = filled(positive, negative, batch=1)
    assert 0 < int((made.totals == 0).sum()) < N_RESAMPLES
    found = made.intervals((positive - negative).mean(1))
    assert bool(torch.isfinite(torch.stack([found.low, found.high, found.cosine_low])).all())
    assert found.cosine_low.tolist() == pytest.approx([1.0, 1.0])


def test_no_resamples_hold_nothing() -> None:
    made = Resamples(0, N_SITES, D_MODEL, seed=0)
    made.add(data()[0], list(range(N_PAIRS)), [True] * N_PAIRS)
    assert made.sums.numel() == 0
