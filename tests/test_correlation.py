import math
from dataclasses import replace

import numpy as np
import pytest

from pvcore.correlation import MonitoredReply, correlations
from pvcore.errors import StatisticsError
from pvcore.intervals import fisher


def replies(rows: list[tuple[float, float, int]]) -> list[MonitoredReply]:
    return [MonitoredReply(projection=x, score=y, level=level) for x, y, level in rows]


def test_levels_can_make_r_high_where_replies_are_foretold_backwards() -> None:
    # Within each level the score falls with the projection; the levels themselves rise together.
    rows = [(10.0 * level + x, 40.0 * level - x, level) for level in range(3) for x in (-1, 0, 1)]
    found = correlations(replies([(float(x), float(y), level) for x, y, level in rows]))
    assert found.within == pytest.approx(-1.0)
    assert found.overall > 0.9


def test_one_level_has_the_same_r_twice_and_agrees_with_numpy() -> None:
    generator = np.random.default_rng(3)
    x = generator.normal(size=50)
    y = 40 + 10 * x + generator.normal(size=50) * 10
    found = correlations(replies([(float(a), float(b), 0) for a, b in zip(x, y, strict=True)]))
    assert found.overall == pytest.approx(np.corrcoef(x, y)[0, 1], abs=1e-12)
    assert found.within == pytest.approx(found.overall, abs=1e-12)
    assert abs(found.overall) < 0.99


def test_without_spread_r_is_undefined_not_zero() -> None:
    flat = correlations(replies([(0.1, 5.0, 0), (0.1, 7.0, 0), (0.1, 9.0, 0)]))
    assert math.isnan(flat.overall)
    alone = correlations(replies([(0.1, 5.3, 0), (0.7, 7.1, 1), (0.9, 7.0, 2)]))
    assert math.isnan(alone.within)
    assert alone.overall == pytest.approx(np.corrcoef([0.1, 0.7, 0.9], [5.3, 7.1, 7.0])[0, 1])
    for few in ([], [(0.1, 5.3, 0), (0.7, 7.1, 0)]):
        found = correlations(replies(few))
        figures = (found.overall, found.within, *found.overall_interval, *found.within_interval)
        assert all(map(math.isnan, figures))


def test_replies_with_nan_are_left_out() -> None:
    rows = [(0.0, 1.0, 0), (1.0, 2.5, 0), (2.0, 2.0, 0), (4.0, 2.2, 0), (5.0, 3.0, 0)]
    gap = [(math.nan, 90.0, 0), (50.0, math.nan, 1)]
    assert correlations(replies(rows + gap)) == correlations(replies(rows))


def sample(
    r: float, levels: int, each: int, generator: np.random.Generator
) -> list[MonitoredReply]:
    """Replies whose levels rise together, with correlation `r` inside a level."""
    rows = []
    for level in range(levels):
        x = generator.normal(size=each)
        y = r * x + math.sqrt(1 - r * r) * generator.normal(size=each)
        rows += [
            (float(a + 3 * level), float(b + 3 * level), level) for a, b in zip(x, y, strict=True)
        ]
    return replies(rows)


@pytest.mark.parametrize("interval", ["fisher", "bootstrap"])
def test_intervals_hold_the_true_r_as_often_as_they_say(interval) -> None:
    """80% intervals over many samples: within 3.5 standard errors of 80%."""
    generator = np.random.default_rng(11)
    trials = 300 if interval == "fisher" else 60
    hits = 0
    for trial in range(trials):
        found = correlations(
            sample(0.5, 4, 15, generator),
            confidence=0.8,
            interval=interval,
            resamples=100,
            seed=trial,
        )
        low, high = found.within_interval
        hits += low <= 0.5 <= high
        assert low < found.within < high
        assert found.overall > 0.9 > found.within
    error = math.sqrt(0.8 * 0.2 / trials)
    assert abs(hits / trials - 0.8) < 3.5 * error


def test_every_level_has_its_own_r() -> None:
    generator = np.random.default_rng(5)
    every = sample(0.6, 3, 40, generator)
    found = correlations(every)
    for level, r in found.by_level.items():
        x, y = zip(*((p.projection, p.score) for p in every if p.level == level), strict=True)
        assert r == pytest.approx(np.corrcoef(x, y)[0, 1])
    assert found.mean_within == pytest.approx(np.mean(list(found.by_level.values())))
    assert found.count == 120
    assert found.within_interval.high - found.within_interval.low > 0.05


def test_levels_without_spread_can_be_left_out() -> None:
    generator = np.random.default_rng(5)
    every = sample(0.6, 2, 40, generator)
    still = replies(
        [(float(x), 50.0 + 0.1 * (k % 2), 9) for k, x in enumerate(generator.normal(size=40))]
    )
    assert correlations(every + still, least_spread=0.5) == correlations(every, least_spread=0.5)
    assert correlations(every + still) != correlations(every)


def test_one_seed_gives_one_interval_and_wrong_settings_are_refused() -> None:
    every = sample(0.5, 2, 20, np.random.default_rng(1))
    first, again, other = (
        correlations(every, interval="bootstrap", resamples=50, seed=seed) for seed in (0, 0, 1)
    )
    assert first == again != other
    with pytest.raises(StatisticsError, match="confidence of 95"):
        correlations(every, confidence=95.0)
    with pytest.raises(StatisticsError, match="got 0 resamples"):
        correlations(every, interval="bootstrap", resamples=0)


@pytest.mark.parametrize("size", [1e2, 2e4, 1e6])
def test_projections_that_are_alike_within_each_level_foretell_nothing_there(size) -> None:
    generator = np.random.default_rng(0)
    for _ in range(20):
        middles = size + generator.uniform(size=4)
        rows = [
            MonitoredReply(projection=float(middles[k]), score=generator.uniform(0, 100), level=k)
            for k in range(4)
            for _ in range(7)
        ]
        found = correlations(rows)
        assert math.isnan(found.within)
        assert math.isnan(found.within_interval.low)
        assert not math.isnan(found.overall)


def rollouts(
    levels: int, prompts: int, each: int, generator: np.random.Generator, dust: float = 0.0
) -> list[MonitoredReply]:
    """Replies that share their prompt's projection, and what else it does to scores; r is 0.5."""
    rows = []
    for level in range(levels):
        for prompt in range(prompts):
            x, more = generator.normal(size=2)
            for y in 0.5 * x + math.sqrt(0.5) * more + 0.5 * generator.normal(size=each):
                near = float(x + dust * generator.normal())
                rows.append(
                    MonitoredReply(projection=near, score=float(y), level=level, prompt=prompt)
                )
    return rows


def apart(rows: list[MonitoredReply]) -> list[MonitoredReply]:
    """The same as if each reply had a prompt of its own."""
    return [replace(row, prompt=place) for place, row in enumerate(rows)]


@pytest.mark.parametrize("interval", ["fisher", "bootstrap"])
def test_intervals_hold_the_true_r_where_replies_share_prompts(interval) -> None:
    """At 80%, at least 80% less 3.5 standard errors; taken as independent, far fewer."""
    generator = np.random.default_rng(7)
    trials = 120 if interval == "fisher" else 50
    hits = {"shared": 0, "apart": 0}
    for trial in range(trials):
        rows = rollouts(3, 15, 8, generator)
        for name, given in (("shared", rows), ("apart", apart(rows))):
            found = correlations(
                given, confidence=0.8, interval=interval, resamples=100, seed=trial
            )
            assert found.prompts == (45 if name == "shared" else 360)
            low, high = found.within_interval
            hits[name] += low <= 0.5 <= high
    error = math.sqrt(0.8 * 0.2 / trials)
    assert hits["shared"] / trials > 0.8 - 3.5 * error
    assert hits["apart"] / trials < 0.6


def test_eight_prompts_are_eight_points_however_often_they_are_answered() -> None:
    rows = rollouts(8, 1, 100, np.random.default_rng(2))
    found = correlations(rows)
    assert (found.count, found.prompts) == (800, 8)
    middle, reach = math.atanh(found.overall), 1.959964 / math.sqrt(8 - 3)
    assert found.overall_interval == pytest.approx(
        (math.tanh(middle - reach), math.tanh(middle + reach)), abs=1e-6
    )
    assert math.isnan(found.within)
    drawn = correlations(rows, interval="bootstrap", resamples=50)
    assert all(map(math.isnan, drawn.overall_interval))


@pytest.mark.parametrize("interval", ["fisher", "bootstrap"])
def test_prompts_are_told_or_known_by_their_projection(interval) -> None:
    rows = rollouts(2, 10, 5, np.random.default_rng(4))
    settings = {"interval": interval, "resamples": 50}
    untold = [replace(row, prompt=None) for row in rows]
    assert correlations(untold, **settings) == correlations(rows, **settings)
    assert correlations(apart(rows), **settings) != correlations(rows, **settings)
    rounded = rollouts(2, 10, 5, np.random.default_rng(4), dust=1e-6)
    assert len({row.projection for row in rounded}) == 100
    for given in (rounded, [replace(row, prompt=None) for row in rounded]):
        found = correlations(given, **settings)
        assert found == correlations(rounded, **settings)
        assert found.prompts == 20


def test_half_precision_rounds_more_and_neighbours_do_not_chain() -> None:
    rows = rollouts(1, 10, 5, np.random.default_rng(4), dust=1e-3)
    untold = [replace(row, prompt=None) for row in rows]
    assert correlations(untold).prompts > 20
    assert correlations(untold, rounding=1e-2).prompts == correlations(rows).prompts == 10
    steps = replies([(k * 5e-5, float(k % 7), 0) for k in range(20001)])
    assert correlations(steps).prompts > 5000
    for share in (-1e-4, 1.0, math.nan):
        with pytest.raises(StatisticsError, match="got a rounding of"):
            correlations(rows, rounding=share)


def uneven(
    levels: int, counts: tuple[int, ...], generator: np.random.Generator
) -> list[MonitoredReply]:
    """As `rollouts`, with so many replies to each prompt of a level; r in a level is 0.5."""
    rows = []
    for level in range(levels):
        for prompt, count in enumerate(counts):
            x, more = generator.normal(size=2)
            scores = 0.5 * x + math.sqrt(0.5) * more + 0.5 * generator.normal(size=count)
            rows += [
                MonitoredReply(projection=x + level, score=y + level, level=level, prompt=prompt)
                for y in scores
            ]
    return rows


def r_of_many(levels: int, counts: tuple[int, ...], generator: np.random.Generator) -> list[float]:
    """Both r of so many prompts of the same make-up that they are the true ones, by numpy."""
    many = uneven(levels, counts * 300, generator)
    x, y, at = np.array([(row.projection, row.score, row.level) for row in many]).T
    inside = [x - at, y - at]  # a level's true mean is its number
    return [float(np.corrcoef(*pair)[0, 1]) for pair in ([x, y], inside)]


@pytest.mark.parametrize(
    ("levels", "counts"),
    [(3, (1,) * 16 + (10,) * 4), (4, (1,) * 9 + (20,)), (3, (1,) * 20 + (40,) * 3)],
    ids=["some of ten", "one of twenty", "three of forty"],
)
def test_intervals_hold_the_true_r_where_prompts_have_unequal_replies(levels, counts) -> None:
    """At 95%, at least 95% less 3.5 standard errors; each prompt as one point, far fewer."""
    generator = np.random.default_rng(17)
    truth, trials, hits = r_of_many(levels, counts, generator), 200, [0, 0, 0]
    for _ in range(trials):
        found = correlations(uneven(levels, counts, generator))
        ends = [found.overall_interval, found.within_interval]
        ends.append(fisher(found.overall, found.prompts))
        for place, (low, high) in enumerate(ends):
            hits[place] += low <= truth[place % 2] <= high
        assert found.prompts == levels * len(counts)
        assert ends[0].high - ends[0].low < 1.9
    least = 0.95 - 3.5 * math.sqrt(0.95 * 0.05 / trials)
    assert min(hits[:2]) / trials > least > hits[2] / trials


def test_equal_replies_leave_fisher_s_interval_as_it_was() -> None:
    found = correlations(rollouts(3, 15, 8, np.random.default_rng(7)))
    for r, interval, count in (
        (found.overall, found.overall_interval, 45),
        (found.within, found.within_interval, 43),
    ):
        middle, reach = math.atanh(r), 1.959964 / math.sqrt(count - 3)
        wanted = (math.tanh(middle - reach), math.tanh(middle + reach))
        assert interval == pytest.approx(wanted, abs=1e-6)
