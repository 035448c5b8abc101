"""Intervals: their definition, their coverage, and that seeds settle them."""

import math

import numpy as np
import pytest

from prefixkit.config import EvaluationConfig
from prefixkit.evaluation import (
    Interval,
    Ratio,
    Sums,
    difference_interval,
    jackknife_influence,
    jackknife_interval,
    left_out_values,
    ratio_interval,
    share_interval,
    sums_interval,
)
from prefixkit.evaluation import intervals as module
from prefixkit.evaluation.loss import TokenLosses
from prefixkit.evaluation.measures import HeldOutLosses, Measures


def test_a_ratio_weighs_its_items():
    assert Ratio((6.0, 1.0), (2.0, 1.0)).value == pytest.approx(7 / 3)
    assert Ratio.mean([True, False, True, True]).value == 0.75
    assert math.isnan(Ratio((0.0,), (0.0,)).value)


def test_the_interval_is_the_middle_of_the_resamples():
    parts, weights = (3.0, 1.0, 4.0, 1.0, 5.0), (1.0, 1.0, 2.0, 1.0, 3.0)
    generator = np.random.default_rng(9)
    ratios = []
    for drawn in generator.integers(5, size=(400, 5)):
        ratios.append(sum(parts[i] for i in drawn) / sum(weights[i] for i in drawn))
    found = ratio_interval(Ratio(parts, weights), resamples=400, seed=9)
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(ratios, [0.025, 0.975])))


def test_the_interval_of_a_share_is_wilsons():
    """Brown, Cai & DasGupta (2001), Eq. 4, by hand for 9 of 10."""
    z, n, share = 1.959964, 10, 0.9
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    margin = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    found = share_interval([True] * 9 + [False])
    assert (found.low, found.high) == pytest.approx((centre - margin, centre + margin), abs=1e-5)
    assert share_interval([]) is None


def test_a_share_of_one_is_not_certain():
    assert share_interval([True] * 4).low == pytest.approx(0.51, abs=0.01)


@pytest.mark.parametrize("share", [0.9, 0.97])
def test_the_interval_of_a_share_holds_it_as_often_as_it_says(share):
    generator = np.random.default_rng(0)
    held = 0
    for _ in range(400):
        found = share_interval((generator.random(64) < share).tolist())
        held += found.low <= share <= found.high
    assert held / 400 > 0.92  # nominal 0.95; the odds of a false alarm are about 1 in 200


def test_drawing_in_chunks_changes_nothing(monkeypatch):
    ratio = Ratio.mean(list(range(10)))
    whole = ratio_interval(ratio, resamples=300, seed=1)
    monkeypatch.setattr(module, "_CHUNK", 70)
    assert ratio_interval(ratio, resamples=300, seed=1) == whole


def test_a_ratio_made_from_sums_has_the_interval_of_a_ratio():
    parts, weights = (3.0, 1.0, 4.0, 1.0, 5.0), (1.0, 1.0, 2.0, 1.0, 3.0)
    sums = Sums(np.array([parts, weights]).T, lambda both: float(both[0] / both[1]))
    ratio = Ratio(parts, weights)
    assert sums.value == ratio.value
    found, expected = sums_interval(sums, resamples=300, seed=4), ratio_interval(ratio, resamples=300, seed=4)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))


def test_seeds_settle_intervals():
    ratio = Ratio.mean(list(range(10)))
    assert ratio_interval(ratio, resamples=200, seed=0) == ratio_interval(ratio, resamples=200, seed=0)
    assert ratio_interval(ratio, resamples=200, seed=0) != ratio_interval(ratio, resamples=200, seed=1)


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    generator = np.random.default_rng(0)
    hits = 0
    for trial in range(200):
        found = ratio_interval(Ratio.mean(generator.normal(size=60).tolist()), resamples=300, seed=trial)
        hits += found.low <= 0 <= found.high
    assert 178 <= hits <= 199  # 190 expected; the seeds are fixed, so chance cannot fail this


def test_fewer_than_two_items_have_no_interval():
    assert ratio_interval(Ratio((1.0,), (1.0,)), resamples=100, seed=0) is None
    assert difference_interval(Ratio((1.0,), (1.0,)), Ratio.mean([1, 2]), resamples=100, seed=0) is None
    assert sums_interval(Sums(np.ones((1, 2)), lambda both: 1.0), resamples=100, seed=0) is None
    assert left_out_values(["a", "b"], lambda places: 0.5, seed=0) is None
    assert jackknife_interval(0.5, None, low=0.0, high=9.0) is None


def test_resamples_without_weight_are_left_out():
    found = ratio_interval(Ratio((2.0, 0.0), (1.0, 0.0)), resamples=100, seed=0)
    assert found == Interval(2.0, 2.0)
    assert ratio_interval(Ratio((0.0, 0.0), (0.0, 0.0)), resamples=100, seed=0) is None


def test_a_difference_is_as_wide_as_both_together():
    generator = np.random.default_rng(4)
    first, second = (Ratio.mean(generator.normal(loc=loc, size=400).tolist()) for loc in (3, 1))
    found = difference_interval(first, second, resamples=2000, seed=0)
    assert found.low < first.value - second.value < found.high
    assert found.high - found.low == pytest.approx(2 * 1.96 * math.sqrt(2 / 400), rel=0.15)


def test_equal_samples_are_resampled_independently():
    values = Ratio.mean(list(range(50)))
    found = difference_interval(values, values, resamples=500, seed=0)
    assert found.low < 0 < found.high


def test_the_jackknife_of_a_mean_is_students_interval():
    values = np.random.default_rng(2).normal(size=32)

    def mean(places):
        return float(np.mean([values[i] for i in places]))

    found = jackknife_interval(mean(range(32)), left_out_values(["x"] * 32, mean, seed=0), low=-9.0, high=9.0)
    margin = 2.0395134 * values.std(ddof=1) / math.sqrt(32)  # t, 31 degrees of freedom
    assert (found.low, found.high) == pytest.approx((values.mean() - margin, values.mean() + margin), abs=1e-6)


def test_the_jackknife_only_leaves_texts_out():
    seen = []
    left_out_values([str(i) for i in range(70)], lambda places: seen.append(list(places)) or 0.5, seed=3)
    groups, whole = seen, list(range(70))
    assert len(groups) == 32
    assert all(len(set(group)) == len(group) in (67, 68) for group in groups)
    left_out = sorted(place for group in groups for place in set(whole) - set(group))
    assert left_out == whole


def test_the_jackknife_stays_within_the_measures_range():
    found = jackknife_interval(0.99, np.array([0.5, 0.99, 0.99]), low=0.0, high=1.0)
    assert found.high == 1.0
    assert found.low >= 0.0


def test_influences_give_the_variance_that_the_bootstrap_finds():
    """Of a ratio, of a measure made from sums, and of a difference of two ratios over the same texts."""
    generator = np.random.default_rng(6)
    weights = generator.integers(3, 30, size=300).astype(float)
    parts = weights * 2 + generator.normal(0, 5, size=300)
    ratio = Ratio(tuple(parts), tuple(weights))
    sums = Sums(np.array([parts, weights]).T, lambda both: float(np.exp(both[0] / both[1])))
    drawn = generator.integers(300, size=(4000, 300))
    draws = parts[drawn].sum(axis=1) / weights[drawn].sum(axis=1)
    for influence, expected in ((ratio.influence, draws.std()), (sums.influence, np.exp(draws).std())):
        assert influence.sum() == pytest.approx(0.0, abs=1e-9)
        error = math.sqrt(300 / 299 * np.square(influence).sum())
        assert error == pytest.approx(expected, rel=0.08)


def test_the_influence_of_groups_gives_the_jackknifes_error():
    left_out = np.random.default_rng(7).normal(size=32)
    error = math.sqrt(32 / 31 * np.square(jackknife_influence(left_out)).sum())
    assert error == pytest.approx(math.sqrt(31 / 32 * np.square(left_out - left_out.mean()).sum()))


def test_an_interval_follows_an_increasing_function():
    assert Interval(0.0, 1.0).map(math.exp) == Interval(1.0, math.e)


def test_a_single_text_says_nothing_of_others():
    """A variance of 0 over texts would be certainty."""
    measures = Measures(EvaluationConfig())
    one = TokenLosses((3.0,), (2,))
    assert measures.heldout(HeldOutLosses(one, TokenLosses((3.0, 4.0), (2, 2))))["heldout_nll"].influence == ()
    assert measures.heldout(HeldOutLosses(one, TokenLosses((3.0, 4.0), (2, 2))))["steering_gap"].influence == ()
