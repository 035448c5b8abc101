"""How far two arms are apart, and how sure that is: paired over repeats, and over texts.

Both arms repeat the same seeds and read the same texts, so differences are taken pair by pair. The variance of their
mean is that over repeats, plus that over texts (the sum of squared influences, see `prefixkit.evaluation.intervals`),
the two being independent; Student's t has Satterthwaite's (1946) degrees of freedom. Where two arms did not read the
same texts, each brings a variance over texts of its own. With one repeat only the texts speak. Of a measure that other
texts would change, and that is not known text by text, there is no interval: all seeds share their few texts, and agree
with each other far better than with the truth.

A repeat is a seed or, where the training rows were drawn several times, a draw with all its seeds: seeds that share
their rows are no independent repeats, and draws that came to the same rows are one.

Shares of texts have a variance over texts even where all of them agree: that of the farther end of Wilson's (1927)
interval for one arm, that of half a text more on either side (Agresti & Min, 2005) between two. Shares of runs, such as
those that diverged, have Wilson's interval, their difference Newcombe's (1998, method 10): where all or none did, a
variance over runs would be 0.
"""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from scipy import stats

from prefixkit.evaluation.intervals import Interval, Numbers, share_interval
from prefixkit.lab.pages.comparison import Unit
from prefixkit.lab.study.measures import COUNTED, SHARES, is_of_texts, known_measures
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


def mean_of(arm: ArmResult, measure: str, *, level: float = LEVEL, on_these_texts: bool = False) -> Estimate | None:
    """Return an arm's mean over its repeats with Student's interval; None where no trial has the measure.

    That of a share ends at 0 and 1. Of what runs did or did not do it is their share, with Wilson's interval.

    Args:
        arm: whose.
        measure: which.
        level: of the interval.
        on_these_texts: leave out of the interval what other texts would change.
    """
    known = [trial for trial in arm.trials if measure in trial.outcome.values]
    if not known:
        return None
    values = [trial.outcome.values[measure] for trial in known]
    if measure in COUNTED:
        return share_of([arm], measure, level=level)
    value, outcomes = float(np.mean(values)), [trial.outcome for trial in known]
    repeats = _repeats([trial.replicate for trial in known], [(outcome,) for outcome in outcomes], values)
    over_texts: list[_Variance] | None = []
    if is_of_texts(measure) and not on_these_texts:
        moved = _influence([(outcome, 1.0) for outcome in outcomes], measure)
        over_texts = None if moved is None else [_over_texts(moved, _least_of_share(measure, value, len(moved)))]
    interval = _interval(float(np.mean(repeats)), _over_repeats(repeats), over_texts, level)
    unit = known_measures()[measure].unit
    if interval is not None and unit is not Unit.NATS:  # Student's knows no ends; nothing else here is below 0
        interval = interval.map(lambda end: min(1.0 if unit is Unit.SHARE else math.inf, max(0.0, end)))
    return Estimate(float(np.mean(repeats)), interval, len(repeats))


def mean_beside_others(arm: ArmResult, measure: str) -> Estimate | None:
    """Return an arm's mean as a table has it beside those of arms that were measured on the same texts.

    Other texts would move all of them together, so its interval is over repeats alone; save for shares of texts, of
    which three seeds may agree by chance.
    """
    return mean_of(arm, measure, on_these_texts=measure not in SHARES)


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
    if measure in COUNTED:
        interval = _difference_of_shares(first, second, measure, level)
        return Estimate(float(np.mean(differences)), interval, len(pairs))
    repeats = _repeats([pair.replicate for pair in pairs], [(pair.one, pair.other) for pair in pairs], differences)
    over_texts = _between(pairs, measure, [(1.0, 1.0)] * len(pairs)) if is_of_texts(measure) else []
    value = float(np.mean(repeats))
    return Estimate(value, _interval(value, _over_repeats(repeats), over_texts, level), len(repeats))


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
    both = [(pair.one, pair.other) for pair in pairs]
    logs = _repeats([pair.replicate for pair in pairs], both, [math.log(one / other) for one, other in values])
    scales = [(1 / one, 1 / other) for one, other in values]  # how far a logarithm moves with its number
    over_texts = _between(pairs, measure, scales) if is_of_texts(measure) else []
    interval = _interval(float(np.mean(logs)), _over_repeats(logs), over_texts, level)
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


def _repeats(
    replicates: Sequence[Replicate], outcomes: Sequence[tuple[Outcome, ...]], values: Sequence[float]
) -> list[float]:
    """Return one value per independent repeat: the seeds', or, of several draws of the rows, each draw's mean."""
    draws: dict[Hashable, dict[int, list[float]]] = {}
    for replicate, own, value in zip(replicates, outcomes, values, strict=True):
        hashes = tuple(outcome.rows_hash for outcome in own)
        draw = replicate.subset if None in hashes else hashes  # draws that took all the rows there are, are one
        draws.setdefault(draw, {}).setdefault(replicate.seed, []).append(value)
    means = [[float(np.mean(same)) for same in seeds.values()] for seeds in draws.values()]
    return means[0] if len(means) == 1 else [float(np.mean(each)) for each in means]


def _over_repeats(values: Sequence[float]) -> list[_Variance]:
    count = len(values)
    return [] if count < 2 else [_Variance(float(np.var(values, ddof=1)) / count, count - 1)]


def _influence(scaled: Sequence[tuple[Outcome, float]], measure: str) -> Numbers | None:
    """Return how far each text moves the mean of outcomes times numbers; None where they are not of the same texts."""
    known = [(outcome.items[measure], scale) for outcome, scale in scaled if measure in outcome.items]
    if len(known) < len(scaled) or len({(items.texts, len(items.influence)) for items, _ in known}) > 1:
        return None
    return np.asarray(np.mean([scale * np.array(items.influence) for items, scale in known], axis=0), dtype=np.float64)


def _over_texts(moved: Numbers, least: float = 0.0) -> _Variance:
    count = len(moved)
    return _Variance(max(least, float(count / max(1, count - 1) * np.square(moved).sum())), max(1, count - 1))


def _between(pairs: Sequence[_Pair], measure: str, scales: Sequence[tuple[float, float]]) -> list[_Variance] | None:
    """Return what other texts would bring to the mean difference of pairs, each outcome times its scale.

    None where that is not known. Arms of other texts than each other's have a variance each.
    """
    ones = [(pair.one, scale) for pair, (scale, _) in zip(pairs, scales, strict=True)]
    others = [(pair.other, -scale) for pair, (_, scale) in zip(pairs, scales, strict=True)]
    one, other = _influence(ones, measure), _influence(others, measure)
    if one is None or other is None:
        return None
    scale = max(abs(each) for _, each in (*ones, *others)) if measure in SHARES else 0.0
    least = [(scale / (len(each) + 2)) ** 2 for each in (one, other)]
    if _influence([*ones, *others], measure) is None:
        return [_over_texts(one, least[0]), _over_texts(other, least[1])]
    return [_over_texts(one + other, least[0])]


def _least_of_share(measure: str, value: float, count: int) -> float:
    """Return the least variance of a share of texts; 0 of another measure."""
    if measure not in SHARES:
        return 0.0
    z = float(stats.norm.ppf((1 + LEVEL) / 2))
    shrunk = 1 + z**2 / count
    middle = (value + z**2 / (2 * count)) / shrunk
    half = z / shrunk * math.sqrt(value * (1 - value) / count + z**2 / (4 * count**2))
    return ((abs(middle - value) + half) / z) ** 2


def _interval(
    value: float, over_repeats: Sequence[_Variance], over_texts: Sequence[_Variance] | None, level: float
) -> Interval | None:
    """Return Student's interval of a value with such variances; None where one is unknown, or there is none.

    Args:
        value: in the middle.
        over_repeats: none with a single repeat.
        over_texts: none of what is not of texts; None where they are not known.
        level: of the interval.
    """
    if over_texts is None or not (variances := [*over_repeats, *over_texts]):
        return None
    total = sum(each.value for each in variances)
    if total == 0:
        return None if over_texts else Interval(value, value)
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
