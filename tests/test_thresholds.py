"""Calibrated thresholds: how often data like the neutral data rings, on values not used."""

import numpy as np
import pytest
import torch

import pvcore as pv
from pvcore.alarms import AlarmBell
from pvcore.errors import StatisticsError
from pvcore.intervals import wilson
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


def test_levels_armed_together_state_how_often_any_of_them_rings() -> None:
    neutral = {"evil": drawn(300, 3), "humor": drawn(300, 4)}
    found = alarm_levels(neutral, SITES, percentile=90)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(0)).tolist()
    setting, held_out = order[::2], order[1::2]
    for level in found.levels:
        row = neutral[level.trait][SITES.index(level.site)]
        assert level.threshold.high == pytest.approx(np.quantile(row[setting].numpy(), 0.9))
        above = row[held_out] > level.threshold.high
        assert level.false_positive_rate == int(above.sum()) / 150
    for some, sites in ((found, SITES), (found.at(2), SITES[1:])):
        rung = 0
        for conversation in held_out:
            scores = {
                trait: torch.stack([row[SITES.index(site)] for site in sites])[
                    :, conversation, None
                ]
                for trait, row in neutral.items()
            }
            rung += bool(AlarmBell(some.alarms, ["evil", "humor"], sites).ring(0, scores))
        assert some.any_rate == rung / 150
        assert some.any_interval == wilson(rung, 150)
    assert found.any_rate > 1.5 * max(level.false_positive_rate for level in found.levels)


def test_the_rate_holds_where_neutral_data_alternates() -> None:
    """Two prompts in turn: halves by turns would state 0% or 100% for the level of the other."""
    values = drawn(400, 5)
    values[:, ::2] += 50
    for data in (values, values.flip(1)):
        for level in alarm_levels({"evil": data}, SITES, percentile=90).levels:
            assert level.interval.low <= 0.1 <= level.interval.high
            assert 0.02 < level.false_positive_rate < 0.25


def test_a_conversation_without_a_value_counts_nowhere() -> None:
    values = drawn(60, 6)
    silent = values.clone()
    silent[:, 10] = torch.nan
    left = torch.cat([values[:, :10], values[:, 11:]], dim=1)
    got, wanted = (alarm_levels({"evil": data}, SITES) for data in (silent, left))
    assert [one.threshold for one in got.levels] == [one.threshold for one in wanted.levels]
    assert got.any_rate == wanted.any_rate


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


def test_traits_are_of_the_same_conversations() -> None:
    with pytest.raises(StatisticsError, match="got 30 and 40 neutral values by trait"):
        alarm_levels({"evil": drawn(30, 0), "humor": drawn(40, 0)}, SITES)
    with pytest.raises(StatisticsError, match="got no neutral values"):
        alarm_levels({}, SITES)
