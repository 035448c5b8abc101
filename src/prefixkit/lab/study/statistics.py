"""How far two arms are apart, and how sure that is: paired over seeds, and over texts where they are known one by one.

Both arms read the same texts and repeat the same seeds, so differences are taken pair by pair. The variance of their
mean is that over seeds divided by the seeds, plus that over texts (a ratio of sums, linearised: Cochran, 1977, §6.3),
the two being independent; Student's t has Satterthwaite's (1946) degrees of freedom. With one seed only the texts
speak; where a measure is not known text by text, only the seeds do.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from prefixkit.evaluation.intervals import Interval, mean_interval, share_interval
from prefixkit.lab.study.measures import DIVERGED
from prefixkit.lab.study.outcome import Outcome
from prefixkit.lab.study.results import ArmResult

_LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A value, its 95% interval where there is one, and from how many seeds."""

    value: float
    interval: Interval | None
    seeds: int


@dataclass(frozen=True)
class _Variance:
    """Of a mean, with its degrees of freedom."""

    value: float
    freedom: int | float


def mean_of(arm: ArmResult, measure: str) -> Estimate | None:
    """Return an arm's mean over its trials with Student's interval; None where no trial has the measure.

    Of diverged runs it is their share, with Wilson's interval.
    """
    values = arm.values(measure)
    if not values:
        return None
    interval = share_interval([value == 1 for value in values]) if measure == DIVERGED else mean_interval(values)
    return Estimate(float(np.mean(values)), interval, len(values))


def difference(first: ArmResult, second: ArmResult, measure: str) -> Estimate | None:
    """Return the first arm's mean less the second's over the replicates both have; None where there are none."""
    pairs = paired(first, second, measure)
    if not pairs:
        return None
    differences = [one.values[measure] - other.values[measure] for one, other in pairs]
    variances = [each for each in (_over_seeds(differences), _over_texts(pairs, measure)) if each is not None]
    value = float(np.mean(differences))
    return Estimate(value, _interval(value, variances), len(pairs))


def ratio(first: ArmResult, second: ArmResult, measure: str) -> Estimate | None:
    """Return the geometric mean of the first arm's value over the second's; None where a value is not above 0."""
    pairs = [(one.values[measure], other.values[measure]) for one, other in paired(first, second, measure)]
    if not pairs or any(value <= 0 for pair in pairs for value in pair):
        return None
    logs = [math.log(one / other) for one, other in pairs]
    interval = mean_interval(logs)
    return Estimate(math.exp(float(np.mean(logs))), None if interval is None else interval.map(math.exp), len(logs))


def spread(arms: Sequence[ArmResult], measure: str) -> Estimate | None:
    """Return by how much the greatest of the arms' values is above the least, as a share of the least.

    It is taken of the values of each replicate that all arms have; None where there is none.
    """
    outcomes = [_by_replicate(arm, measure) for arm in arms]
    common = [key for key in outcomes[0] if all(key in each for each in outcomes)]
    values = [[each[key].values[measure] for each in outcomes] for key in common]
    if not values or any(min(row) <= 0 for row in values):
        return None
    spreads = [max(row) / min(row) - 1 for row in values]
    return Estimate(float(np.mean(spreads)), mean_interval(spreads), len(spreads))


def paired(first: ArmResult, second: ArmResult, measure: str) -> list[tuple[Outcome, Outcome]]:
    """Return the outcomes of the replicates in which both arms have the measure."""
    one, other = _by_replicate(first, measure), _by_replicate(second, measure)
    return [(one[key], other[key]) for key in one if key in other]


def _by_replicate(arm: ArmResult, measure: str) -> dict[tuple[int, int], Outcome]:
    return {
        (trial.replicate.seed, trial.replicate.subset): trial.outcome
        for trial in arm.trials
        if measure in trial.outcome.values
    }


def _over_seeds(differences: Sequence[float]) -> _Variance | None:
    count = len(differences)
    return None if count < 2 else _Variance(float(np.var(differences, ddof=1)) / count, count - 1)


def _over_texts(pairs: Sequence[tuple[Outcome, Outcome]], measure: str) -> _Variance | None:
    """Return the variance that other texts would bring; None where the two arms' texts cannot be paired."""
    known = [(one.items[measure], other.items[measure]) for one, other in pairs
             if measure in one.items and measure in other.items]  # fmt: skip
    if len(known) < len(pairs) or len({items.weights for pair in known for items in pair}) > 1:
        return None
    weights = np.array(known[0][0].weights)
    parts = np.mean([np.subtract(one.parts, other.parts) for one, other in known], axis=0)
    count, total = len(weights), weights.sum()
    if count < 2 or not total:
        return None
    residuals = parts - parts.sum() / total * weights
    return _Variance(float(count / (count - 1) * np.square(residuals).sum() / total**2), count - 1)


def _interval(value: float, variances: Sequence[_Variance]) -> Interval | None:
    total = sum(each.value for each in variances)
    if not variances:
        return None
    if total == 0:
        return Interval(value, value)
    freedom = total**2 / sum(each.value**2 / each.freedom for each in variances)
    margin = float(stats.t.ppf((1 + _LEVEL) / 2, freedom)) * math.sqrt(total)
    return Interval(value - margin, value + margin)
