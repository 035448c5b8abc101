"""Differences between arms against plain calculations, and claims against made-up results whose verdict is known."""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from pydantic import ValidationError
from scipy import stats

from made_up import arm, outcome, result
from prefixkit.config import ClaimConfig, ClaimTest
from prefixkit.evaluation import Ratio
from prefixkit.lab.study.claims import Ruling, judge
from prefixkit.lab.study.measures import DIVERGED, UNLEARNED
from prefixkit.lab.study.outcome import Items, Outcome
from prefixkit.lab.study.plan import Replicate
from prefixkit.lab.study.results import ArmResult, TrialResult, Tried
from prefixkit.lab.study.statistics import difference, mean_of, ratio, spread

NARROW = (0.0, 0.001, 0.002)


def test_seeds_alone_give_students_paired_interval() -> None:
    first, second = [3.1, 3.3, 3.2], [3.4, 3.5, 3.6]
    found = difference(arm("a", first), arm("b", second), "heldout_nll")
    expected = stats.ttest_rel(first, second)
    assert found is not None
    assert found.interval is not None
    assert found.value == pytest.approx(np.mean(np.subtract(first, second)))
    low, high = expected.confidence_interval(0.95)
    assert (found.interval.low, found.interval.high) == pytest.approx((low, high))


def test_replicates_are_paired_by_seed_and_subset() -> None:
    """A seed that one arm lost is left out on both sides."""
    first, second = arm("a", [1.0, 2.0, 9.0]), arm("b", [2.0, 3.0])
    found = difference(first, second, "heldout_nll")
    assert found is not None
    assert (found.value, found.repeats) == (-1.0, 2)


def test_texts_alone_give_the_interval_of_a_ratio_of_sums() -> None:
    """With one seed; against the bootstrap, which resamples the same texts."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(5, 40, 400).astype(float)
    one, other = tokens * 3 + rng.normal(0, 4, 400), tokens * 3.1 + rng.normal(0, 4, 400)
    first, second = (with_texts([values], tokens) for values in (one, other))
    found = difference(first, second, "heldout_nll")
    drawn = rng.integers(400, size=(4000, 400))
    draws = (one - other)[drawn].sum(axis=1) / tokens[drawn].sum(axis=1)
    low, high = np.quantile(draws, [0.025, 0.975])
    assert found is not None
    assert found.interval is not None
    assert found.repeats == 1
    assert found.interval.low == pytest.approx(low, abs=0.1 * (high - low))
    assert found.interval.high == pytest.approx(high, abs=0.1 * (high - low))


def test_the_variances_of_seeds_and_texts_add_up() -> None:
    """The interval covers the true difference as often as it says, where seeds and texts both vary."""
    rng = np.random.default_rng(1)
    hits, runs = 0, 400
    for _ in range(runs):
        texts, seeds = rng.normal(0.5, 1.0, 60), rng.normal(0, 0.2, 3)  # the true difference is 0.5
        rows = [[text + seed for text in texts] for seed in seeds]
        found = difference(with_texts(rows, np.ones(60)), with_texts([[0.0] * 60] * 3, np.ones(60)), "heldout_nll")
        assert found is not None
        assert found.interval is not None
        hits += found.interval.low <= 0.5 <= found.interval.high
    # of 400 draws at 95%, fewer than 92% or more than 99% have odds below one in two hundred
    assert 0.92 <= hits / runs <= 0.995


def test_arms_of_other_texts_than_each_others_bring_a_variance_each() -> None:
    """Two arms that are truly alike are said to differ as seldom as the level has it, though seeds hardly vary."""
    rng, hits = np.random.default_rng(4), 0
    for _ in range(300):
        first, second = (
            with_texts([texts + seed for seed in rng.normal(0, 0.001, 3)], np.ones(len(texts)))
            for texts in (rng.normal(3, 1, 96), rng.normal(3, 1, 95))
        )
        found = difference(first, second, "heldout_nll")
        assert found is not None
        assert found.interval is not None
        hits += found.interval.low <= 0 <= found.interval.high
    assert 0.9 <= hits / 300 <= 0.99


def test_where_texts_are_not_known_seeds_alone_decide_nothing() -> None:
    """As of a label's accuracy over three seeds that all read the same texts."""
    bare = [arm(name, [], outcomes=[outcome({"accuracy": 0.8 + each}, items={}) for each in NARROW]) for name in "ab"]
    claim = ClaimConfig(source="s", says="so", test="better", measure="accuracy", arms=["a", "b"], margin=0.05)
    (found,) = judge(result(bare, [claim]))
    assert found.ruling is Ruling.UNDECIDED
    assert found.why.endswith("0.0%; how far other texts would move it is not known")
    mean = mean_of(bare[0], "accuracy")
    assert mean is not None
    assert mean.interval is None


def test_three_seeds_on_the_same_texts_know_no_more_of_a_share_than_the_texts_say() -> None:
    """22 of 32 texts three times over: 69% [52%, 82%], not a number without an interval."""
    good, fair = (of_shares(name, hits) for name, hits in (("a", 22), ("b", 20)))
    found, wilson = mean_of(good, "sentiment_accuracy"), stats.binomtest(22, 32).proportion_ci(method="wilson")
    assert found is not None
    assert found.interval is not None
    assert found.interval.low == pytest.approx(wilson.low, abs=0.02)
    assert wilson.high <= found.interval.high < wilson.high + 0.06  # the texts' variance is that of its farther end
    claims = [
        ClaimConfig(source="s", says="so", test="value", measure="sentiment_accuracy", arms=["a"], low=0.68),
        ClaimConfig(source="s", says="so", test="ratio", measure="sentiment_accuracy", arms=["a", "b"], low=1.05),
        ClaimConfig(source="s", says="so", test="better", measure="sentiment_accuracy", arms=["a", "b"]),
    ]
    assert [each.ruling for each in judge(result([good, fair], claims))] == [Ruling.UNDECIDED] * 3


def test_all_texts_alike_are_no_certainty() -> None:
    """32 of 32 texts, three times over, may be nine in ten."""
    every = of_shares("a", 32)
    found = mean_of(every, "sentiment_accuracy")
    assert found is not None
    assert found.interval is not None
    assert 0.8 < found.interval.low < 0.9
    apart = difference(every, of_shares("b", 32), "sentiment_accuracy")
    assert apart is not None
    assert apart.interval is not None
    assert apart.interval.low == pytest.approx(-apart.interval.high)
    assert apart.interval.high > 0.05


def test_draws_that_took_all_the_rows_there_are_count_once() -> None:
    """Four draws of 500 rows out of 500 are the same run four times."""
    for rows, repeats in (("the same", 1), (None, 4)):
        trials = tuple(
            TrialResult(Replicate(0, subset), outcome({"heldout_nll": 3.0}, data_hash=str(subset), rows_hash=rows))
            for subset in range(4)
        )
        found = mean_of(replace(arm("a", []), trials=trials), "heldout_nll")
        assert found is not None
        assert found.repeats == repeats


def test_a_run_without_the_measure_is_a_lost_one() -> None:
    """As where every text it wrote was empty, so that nothing can be said of their fluency."""
    fluent = [outcome({"fluency_ppl": 9.0 + each}) for each in NARROW]
    arms = [arm("a", [], outcomes=[*fluent, outcome({"heldout_nll": 3.0})]), arm("b", [14.0] * 4, "fluency_ppl")]
    claim = ClaimConfig(source="s", says="so", test="better", measure="fluency_ppl", arms=["a", "b"])
    (found,) = judge(result(arms, [claim]))
    assert found.ruling is Ruling.UNDECIDED
    assert found.why.endswith("; runs that diverged, failed or wrote nothing to measure are not in it: 1 of a")


def test_runs_that_failed_otherwise_leave_a_share_of_diverged_ones_open() -> None:
    outcomes = [*runs(0, 26), *[Outcome.failed("out of memory", has_diverged=False)] * 24]
    claim = ClaimConfig(source="s", says="so", test="value", measure=DIVERGED, arms=["a"], high=0.15)
    (found,) = judge(result([arm("a", [], outcomes=outcomes), arm("b", [1.0])], [claim]))
    assert found.ruling is Ruling.UNDECIDED


@pytest.mark.parametrize(
    ("what", "odd", "words"),
    [("data_hash", "new", "had other rows than"), ("base_hash", "new", "had other base weights than")],
)
def test_runs_that_are_not_alike_leave_their_claims_open(what: str, odd: str, words: str) -> None:
    low, old, new = (
        [outcome({"heldout_nll": loss + each}, **{what: known}) for each in NARROW]
        for loss, known in ((2.0, "old"), (3.0, "old"), (3.0, odd))
    )
    arms = [arm("a", [], outcomes=low), arm("b", [], outcomes=old), arm("c", [], outcomes=[*old[:2], new[2]])]
    claims = [ClaimConfig(source="s", says="so", test="better", arms=["a", other]) for other in ("b", "c")]
    alike, mixed = judge(result(arms, claims))
    assert alike.ruling is Ruling.CONFIRMED
    assert mixed.ruling is Ruling.UNDECIDED
    assert f"; runs of c {words}" in mixed.why


def test_times_of_several_machines_are_not_compared() -> None:
    outcomes = [
        [outcome({"seconds": value + each}, hardware=name) for each in NARROW] for value, name in ((1, "x"), (2, "y"))
    ]
    claim = ClaimConfig(source="s", says="so", test="better", measure="seconds", arms=["a", "b"])
    (found,) = judge(result([arm(name, [], outcomes=own) for name, own in zip("ab", outcomes, strict=True)], [claim]))
    assert found.ruling is Ruling.UNDECIDED
    assert "; its runs were made on x and y: run the study again" in found.why


def test_a_better_rate_beyond_the_edge_turns_a_bound_only_one_way() -> None:
    """A lower loss at another rate would leave "at most 3.5" standing, and would turn "at least 2.9"."""
    edge = arm("a", [3.0 + each for each in NARROW], at_edge=True)
    claims = [
        ClaimConfig(source="s", says="so", test="value", arms=["a"], **bound)
        for bound in ({"high": 3.5}, {"low": 2.9}, {"high": 2.5}, {"low": 3.5})
    ]
    rulings = [each.ruling for each in judge(result([edge, arm("b", [1.0])], claims))]
    assert rulings == [Ruling.CONFIRMED, Ruling.UNDECIDED, Ruling.UNDECIDED, Ruling.REFUTED]
    behind = arm("b", [3.3 + each for each in NARROW], at_edge=True)
    claim = ClaimConfig(source="s", says="so", test="ratio", arms=["b", "a"], low=1.05)
    (found,) = judge(result([replace(edge, at_edge=False), behind], [claim]))
    assert found.ruling is Ruling.UNDECIDED
    by_validation = [replace(each, trials=arm("", [float(place)] * 3, "validation_loss").trials)
                     for place, each in enumerate((edge, behind), start=1)]  # fmt: skip
    claim = ClaimConfig(source="s", says="so", test="better", measure="validation_loss", arms=["a", "b"])
    (found,) = judge(result(by_validation, [claim]))
    assert found.ruling is Ruling.UNDECIDED


def test_a_ratio_is_of_pairs_on_a_scale_of_logarithms() -> None:
    found = ratio(arm("a", [2.0, 8.0]), arm("b", [1.0, 2.0]), "heldout_nll")
    assert found is not None
    assert found.value == pytest.approx(math.sqrt(2 * 4))
    assert ratio(arm("a", [2.0]), arm("b", [0.0]), "heldout_nll") is None


def test_the_spread_is_of_means_greatest_over_least_less_one() -> None:
    found = spread([arm("a", [1.0, 1.0]), arm("b", [1.2, 1.4]), arm("c", [1.1, 1.3])], "heldout_nll")
    assert found is not None
    assert found.value == pytest.approx(0.3)


def test_a_noisy_arm_may_be_farther_from_the_others_than_the_farthest_means() -> None:
    """Two quiet arms are 1.0% apart for sure; where the third is, whose mean is between, nobody knows."""
    quiet = [arm("a", [3.0, 3.001, 3.002]), arm("b", [3.01, 3.011, 3.012])]
    found = [spread(arms, "heldout_nll") for arms in (quiet, [*quiet, arm("c", [2.7, 3.005, 3.31])])]
    assert found[0] is not None
    assert found[0].interval is not None
    assert found[0].interval.high == pytest.approx(0.01 / 3.001)
    assert found[1] is not None
    assert found[1].interval is not None
    assert found[1].interval.high > 0.2
    assert found[1].value == found[0].value


def test_arms_that_are_all_the_same_seldom_have_a_spread() -> None:
    rng = np.random.default_rng(2)
    found = [
        spread([arm(str(k), rng.normal(3, 0.02, 3).tolist()) for k in range(7)], "heldout_nll") for _ in range(200)
    ]
    ahead = [each.interval.low > 0 for each in found if each is not None and each.interval is not None]
    assert len(ahead) == 200
    assert sum(ahead) <= 16  # at most 5% on average; more than 16 of 200 have odds below one in fifty


def test_seeds_that_share_their_rows_are_one_repeat() -> None:
    """Each draw of the rows moves both of its seeds: the interval covers the truth as often as it says."""
    rng, hits = np.random.default_rng(3), 0
    zero = replicated([[0.0, 0.0]] * 5)
    for _ in range(400):
        draws = rng.normal(0, 0.05, 5)
        found = difference(
            replicated([[draw + seed for seed in rng.normal(0, 0.01, 2)] for draw in draws]), zero, "heldout_nll"
        )
        assert found is not None
        assert found.interval is not None
        assert found.repeats == 5
        hits += found.interval.low <= 0 <= found.interval.high
    assert 0.92 <= hits / 400 <= 0.98


def test_a_difference_of_shares_of_few_runs_is_wide() -> None:
    """Newcombe (1998), Table II, method 10: 56 of 70 less 48 of 80 is 0.2 [0.0524, 0.3339]."""
    first = arm("a", [], outcomes=runs(56, 70))
    second = arm("b", [], outcomes=runs(48, 80))
    many = difference(first, second, DIVERGED)
    assert many is not None
    assert many.interval is not None
    assert (many.interval.low, many.interval.high) == pytest.approx((0.0524, 0.3339), abs=1e-4)
    few = difference(arm("a", [], outcomes=runs(3, 3)), arm("b", [], outcomes=runs(0, 3)), DIVERGED)
    assert few is not None
    assert few.interval is not None
    assert few.interval.low < 0.25


def test_a_run_that_failed_otherwise_says_nothing_about_divergence() -> None:
    failed = [Outcome.failed("its process was killed", has_diverged=False)] * 5
    assert mean_of(arm("a", [], outcomes=failed), DIVERGED) is None
    claim = ClaimConfig(source="s", says="so", test="value", measure=DIVERGED, arms=["a"], high=0.5)
    (found,) = judge(result([arm("a", [], outcomes=failed), arm("b", [1.0])], [claim]))
    assert (found.ruling, found.why) == (Ruling.UNDECIDED, "no run of a has diverged")


def test_a_claim_about_an_arm_that_lost_runs_is_not_decided() -> None:
    """Those that came through are the lucky ones."""
    lucky = [outcome({"heldout_nll": 1.0 + each, DIVERGED: 0.0}) for each in NARROW]
    lucky += [Outcome.failed("step 9: loss is nan", has_diverged=True)] * 3
    claim = ClaimConfig(source="s", says="so", test="better", arms=["a", "b"])
    (found,) = judge(result([arm("a", [], outcomes=lucky), arm("b", [2.0, 2.1, 2.0, 2.1, 2.0, 2.1])], [claim]))
    assert found.ruling is Ruling.UNDECIDED
    assert found.why.endswith("runs that diverged, failed or wrote nothing to measure are not in it: 3 of a")


def test_a_margin_is_what_an_arm_may_be_behind() -> None:
    arms = [arm("a", [3.01 + each for each in NARROW]), arm("b", [3.0 + each for each in NARROW])]
    claims = [
        ClaimConfig(source="s", says="so", test="better", arms=["a", "b"], margin=margin) for margin in (0.02, 0.005)
    ]
    within, beyond = judge(result(arms, claims))
    assert (within.ruling, beyond.ruling) == (Ruling.CONFIRMED, Ruling.REFUTED)
    assert within.why.startswith("a less b, held-out loss, may be behind by 0.020: 0.010")


def test_the_interval_of_a_share_ends_at_one() -> None:
    found = mean_of(arm("a", [0.7, 1.0, 0.9], "sentiment_accuracy"), "sentiment_accuracy")
    assert found is not None
    assert found.interval is not None
    assert found.interval.high == 1.0


def test_a_share_of_diverged_runs_has_wilsons_interval() -> None:
    trials = [outcome({DIVERGED: float(seed == 0)}, error="loss is nan" if seed == 0 else None) for seed in range(4)]
    found = mean_of(arm("a", [], outcomes=trials), DIVERGED)
    expected = stats.binomtest(1, 4).proportion_ci(0.95, method="wilson")
    assert found is not None
    assert found.interval is not None
    assert found.value == 0.25
    assert (found.interval.low, found.interval.high) == pytest.approx((expected.low, expected.high))


@pytest.mark.parametrize(
    ("claim", "ruling"),
    [
        ({"test": "better", "arms": ["low", "high"]}, Ruling.CONFIRMED),
        ({"test": "better", "arms": ["high", "low"]}, Ruling.REFUTED),
        ({"test": "better", "arms": ["low", "noisy"]}, Ruling.UNDECIDED),
        ({"test": "better", "arms": ["low", "same as low"]}, Ruling.UNDECIDED),
        ({"test": "better", "arms": ["low", "two seeds"]}, Ruling.UNDECIDED),
        ({"test": "better", "arms": ["low", "none"]}, Ruling.UNDECIDED),
        ({"test": "ordered", "arms": ["low", "high", "higher"]}, Ruling.CONFIRMED),
        ({"test": "ordered", "arms": ["low", "higher", "high"]}, Ruling.REFUTED),
        ({"test": "ordered", "arms": ["low", "high", "noisy"]}, Ruling.UNDECIDED),
        ({"test": "ratio", "arms": ["high", "low"], "low": 1.05, "high": 1.2}, Ruling.CONFIRMED),
        ({"test": "ratio", "arms": ["high", "low"], "low": 2.0}, Ruling.REFUTED),
        ({"test": "ratio", "arms": ["noisy", "low"], "low": 1.0}, Ruling.UNDECIDED),
        ({"test": "spread", "arms": ["low", "high"], "low": 0.05, "high": 0.2}, Ruling.CONFIRMED),
        ({"test": "spread", "arms": ["low", "high"], "low": 0.2, "high": 0.4}, Ruling.REFUTED),
        ({"test": "value", "arms": ["low"], "high": 3.5}, Ruling.CONFIRMED),
        ({"test": "value", "arms": ["low"], "low": 3.5}, Ruling.REFUTED),
        ({"test": "none", "why": "it takes a GPU"}, Ruling.UNTESTABLE),
    ],
)
def test_claims_come_out_as_the_intervals_say(claim: dict[str, object], ruling: Ruling) -> None:
    arms = [
        arm("low", [3.0 + each for each in NARROW]),
        arm("same as low", [3.0 + each for each in NARROW]),
        arm("high", [3.3 + each for each in reversed(NARROW)]),
        arm("higher", [3.6 + each for each in NARROW]),
        arm("noisy", [2.0, 3.5, 4.5]),
        arm("two seeds", [3.5, 3.6]),
        arm("none", []),
    ]
    claims = [ClaimConfig.model_validate({"source": "somebody", "says": "so", **claim})]
    (found,) = judge(result(arms, claims))
    assert found.ruling is ruling, found.why


def test_higher_is_better_where_the_measure_says_so() -> None:
    arms = [arm("a", [0.9, 0.91, 0.92], measure="sentiment_accuracy"), arm("b", [0.5, 0.51, 0.5], "sentiment_accuracy")]
    claim = ClaimConfig(source="s", says="so", test="better", measure="sentiment_accuracy", arms=["a", "b"])
    (found,) = judge(result(arms, [claim]))
    assert found.ruling is Ruling.CONFIRMED
    assert found.why.startswith("a less b, judged as wanted: 40.7% [")


def test_a_run_of_size_tiny_decides_nothing() -> None:
    claim = ClaimConfig(source="s", says="so", test="better", arms=["a", "b"])
    arms = [arm("a", [1.0, 1.1, 1.0]), arm("b", [2.0, 2.1, 2.0])]
    (found,) = judge(result(arms, [claim], size="tiny"))
    assert found.ruling is Ruling.UNTESTABLE


def with_texts(rows: Sequence[Sequence[float]], tokens: "np.ndarray") -> ArmResult:
    """An arm with one run per row of texts."""
    ratios = [Ratio(tuple(map(float, row)), tuple(tokens.tolist())) for row in rows]
    outcomes = [
        outcome(
            {"heldout_nll": ratio.value},
            items={"heldout_nll": Items(tuple(ratio.influence.tolist()), str(ratio.weights))},
        )
        for ratio in ratios
    ]
    return arm("a", [], outcomes=outcomes)


def of_shares(name: str, hits: int) -> ArmResult:
    """An arm whose three runs wrote the same 32 texts, so many of them as wanted."""
    ratio = Ratio.mean([float(place < hits) for place in range(32)])
    items = {"sentiment_accuracy": Items(tuple(ratio.influence.tolist()), name)}
    return arm(name, [], outcomes=[outcome({"sentiment_accuracy": ratio.value}, items=items)] * 3)


def replicated(draws: Sequence[Sequence[float]]) -> ArmResult:
    """An arm with one run per seed of every draw."""
    trials = tuple(
        TrialResult(Replicate(seed, subset), outcome({"heldout_nll": value}, data_hash=str(subset)))
        for subset, seeds in enumerate(draws)
        for seed, value in enumerate(seeds)
    )
    return replace(arm("a", []), trials=trials)


def runs(diverged: int, count: int) -> list[Outcome]:
    """Runs of which so many diverged."""
    return [outcome({DIVERGED: float(place < diverged)}) for place in range(count)]


def test_the_interval_of_a_time_begins_at_zero_and_that_of_a_loss_need_not() -> None:
    low = []
    for measure in ("seconds_per_step", "heldout_nll"):
        found = mean_of(arm("a", [1.0, 9.0, 2.0], measure), measure)
        assert found is not None
        assert found.interval is not None
        low.append(found.interval.low)
    assert low[0] == 0.0
    assert low[1] < 0.0


def test_a_rate_that_failed_or_lies_at_the_edge_leaves_a_claim_open_where_it_could_turn_it() -> None:
    claim = ClaimConfig(source="-", says="Lower.", test=ClaimTest.BETTER, arms=["low", "high"])
    tried = (Tried(0.3, None, "out of memory", has_diverged=False), Tried(1.0, 3.0, None, has_diverged=False))
    low, high = arm("low", [3.0, 3.001, 3.002]), arm("high", [3.3, 3.301, 3.302])
    (verdict,) = judge(result([low, replace(high, tried=tried)], [claim]))
    assert verdict.ruling is Ruling.UNDECIDED
    assert verdict.why.endswith("; a rate to try failed: x0.3 of high")
    turned = claim.model_copy(update={"arms": ["high", "low"]})
    for arms, confirmed, refuted in (
        ([replace(low, at_edge=True), high], Ruling.CONFIRMED, Ruling.REFUTED),  # further ahead at best
        ([low, replace(high, at_edge=True)], Ruling.UNDECIDED, Ruling.UNDECIDED),  # it may come to be ahead
    ):
        verdicts = judge(result(arms, [claim, turned]))
        assert [verdict.ruling for verdict in verdicts] == [confirmed, refuted]
        name = next(each.name for each in arms if each.at_edge)
        assert all(each.why.endswith(f"; a better rate may lie beyond those tried for {name}") for each in verdicts)


def test_a_verdict_that_would_not_stand_beside_the_others_says_so() -> None:
    arms = [arm("low", [3.0, 3.01, 3.02]), arm("high", [3.05, 3.04, 3.08]), arm("far", [4.0, 4.01, 4.02])]
    near = ClaimConfig(source="-", says="Lower.", test=ClaimTest.BETTER, arms=["low", "high"])
    far = near.model_copy(update={"arms": ["low", "far"]})
    none = ClaimConfig(source="-", says="So.", test=ClaimTest.NONE, why="It is no matter of measuring.")
    verdicts = judge(result(arms, [near, far, none]))
    assert [verdict.ruling for verdict in verdicts] == [Ruling.CONFIRMED, Ruling.CONFIRMED, Ruling.UNTESTABLE]
    alone = "; alone: with all 2 claims taken together it is not decided"
    assert [verdict.why.endswith(alone) for verdict in verdicts] == [True, False, False]
    (single,) = judge(result(arms, [near]))
    assert not single.why.endswith(alone)


def test_a_spread_is_not_below_zero_and_open_where_an_arm_is_at_its_edge() -> None:
    noisy = spread([arm("a", [3.0, 3.5, 2.5]), arm("b", [3.4, 2.6, 3.1])], "heldout_nll")
    assert noisy is not None
    assert noisy.interval is not None
    assert noisy.interval.low == 0.0
    claim = ClaimConfig(source="-", says="Far apart.", test=ClaimTest.SPREAD, arms=["a", "b"], low=0.1)
    far = [arm("a", [3.0, 3.001, 3.002]), arm("b", [4.0, 4.001, 4.002])]
    for arms, ruling in ((far, Ruling.CONFIRMED), ([far[0], replace(far[1], at_edge=True)], Ruling.UNDECIDED)):
        (verdict,) = judge(result(arms, [claim]))
        assert verdict.ruling is ruling


def test_runs_that_learned_nothing_are_a_share_too() -> None:
    stuck, fine = ([outcome({UNLEARNED: value}) for _ in range(3)] for value in (1.0, 0.0))
    found = difference(arm("a", [], outcomes=stuck), arm("b", [], outcomes=fine), UNLEARNED)
    assert found is not None
    assert found.interval is not None
    assert 0 < found.interval.low < found.value == 1.0


def test_runs_of_several_arms_are_one_share() -> None:
    claim = ClaimConfig(
        source="-", says="Few diverge.", test=ClaimTest.VALUE, measure=DIVERGED, arms=["a", "b"], high=0.15
    )
    arms = [arm(name, [0.0] * 13, DIVERGED) for name in "ab"]
    (verdict,) = judge(result(arms, [claim]))
    assert verdict.ruling is Ruling.CONFIRMED
    assert verdict.why == "all 2 arms, diverged: 0.0% [0.0%, 12.9%]"
    with pytest.raises(ValidationError, match="test value of several arms is of diverged, not heldout_nll; name one"):
        result(arms, [claim.model_copy(update={"measure": "heldout_nll"})])


def test_an_arm_that_learned_from_other_rows_than_the_others_is_marked() -> None:
    """As where the file changed between two arms; other rows that an arm asked for are its own."""

    def of(name: str, rows: str) -> ArmResult:
        return arm(name, [], outcomes=[outcome({"heldout_nll": 3.0}, data_hash=rows)] * 3)

    arms = [of("a", "old"), of("b", "old"), of("c", "new")]
    assert result(arms, []).mixed_data == ["c"]
    arms[2] = replace(arms[2], settings={"data.train_rows": 9})
    assert result(arms, []).mixed_data == []
