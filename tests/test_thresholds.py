"""Calibrated thresholds: how often data like the neutral data rings, on values not used."""

import pytest
import torch

import pvcore as pv
from pvcore.alarms import AlarmBell
from pvcore.errors import StatisticsError
from pvcore.thresholds import alarm_levels

SITES = (pv.resid_post(0), pv.resid_post(2))


def drawn(count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, count, generator=generator, dtype=torch.float64) * 2 + 1


def test_the_stated_rate_holds_on_new_data() -> None:
    """The interval covers the true rate of each level in nearly all of 100 calibrations."""
    future = drawn(20000, seed=1)
    covered = 0
    for seed in range(100):
        found = alarm_levels({"evil": drawn(400, seed=100 + seed)}, SITES, percentile=95)
        for level, row in zip(found.levels, future, strict=True):
            true = float((row > level.threshold.high).double().mean())
            covered += level.interval.low <= true <= level.interval.high
    assert 180 <= covered < 200


def test_levels_go_straight_into_an_alarm_bell() -> None:
    found = alarm_levels(
        {"evil": drawn(200, 3), "humor": drawn(200, 4) + 5}, SITES, percentile=90, low_percentile=50
    )
    bell = AlarmBell(found.alarms, ["evil", "humor"], SITES)
    high = found.levels[1].threshold.high
    scores = {"evil": torch.tensor([[0.0], [high + 0.1]]), "humor": torch.zeros(2, 1)}
    (alarm,) = bell.ring(0, scores)
    assert (alarm.site, alarm.threshold) == (SITES[1], high)
    assert found.levels[1].threshold.low is not None
    assert found.levels[1].threshold.low < high
    assert [str(one.site) for one in found.at(2).levels] == ["resid_post.2"] * 2
    with pytest.raises(StatisticsError, match=r"got resid_post.1; these levels are for"):
        found.at(1)


@pytest.mark.parametrize(
    ("values", "settings", "text"),
    [
        (drawn(19, 0), {}, "19 neutral values"),
        (drawn(30, 0), {"percentile": 100.0}, "percentile 100"),
        (drawn(30, 0), {"low_percentile": 0.0}, "percentile 0"),
        (drawn(30, 0)[:1], {}, "1 rows of evil for 2 sites"),
        (drawn(30, 0) / 0, {}, "all finite"),
    ],
)
def test_too_little_or_broken_data_is_refused(values, settings, text) -> None:
    with pytest.raises(StatisticsError, match=text):
        alarm_levels({"evil": values}, SITES, **settings)
