"""The comparison of systems: what each measure means, and what may be called better."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from math import isfinite
from typing import Any, TypeGuard

SYSTEMS = ("prefix", "instruction", "base", "head", "words", "majority")
"""The prefix; where text is learned, the base model with a hand-written instruction and alone; where labels are, a head
on the base model without a prefix, a bag of words, and the commonest label."""

REAL = "real"
"""Texts people wrote, measured like generated ones: what the systems are read beside, and no system."""


class Better(StrEnum):
    """Which way a measure improves."""

    HIGHER = "higher"
    LOWER = "lower"
    NEITHER = "neither"


class Unit(StrEnum):
    """How a value is written."""

    NATS = "nats"
    SHARE = "share"
    RATIO = "ratio"
    COUNT = "count"
    SECONDS = "seconds"
    BYTES = "bytes"


@dataclass(frozen=True)
class Measure:
    """One row of the comparison: a key of scores.json and what it says in plain language."""

    key: str
    label: str
    meaning: str
    better: Better
    unit: Unit


MEASURES = (
    Measure("accuracy", "Accuracy", "Share of unseen texts, or of the words read of them, that get their true label.",
            Better.HIGHER, Unit.SHARE),
    Measure("macro_f1", "Macro F1", "Harmonic mean of precision and recall, averaged over the labels: a rare label "
            "counts as much as a common one.", Better.HIGHER, Unit.SHARE),
    Measure("entity_f1", "Entity F1", "The same for whole entities, found from their first word to their last.",
            Better.HIGHER, Unit.SHARE),
    Measure("heldout_nll", "Held-out loss", "How much unseen texts of the wanted kind surprise the model, "
            "in nats per token; where labels are learned, how much those do, in nats per label.",
            Better.LOWER, Unit.NATS),
    Measure("heldout_ppl", "Held-out perplexity", "The same as a number of equally likely next tokens.",
            Better.LOWER, Unit.RATIO),
    Measure("heldout_nll_late", "Loss of second halves", "The held-out loss of the second half of each text, which the "
            "first has led up to.", Better.LOWER, Unit.NATS),
    Measure("heldout_nll_negative", "Loss on the contrast", "The same loss on texts of the other kind. "
            "It need not fall.", Better.NEITHER, Unit.NATS),
    Measure("steering", "Steering", "How much more than the base model it gains on the wanted kind than on the "
            "other, in nats per token.", Better.HIGHER, Unit.NATS),
    Measure("steering_gap", "Steering gap", "Contrast loss minus held-out loss: how strongly the wanted kind "
            "is preferred.", Better.HIGHER, Unit.NATS),
    Measure("bleu", "BLEU", "How many of the words, and of two to four words in a row, people wrote too for the same "
            "input; 0 to 100.", Better.HIGHER, Unit.RATIO),
    Measure("chrf", "chrF", "The same for up to six characters in a row, found and not missed; 0 to 100.",
            Better.HIGHER, Unit.RATIO),
    Measure("nist", "NIST", "The same for up to five words in a row, where rare ones count more; no upper end.",
            Better.HIGHER, Unit.RATIO),
    Measure("rouge_1", "ROUGE-1", "Words in common with what people wrote for the same input, found and not missed.",
            Better.HIGHER, Unit.SHARE),
    Measure("rouge_2", "ROUGE-2", "The same for pairs of words.", Better.HIGHER, Unit.SHARE),
    Measure("rouge_l", "ROUGE-L", "The same for the longest run of words in the same order, with gaps.",
            Better.HIGHER, Unit.SHARE),
    Measure("meteor", "METEOR", "Words or stems in common, recall before precision, and in how few pieces; without "
            "synonyms.", Better.HIGHER, Unit.SHARE),
    Measure("bertscore", "BERTScore", "How near its words come to those that people wrote, in the hidden states of an "
            "encoder; F1, not rescaled.", Better.HIGHER, Unit.SHARE),
    Measure("sentiment_accuracy", "Judged as wanted", "Share of generated texts that the judge gives "
            "the wanted label.", Better.HIGHER, Unit.SHARE),
    Measure("fluency_ppl", "Fluency", "Perplexity of the generated texts under the plain base model: "
            "how natural it finds them. Repetitive texts, and code, look natural too; people surprise it more than "
            "any system does.", Better.LOWER, Unit.RATIO),
    Measure("repetition", "Repetition", "Share of four-word sequences that the same text said before.",
            Better.LOWER, Unit.SHARE),
    Measure("distinct_1", "Distinct words", "Share of words that are different, over all generated texts.",
            Better.HIGHER, Unit.SHARE),
    Measure("distinct_2", "Distinct pairs", "The same for pairs of words.", Better.HIGHER, Unit.SHARE),
    Measure("distinct_3", "Distinct triples", "The same for three words in a row.",
            Better.HIGHER, Unit.SHARE),
    Measure("self_bleu", "Self-BLEU", "How much the generated texts resemble each other.",
            Better.LOWER, Unit.RATIO),
    Measure("novelty", "Novelty", "Share of short word sequences that stand in no training text.",
            Better.HIGHER, Unit.SHARE),
    Measure("longest_copy", "Longest copy", "Most words in a row taken from a training text.",
            Better.LOWER, Unit.COUNT),
    Measure("seconds_per_token", "Time per token", "Median time for one more token of one text.",
            Better.LOWER, Unit.SECONDS),
    Measure("trainable_parameters", "Numbers trained", "How many numbers the system had to learn.",
            Better.NEITHER, Unit.COUNT),
)  # fmt: skip
"""Every measure the report compares, in the order it shows them."""


@dataclass(frozen=True)
class Cell:
    """One value of one system; positions are percentages along the row's own scale."""

    system: str
    value: float
    text: str
    interval: tuple[float, float] | None
    interval_text: str
    at: float
    span: tuple[float, float] | None
    is_best: bool


@dataclass(frozen=True)
class ComparisonRow:
    """One measure with the cell of each system that has a value."""

    measure: Measure
    cells: Mapping[str, Cell]

    @property
    def has_intervals(self) -> bool:
        """Whether several systems have an interval, so that their places on a common scale mean something."""
        return sum(cell.span is not None for cell in self.cells.values()) > 1


def compare(scores: Mapping[str, Any]) -> list[ComparisonRow]:
    """Build the comparison table from the flat keys of scores.json; measures without a value are left out."""
    intervals = scores.get("intervals") or {}
    rows = []
    for measure in MEASURES:
        keys = {column: score_key(column, measure.key) for column in (*SYSTEMS, REAL)}
        values = {column: float(scores[key]) for column, key in keys.items() if is_number(scores.get(key))}
        if not values:
            continue
        known = {system: _interval(intervals.get(keys[system])) for system in values}
        rows.append(ComparisonRow(measure, _cells(measure, values, known)))
    return rows


def score_key(system: str, measure: str) -> str:
    """Return the key of scores.json: the prefix has none in front, the others their name and a dot."""
    return measure if system == "prefix" else f"{system}.{measure}"


def is_number(value: object) -> TypeGuard[float]:
    """Whether a JSON value is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)


def best_system(
    values: Mapping[str, float], intervals: Mapping[str, tuple[float, float] | None], better: Better
) -> str | None:
    """Return the system that is better than every other beyond its 95% interval, if there is one.

    Texts of people take no part. A single system, a value without an interval or two intervals that touch leave the
    question open: None.
    """
    values = {system: value for system, value in values.items() if system != REAL}
    if better is Better.NEITHER or len(values) < 2:
        return None
    winner = max(values, key=lambda system: values[system] if better is Better.HIGHER else -values[system])
    own = intervals.get(winner)
    for system in values:
        other = intervals.get(system)
        if system == winner:
            continue
        if own is None or other is None or (own[0] <= other[1] and other[0] <= own[1]):
            return None
    return winner


def format_value(value: float, unit: Unit) -> str:
    """Write a value the way its unit is read: 3.62, 89.1%, 230,400, 41.5 ms."""
    match unit:
        case Unit.SHARE:
            return f"{100 * value:.1f}%"
        case Unit.COUNT:
            return f"{value:,.0f}"
        case Unit.SECONDS if abs(value) < 0.5:
            return f"{1000 * value:.1f} ms"
        case Unit.SECONDS:
            return f"{value:,.0f} s" if abs(value) >= 10 else f"{value:.2f} s"
        case Unit.BYTES:
            return f"{value / 1e9:.2f} GB" if abs(value) >= 1e9 else f"{value / 1e6:,.2f} MB"
        case Unit.NATS:
            return f"{value + 0.0:.3f}" if value == 0 or abs(value) >= 0.0005 else f"{value:.1g}"  # never "-0.000"
        case Unit.RATIO:
            return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def _interval(pair: Sequence[float] | None) -> tuple[float, float] | None:
    if not pair or len(pair) != 2 or not all(is_number(end) for end in pair):
        return None
    return float(pair[0]), float(pair[1])


def _cells(
    measure: Measure, values: Mapping[str, float], intervals: Mapping[str, tuple[float, float] | None]
) -> dict[str, Cell]:
    best = best_system(values, intervals, measure.better)
    ends = [end for interval in intervals.values() if interval for end in interval] + list(values.values())
    low, width = min(ends), max(ends) - min(ends)

    def place(value: float) -> float:
        return round(100 * (value - low) / width, 2) if width else 50.0

    cells = {}
    for system, value in values.items():
        interval = intervals[system]
        cells[system] = Cell(
            system=system,
            value=value,
            text=format_value(value, measure.unit),
            interval=interval,
            interval_text=" – ".join(format_value(end, measure.unit) for end in interval) if interval else "",
            at=place(value),
            span=(place(interval[0]), place(interval[1])) if interval else None,
            is_best=system == best,
        )
    return cells
