"""Claims held against results: confirmed, refuted, or not decided here, always with the reason."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise

from prefixkit.config import ClaimConfig, ClaimTest, Size
from prefixkit.evaluation.intervals import Interval
from prefixkit.lab.comparison import Better, Measure, Unit, format_value
from prefixkit.lab.study.measures import known_measures
from prefixkit.lab.study.results import StudyResult
from prefixkit.lab.study.statistics import Estimate, difference, mean_of, ratio, spread

#: Seeds without which nothing is called confirmed or refuted.
LEAST_SEEDS = 3


class Outcome(StrEnum):
    """What became of a claim."""

    CONFIRMED = "confirmed"
    REFUTED = "refuted"
    UNDECIDED = "not decided here"
    UNTESTABLE = "not testable here"


@dataclass(frozen=True)
class Verdict:
    """A claim and what became of it.

    Attributes:
        claim: which.
        outcome: what became of it.
        why: the measured value with its interval, or the reason there is no decision.
    """

    claim: ClaimConfig
    outcome: Outcome
    why: str


def judge(result: StudyResult) -> list[Verdict]:
    """Return a verdict on every claim of a study.

    A claim is confirmed where the whole 95% interval agrees with it, refuted where none of it does, and not decided
    otherwise, or with fewer than three seeds.
    """
    return [_judge(claim, result) for claim in result.study.claims]


def _judge(claim: ClaimConfig, result: StudyResult) -> Verdict:
    if claim.test is ClaimTest.NONE:
        return Verdict(claim, Outcome.UNTESTABLE, claim.why)
    if result.size == Size.TINY:
        return Verdict(claim, Outcome.UNTESTABLE, "this was a run of size tiny, which tries the machinery alone")
    measure = known_measures()[claim.measure]
    match claim.test:
        case ClaimTest.BETTER | ClaimTest.ORDERED:
            found = [_decide_better(first, second, measure, result) for first, second in pairwise(claim.arms)]
        case ClaimTest.RATIO:
            first, second = (result.arm(name) for name in claim.arms)
            words = f"{first.name} over {second.name}, {measure.label.lower()}"
            found = [_decide(ratio(first, second, claim.measure), claim, words, Unit.RATIO)]
        case ClaimTest.SPREAD:
            arms = [result.arm(name) for name in claim.arms]
            words = f"greatest over least {measure.label.lower()}, less one"
            found = [_decide(spread(arms, claim.measure), claim, words, Unit.SHARE)]
        case ClaimTest.VALUE:
            words = f"{claim.arms[0]}, {measure.label.lower()}"
            found = [_decide(mean_of(result.arm(claim.arms[0]), claim.measure), claim, words, measure.unit)]
    return Verdict(claim, _together([outcome for outcome, _ in found]), "; ".join(words for _, words in found))


def _decide_better(first: str, second: str, measure: Measure, result: StudyResult) -> tuple[Outcome, str]:
    sign = 1 if measure.better is Better.HIGHER else -1

    def compare(interval: Interval) -> Outcome:
        low, high = sorted((sign * interval.low, sign * interval.high))
        return Outcome.CONFIRMED if low > 0 else Outcome.REFUTED if high < 0 else Outcome.UNDECIDED

    words = f"{first} less {second}, {measure.label.lower()}"
    return _say(difference(result.arm(first), result.arm(second), measure.key), compare, words, measure.unit)


def _decide(found: Estimate | None, claim: ClaimConfig, words: str, unit: Unit) -> tuple[Outcome, str]:
    low, high = (-math.inf if claim.low is None else claim.low), (math.inf if claim.high is None else claim.high)

    def compare(interval: Interval) -> Outcome:
        if low <= interval.low and interval.high <= high:
            return Outcome.CONFIRMED
        return Outcome.REFUTED if interval.high < low or interval.low > high else Outcome.UNDECIDED

    return _say(found, compare, words, unit)


def _say(found: Estimate | None, compare: Callable[[Interval], Outcome], words: str, unit: Unit) -> tuple[Outcome, str]:
    """Return what an estimate decides, and the words for it."""
    if found is None:
        return Outcome.UNDECIDED, f"{words}: no trials to take it from"
    said = f"{words}: {estimate_text(found, unit)}"
    if found.interval is None or found.seeds < LEAST_SEEDS:
        return Outcome.UNDECIDED, f"{said}; {found.seeds} of the {LEAST_SEEDS} seeds it takes"
    return compare(found.interval), said


def _together(outcomes: Sequence[Outcome]) -> Outcome:
    """All of it must hold; one part that does not refutes the whole."""
    if Outcome.REFUTED in outcomes:
        return Outcome.REFUTED
    return Outcome.CONFIRMED if all(each is Outcome.CONFIRMED for each in outcomes) else Outcome.UNDECIDED


def estimate_text(found: Estimate, unit: Unit) -> str:
    """Write a value with its interval: ``-0.016 [-0.026, -0.007]``."""
    value = format_value(found.value, unit)
    if found.interval is None:
        return value
    return f"{value} [{format_value(found.interval.low, unit)}, {format_value(found.interval.high, unit)}]"
