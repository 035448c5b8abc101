"""How far two arms are apart, and how sure that is: paired over seeds, and over texts where they are known one by one.

Both arms read the same texts and repeat the same seeds, so differences are taken pair by pair. The variance of their
mean is that over repeats, plus that over texts (a ratio of sums, linearised: Cochran, 1977, §6.3), the two being
independent; Student's t has Satterthwaite's (1946) degrees of freedom. A repeat is a seed, or, where the training rows
were drawn several times, a draw with all its seeds: seeds that share their rows are no independent repeats. With one
repeat only the texts speak; where a measure is not known text by text, only the repeats do.

Shares of runs, such as those that diverged, have Wilson's interval, their difference Newcombe's (1998, method 10):
where all or none did, a variance over runs would be 0.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from scipy import stats

from prefixkit.evaluation.intervals import Interval, mean_interval, share_interval
from prefixkit.lab.pages.comparison import Unit
from prefixkit.lab.study.measures import COUNTED, known_measures
from prefixkit.lab.study.outcome import Outcome
from prefixkit.lab.study.plan import Replicate
from prefixkit.lab.study.results import ArmResult

LEVEL = 0.95
"""Of every interval that is not asked for at another."""


@dataclass(frozen=True)
class Estimate:
    """A value, its 95% interval where there is one, and from how many independent repeats."""

    value: float
    interval: Interval | None
    repeats: int


@dataclass(frozen=True)
class _Variance:
    """Of a mean, with its degrees of freedom."""

    value: float
    freedom: int | float


@dataclass(frozen=True)
class _Pair:
    """Two arms' outcomes of one replicate."""

    replicate: Replicate
    one: Outcome
    other: Outcome


def mean_of(arm: ArmResult, measure: str, *, level: float = LEVEL) -> Estimate | None:
    """Return an arm's mean over its repeats with Student's interval; None where no trial has the measure.

    That of a share ends at 0 and 1. Of what runs did or did not do it is their share, with Wilson's interval.

    Args:
        arm: whose.
        measure: which.
        level: of the interval.
    """
    known = [
        (trial.replicate, trial.outcome.values[measure]) for trial in arm.trials if measure in trial.outcome.values
    ]
    if not known:
        return None
    values = [value for _, value in known]
    if measure in COUNTED:
        return share_of([arm], measure, level=level)
    repeats = _repeats([replicate for replicate, _ in known], values)
    interval = mean_interval(repeats, level)
    unit = known_measures()[measure].unit
    if interval is not None and unit is not Unit.NATS:  # Student's knows no ends; nothing else here is below 0
        interval = interval.map(lambda end: min(1.0 if unit is Unit.SHARE else math.inf, max(0.0, end)))
    return Estimate(float(np.mean(values)), interval, len(repeats))


def share_of(arms: Sequence[ArmResult], measure: str, *, level: float = LEVEL) -> Estimate:
    """Return the share of all runs of some arms for which a measure is 1, with Wilson's interval.

    Args:
        arms: whose runs, each with the measure, are taken together.
        measure: such as diverged.
        level: of the interval.
    """
    values = [value for arm in arms for value in arm.values(measure)]
    return Estimate(float(np.mean(values)), share_interval([value == 1 for value in values], level), len(values))


def difference(first: ArmResult, second: ArmResult, measure: str, *, level: float = LEVEL) -> Estimate | None:
    """Return the first arm's mean less the second's over the replicates both have; None where there are none.

    Args:
        first: an arm.
        second: another.
        measure: what is compared.
        level: of the interval.
    """
    pairs = _pairs(first, second, measure)
    if not pairs:
        return None
    differences = [pair.one.values[measure] - pair.other.values[measure] for pair in pairs]
    value = float(np.mean(differences))
    if measure in COUNTED:
        return Estimate(value, _difference_of_shares(first, second, measure, level), len(pairs))
    repeats = _repeats([pair.replicate for pair in pairs], differences)
    variances = [each for each in (_over_repeats(repeats), _over_texts(pairs, measure)) if each is not None]
    return Estimate(float(np.mean(repeats)), _interval(float(np.mean(repeats)), variances, level), len(repeats))


def ratio(first: ArmResult, second: ArmResult, measure: str, *, level: float = LEVEL) -> Estimate | None:
    """Return the geometric mean of the first arm's value over the second's; None where a value is not above 0.

    Args:
        first: an arm.
        second: another.
        measure: what is compared.
        level: of the interval.
    """
    pairs = _pairs(first, second, measure)
    values = [(pair.one.values[measure], pair.other.values[measure]) for pair in pairs]
    if not values or any(value <= 0 for pair in values for value in pair):
        return None
    logs = _repeats([pair.replicate for pair in pairs], [math.log(one / other) for one, other in values])
    interval = mean_interval(logs, level)
    return Estimate(math.exp(float(np.mean(logs))), None if interval is None else interval.map(math.exp), len(logs))


def spread(arms: Sequence[ArmResult], measure: str, *, level: float = LEVEL) -> Estimate | None:
    """Return by how much the greatest of the arms' means is above the least, as a share of the least.

    The greatest of several means is above the least by chance alone, and which two arms are truly the farthest apart is
    not known. So each pair's difference has an interval at the level that holds for all pairs together (Bonferroni),
    and the greatest difference lies between the highest of their lower ends and the highest of their upper ones. None
    where an arm has no value above 0.

    Args:
        arms: at least two.
        measure: what is compared.
        level: of the interval, for all pairs together.
    """
    means = {arm.name: mean_of(arm, measure) for arm in arms}
    known = {name: mean.value for name, mean in means.items() if mean is not None}
    if len(known) < len(arms) or min(known.values()) <= 0:
        return None
    greatest, least = (pick(arms, key=lambda arm: known[arm.name]) for pick in (max, min))
    of_each = 1 - (1 - level) / (len(arms) * (len(arms) - 1) / 2)
    found = difference(greatest, least, measure, level=of_each)
    pairs = [difference(one, other, measure, level=of_each) for one, other in combinations(arms, 2)]
    if found is None or None in pairs:
        return None
    intervals = [pair.interval for pair in pairs if pair is not None and pair.interval is not None]
    base = known[least.name]
    interval = None
    if len(intervals) == len(pairs):
        low = max(max(each.low, -each.high) for each in intervals)  # either arm may be the greater
        high = max(max(each.high, -each.low) for each in intervals)
        interval = Interval(max(0.0, low) / base, high / base)
    return Estimate(found.value / base, interval, min(pair.repeats for pair in pairs if pair is not None))


def _pairs(first: ArmResult, second: ArmResult, measure: str) -> list[_Pair]:
    """Return the outcomes of the replicates in which both arms have the measure."""
    others = {trial.replicate: trial.outcome for trial in second.trials if measure in trial.outcome.values}
    return [
        _Pair(trial.replicate, trial.outcome, others[trial.replicate])
        for trial in first.trials
        if measure in trial.outcome.values and trial.replicate in others
    ]


def _repeats(replicates: Sequence[Replicate], values: Sequence[float]) -> list[float]:
    """Return one value per independent repeat: the seeds', or, of several draws of the rows, each draw's mean."""
    draws: dict[int, list[float]] = {}
    for replicate, value in zip(replicates, values, strict=True):
        draws.setdefault(replicate.subset, []).append(value)
    return list(values) if len(draws) == 1 else [float(np.mean(each)) for each in draws.values()]


def _over_repeats(differences: Sequence[float]) -> _Variance | None:
    count = len(differences)
    return None if count < 2 else _Variance(float(np.var(differences, ddof=1)) / count, count - 1)


def _over_texts(pairs: Sequence[_Pair], measure: str) -> _Variance | None:
    """Return the variance that other texts would bring; None where the two arms' texts cannot be paired."""
    known = [(pair.one.items[measure], pair.other.items[measure]) for pair in pairs
             if measure in pair.one.items and measure in pair.other.items]  # fmt: skip
    if len(known) < len(pairs) or len({items.weights for both in known for items in both}) > 1:
        return None
    weights = np.array(known[0][0].weights)
    parts = np.mean([np.subtract(one.parts, other.parts) for one, other in known], axis=0)
    count, total = len(weights), weights.sum()
    if count < 2 or not total:
        return None
    residuals = parts - parts.sum() / total * weights
    return _Variance(float(count / (count - 1) * np.square(residuals).sum() / total**2), count - 1)


def _interval(value: float, variances: Sequence[_Variance], level: float) -> Interval | None:
    total = sum(each.value for each in variances)
    if not variances:
        return None
    if total == 0:
        return Interval(value, value)
    freedom = total**2 / sum(each.value**2 / each.freedom for each in variances)
    margin = float(stats.t.ppf((1 + level) / 2, freedom)) * math.sqrt(total)
    return Interval(value - margin, value + margin)


def _difference_of_shares(first: ArmResult, second: ArmResult, measure: str, level: float) -> Interval | None:
    one, other = (mean_of(arm, measure, level=level) for arm in (first, second))
    if one is None or other is None or one.interval is None or other.interval is None:
        return None
    value = one.value - other.value
    below = math.hypot(one.value - one.interval.low, other.interval.high - other.value)
    above = math.hypot(one.interval.high - one.value, other.value - other.interval.low)
    return Interval(value - below, value + above)
