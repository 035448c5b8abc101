"""95% intervals: how far a number might have come out otherwise.

Means and ratios over items are bootstrapped (Efron & Tibshirani, 1993, ch. 13): items are drawn with
replacement and the interval is the middle 95% of the recomputed values. It speaks of the items only, not of
other training seeds.

Shares (of texts that are this or that) get Wilson's interval (Wilson, 1927; Brown, Cai & DasGupta, 2001): near 0 and 1
resampled shares vary too little, and a share of exactly 1 would have an interval of no width.

Measures that are made from sums over texts (BLEU, chrF, NIST) are bootstrapped over the texts (Koehn, 2004).

Measures of a *set* of texts (distinct-n, self-BLEU) must not be bootstrapped: a drawn set holds texts twice,
and a text that stands beside itself is a perfect copy, so every resample would look less diverse than the
set. They get a delete-a-group jackknife (Shao & Tu, 1995, §2.3), which only ever leaves texts out.

For comparisons of runs that were measured on the same texts there is each text's *influence* on a measure: how far the
value moves with it, 0 over all texts. The variance of the value over n texts is ``n / (n - 1)`` times the sum of their
squares, that of a difference the same of the differences (the linearised ratio of Cochran, 1977, §6.3, and the
jackknife's pseudo-values).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from prefixkit.seeding import derive

_LEVEL = 0.95
_GROUPS = 32
#: Numbers drawn at a time, to bound memory.
_CHUNK = 4_000_000

Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A 95% interval."""

    low: float
    high: float

    def map(self, change: Callable[[float], float]) -> "Interval":
        """Return the interval of an increasing function of the value, such as `math.exp`."""
        return Interval(change(self.low), change(self.high))


def jackknife_influence(left_out: Numbers) -> Numbers:
    """Return the influence of texts, or groups of them, from a measure's values without each one."""
    count = len(left_out)
    return np.asarray((count - 1) / count * (left_out.mean() - left_out), dtype=np.float64)


@dataclass(frozen=True)
class Ratio:
    """A sum over items divided by another sum over the same items, such as nats per token.

    Attributes:
        parts: what is summed above, per item.
        weights: what is summed below, per item; all ones make the ratio a mean.
    """

    parts: tuple[float, ...]
    weights: tuple[float, ...]

    @classmethod
    def mean(cls, values: Sequence[float | int]) -> "Ratio":
        """Return the mean of values as a ratio."""
        return cls(tuple(map(float, values)), (1.0,) * len(values))

    @property
    def value(self) -> float:
        """The ratio itself; NaN where the weights sum to 0."""
        below = math.fsum(self.weights)
        return math.fsum(self.parts) / below if below else math.nan

    @property
    def influence(self) -> Numbers:
        """How far each item moves the ratio, linearised."""
        weights = np.array(self.weights)
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.asarray((np.array(self.parts) - self.value * weights) / weights.sum(), dtype=np.float64)


@dataclass(frozen=True)
class Sums:
    """A measure of a set of texts that is made from sums over them, as BLEU is from counts of n-grams.

    Unlike distinct-n, such a measure holds no text against another one of the set, so it can be bootstrapped: a text
    that is drawn twice counts twice.

    Attributes:
        parts: what is summed, `[texts, sums]`.
        measure: the measure of the sums, `[sums]`.
    """

    parts: Numbers
    measure: Callable[[Numbers], float]

    @property
    def value(self) -> float:
        """The measure of the whole set."""
        return self.measure(self.parts.sum(axis=0))

    @property
    def influence(self) -> Numbers:
        """How far each text moves the measure, by leaving it out."""
        whole = self.parts.sum(axis=0)
        return jackknife_influence(np.array([self.measure(whole - own) for own in self.parts]))


def sums_interval(sums: Sums, *, resamples: int, seed: int) -> Interval | None:
    """Return the bootstrap percentile interval of a measure made from sums; None for fewer than two texts."""
    count = len(sums.parts)
    if count < 2:
        return None
    generator = np.random.default_rng(seed)
    drawn = (generator.integers(count, size=count) for _ in range(resamples))
    return _percentiles(np.array([sums.measure(sums.parts[places].sum(axis=0)) for places in drawn]))


def ratio_interval(ratio: Ratio, *, resamples: int, seed: int) -> Interval | None:
    """Return the bootstrap percentile interval of a ratio; None for fewer than two items."""
    if len(ratio.parts) < 2:
        return None
    return _percentiles(_resampled(ratio, resamples, seed))


def share_interval(hits: Sequence[bool], level: float = _LEVEL) -> Interval | None:
    """Return Wilson's interval of the share of hits; None without any item."""
    if not hits:
        return None
    found = stats.binomtest(sum(hits), len(hits)).proportion_ci(level, method="wilson")
    return Interval(float(found.low), float(found.high))


def mean_interval(values: Sequence[float], level: float = _LEVEL) -> Interval | None:
    """Return Student's interval of the mean of a few values, such as one per seed; None below two."""
    if len(values) < 2:
        return None
    center, error = float(np.mean(values)), float(np.std(values, ddof=1)) / math.sqrt(len(values))
    margin = float(stats.t.ppf((1 + level) / 2, len(values) - 1)) * error
    return Interval(center - margin, center + margin)


def difference_interval(first: Ratio, second: Ratio, *, resamples: int, seed: int) -> Interval | None:
    """Return the interval of `first - second`, two ratios over different items, each resampled by itself."""
    if min(len(first.parts), len(second.parts)) < 2:
        return None
    draws = _resampled(first, resamples, derive(seed, "first")) - _resampled(second, resamples, derive(seed, "second"))
    return _percentiles(draws)


def left_out_values(texts: Sequence[Any], statistic: Callable[[Sequence[int]], float], *, seed: int) -> Numbers | None:
    """Return a measure of a set of texts without each of 32 groups of them, dealt at random; None below three texts.

    Args:
        texts: the set.
        statistic: the measure of the texts at the given places.
        seed: deals the groups.
    """
    if len(texts) < 3:
        return None
    order = np.random.default_rng(seed).permutation(len(texts))
    groups = min(_GROUPS, len(texts))
    left_out = [statistic(sorted(order[np.arange(len(texts)) % groups != group].tolist())) for group in range(groups)]
    return np.array(left_out, dtype=np.float64)


def jackknife_interval(value: float, left_out: Numbers | None, *, low: float, high: float) -> Interval | None:
    """Return the delete-a-group jackknife interval of a measure of a set of texts.

    Its values without each group give the standard error ``sqrt((g - 1) / g * sum((m_i - mean(m))^2))`` and the
    interval is the value plus and minus Student's t (g - 1 degrees of freedom) times that.

    Args:
        value: the measure of the whole set.
        left_out: see `left_out_values`.
        low: least value the measure can have; the interval is cut there.
        high: greatest value.

    Returns:
        The interval; None for fewer than three texts.
    """
    if left_out is None:
        return None
    groups = len(left_out)
    spread = float(np.var(left_out)) * (groups - 1)  # var divides by g
    margin = float(stats.t.ppf((1 + _LEVEL) / 2, groups - 1) * math.sqrt(spread))
    return Interval(max(low, value - margin), min(high, value + margin))


def _resampled(ratio: Ratio, resamples: int, seed: int) -> Numbers:
    """Return the ratio of each resample; resamples whose weights sum to 0 are left out."""
    parts, weights = np.array(ratio.parts), np.array(ratio.weights)
    generator = np.random.default_rng(seed)
    rows = max(1, _CHUNK // len(parts))
    above, below = [], []
    for start in range(0, resamples, rows):
        drawn = generator.integers(len(parts), size=(min(rows, resamples - start), len(parts)))
        above.append(parts[drawn].sum(axis=1))
        below.append(weights[drawn].sum(axis=1))
    total = np.concatenate(below)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(np.concatenate(above) / total, dtype=np.float64)


def _percentiles(draws: Numbers) -> Interval | None:
    usable = draws[np.isfinite(draws)]
    if not len(usable):
        return None
    low, high = np.quantile(usable, [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
    return Interval(float(low), float(high))
