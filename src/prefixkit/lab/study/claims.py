"""Claims held against results: confirmed, refuted, or not decided here, always with the reason."""

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import pairwise

from prefixkit.config import ClaimConfig, ClaimTest, Size
from prefixkit.evaluation.intervals import Interval
from prefixkit.lab.pages.comparison import Better, Measure, Unit, format_value
from prefixkit.lab.study.measures import OF_HARDWARE, WITHOUT_A_BEST, known_measures
from prefixkit.lab.study.results import ArmResult, StudyResult
from prefixkit.lab.study.statistics import LEVEL, Estimate, difference, mean_of, ratio, share_of, spread

#: Repeats without which nothing is called confirmed or refuted.
LEAST_REPEATS = 3


class Ruling(StrEnum):
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
        ruling: what became of it.
        why: the measured value with its interval, or the reason there is no decision.
    """

    claim: ClaimConfig
    ruling: Ruling
    why: str


def judge(result: StudyResult) -> list[Verdict]:
    """Return a verdict on every claim of a study.

    A claim is confirmed where the whole 95% interval agrees with it, refuted where none of it does, and not decided
    otherwise, with fewer than three repeats, where it is not known how far other texts would move it, where runs were
    lost that it would have to be about or learned from other rows, on other weights or (of times and memory) on
    another machine than the rest, or where an arm was used at the least or greatest rate that was tried for it and
    would turn the verdict by doing better at one beyond. One that is decided alone, and would not be were all claims
    of the study to hold together (Bonferroni), is said to be.
    """
    count = sum(claim.test is not ClaimTest.NONE for claim in result.study.claims)
    verdicts = []
    for claim in result.study.claims:
        found = _judge(claim, result, LEVEL)
        if found.ruling in (Ruling.CONFIRMED, Ruling.REFUTED):
            together = _judge(claim, result, 1 - (1 - LEVEL) / count)
            if together.ruling is Ruling.UNDECIDED:
                words = f"{found.why}; alone: with all {count} claims taken together it is not decided"
                found = replace(found, why=words)
        verdicts.append(found)
    return verdicts


def _judge(claim: ClaimConfig, result: StudyResult, level: float) -> Verdict:
    if claim.test is ClaimTest.NONE:
        return Verdict(claim, Ruling.UNTESTABLE, claim.why)
    if result.size == Size.TINY:
        return Verdict(claim, Ruling.UNTESTABLE, "this was a run of size tiny, which tries the machinery alone")
    arms, measure = [result.arm(name) for name in claim.arms], known_measures()[claim.measure]
    missing = [arm.name for arm in arms if not arm.values(measure.key)]
    if missing:
        return Verdict(claim, Ruling.UNDECIDED, f"no run of {missing[0]} has {measure.key}")
    found = _findings(claim, arms, measure, level)
    ruling, why = _together([each.ruling for each in found]), "; ".join(each.words for each in found)
    lost = {arm.name: arm.lost(measure.key) for arm in arms if arm.lost(measure.key)}
    untried = {arm.name: arm.untried[0].factor for arm in arms if arm.untried}
    if untried:  # its best rate may be among them
        told = ", ".join(f"x{factor:g} of {name}" for name, factor in untried.items())
        return Verdict(claim, Ruling.UNDECIDED, f"{why}; a rate to try failed: {told}")
    if lost:  # those that came through are the lucky ones
        told = ", ".join(f"{count} of {name}" for name, count in lost.items())
        words = f"{why}; runs that diverged, failed or wrote nothing to measure are not in it: {told}"
        return Verdict(claim, Ruling.UNDECIDED, words)
    if mixed := _mixed(result, arms, measure):
        return Verdict(claim, Ruling.UNDECIDED, f"{why}; {mixed}: run the study again in another folder")
    if result.mixed_versions:
        why += f"; its runs had different versions of {', '.join(result.mixed_versions)}"
    at_edge = [arm.name for arm in arms if _may_improve(arm, measure)]
    if at_edge:
        why += f"; a better rate may lie beyond those tried for {', '.join(at_edge)}"
    return Verdict(claim, ruling, why)


def _may_improve(arm: ArmResult, measure: Measure) -> bool:
    """Whether an arm may do better than it did at a rate that was not tried."""
    return arm.at_edge and measure.key not in WITHOUT_A_BEST


def _mixed(result: StudyResult, arms: Sequence[ArmResult], measure: Measure) -> str:
    """Return in what the runs of a claim are not alike, if they are not."""
    for what, mixed in (("other rows", result.mixed_data), ("other base weights", result.mixed_base)):
        if names := [arm.name for arm in arms if arm.name in mixed]:
            return f"runs of {', '.join(names)} had {what} than the others"
    if measure.key in OF_HARDWARE and result.mixed_hardware:
        return f"its runs were made on {' and '.join(result.mixed_hardware)}"
    return ""


@dataclass(frozen=True)
class _Finding:
    """What one comparison decides, and the words for it."""

    ruling: Ruling
    words: str


def _findings(claim: ClaimConfig, arms: Sequence[ArmResult], measure: Measure, level: float) -> list[_Finding]:
    label, key = measure.label.lower(), measure.key
    match claim.test:
        case ClaimTest.RATIO:
            words = f"{arms[0].name} over {arms[1].name}, {label}"
            moves = _moves(measure, arms[0]) | {-move for move in _moves(measure, arms[1])}
            return [_within(ratio(arms[0], arms[1], key, level=level), claim, words, Unit.RATIO, moves)]
        case ClaimTest.SPREAD:
            found = _within(spread(arms, key, level=level), claim, f"greatest over least {label}, less one", Unit.SHARE)
            is_fair = not any(_may_improve(arm, measure) for arm in arms)
            return [found if is_fair else replace(found, ruling=Ruling.UNDECIDED)]
        case ClaimTest.VALUE if len(arms) > 1:  # of runs that diverged
            return [_within(share_of(arms, key, level=level), claim, f"all {len(arms)} arms, {label}", measure.unit)]
        case ClaimTest.VALUE:
            mean, moves = mean_of(arms[0], key, level=level), _moves(measure, arms[0])
            return [_within(mean, claim, f"{arms[0].name}, {label}", measure.unit, moves)]
        case _:
            return [_better(first, second, measure, claim.margin, level) for first, second in pairwise(arms)]


def _better(first: ArmResult, second: ArmResult, measure: Measure, margin: float, level: float) -> _Finding:
    sign = 1 if measure.better is Better.HIGHER else -1

    def compare(interval: Interval) -> Ruling:
        low, high = sorted((sign * interval.low, sign * interval.high))
        return Ruling.CONFIRMED if low > -margin else Ruling.REFUTED if high < -margin else Ruling.UNDECIDED

    def fairly(interval: Interval) -> Ruling:
        ruling = compare(interval)
        behind = {Ruling.CONFIRMED: second, Ruling.REFUTED: first}.get(ruling)
        return Ruling.UNDECIDED if behind is not None and _may_improve(behind, measure) else ruling

    allowed = f", may be behind by {format_value(margin, measure.unit)}" if margin else ""
    words = f"{first.name} less {second.name}, {measure.label.lower()}{allowed}"
    return _say(difference(first, second, measure.key, level=level), fairly, words, measure.unit)


def _moves(measure: Measure, arm: ArmResult) -> set[int]:
    """Return where an arm's value may go at a rate that was not tried: 1 for up, -1 for down."""
    if not _may_improve(arm, measure):
        return set()
    return {Better.HIGHER: {1}, Better.LOWER: {-1}, Better.NEITHER: {1, -1}}[measure.better]


def _within(
    found: Estimate | None, claim: ClaimConfig, words: str, unit: Unit, moves: Collection[int] = ()
) -> _Finding:
    low, high = (-math.inf if claim.low is None else claim.low), (math.inf if claim.high is None else claim.high)

    def compare(interval: Interval) -> Ruling:
        ends = (-math.inf if -1 in moves else interval.low), (math.inf if 1 in moves else interval.high)
        if low <= ends[0] and ends[1] <= high:
            return Ruling.CONFIRMED
        return Ruling.REFUTED if ends[1] < low or ends[0] > high else Ruling.UNDECIDED

    return _say(found, compare, words, unit)


def _say(found: Estimate | None, compare: Callable[[Interval], Ruling], words: str, unit: Unit) -> _Finding:
    if found is None:
        return _Finding(Ruling.UNDECIDED, f"{words}: no repeat that all arms have, or a value that is not above 0")
    said = f"{words}: {estimate_text(found, unit)}"
    if found.interval is None and found.repeats >= LEAST_REPEATS:
        return _Finding(Ruling.UNDECIDED, f"{said}; how far other texts would move it is not known")
    if found.interval is None or found.repeats < LEAST_REPEATS:
        return _Finding(Ruling.UNDECIDED, f"{said}; {found.repeats} of the {LEAST_REPEATS} repeats it takes")
    return _Finding(compare(found.interval), said)


def _together(rulings: Sequence[Ruling]) -> Ruling:
    """All of it must hold; one part that does not refutes the whole."""
    if Ruling.REFUTED in rulings:
        return Ruling.REFUTED
    return Ruling.CONFIRMED if all(each is Ruling.CONFIRMED for each in rulings) else Ruling.UNDECIDED


def estimate_text(found: Estimate, unit: Unit) -> str:
    """Write a value with its interval: ``-0.016 [-0.026, -0.007]``."""
    value = format_value(found.value, unit)
    if found.interval is None or found.interval.low == found.interval.high:  # all runs alike, as a count is
        return value
    return f"{value} [{format_value(found.interval.low, unit)}, {format_value(found.interval.high, unit)}]"
