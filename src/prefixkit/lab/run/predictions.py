"""Predicted labels for people: which label is taken for which, and the mistakes the prefix is surest of."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from prefixkit.lab.pages.facts import Json

#: Labels beyond which a table of all against all is no longer read.
_MOST_LABELS = 12
_MISTAKES = 6
_LONGEST = 600


@dataclass(frozen=True)
class ConfusionRow:
    """What became of the texts, or words, of one true label."""

    label: str
    counts: Sequence[int]
    shares: Sequence[float]


@dataclass(frozen=True)
class Mistake:
    """A wrong label, and how sure of it the head was; `word` is empty where whole texts are labelled."""

    index: int
    text: str
    word: str
    label: str
    predicted: str
    probability: str


@dataclass(frozen=True)
class Predictions:
    """What the report shows of predictions.jsonl.

    Attributes:
        total: labels that were asked for.
        wrong: those that came out wrong.
        labels: all labels, sorted; empty where there are too many for a table.
        confusion: per true label, how often each label was predicted, in the order of `labels`.
        mistakes: the surest first.
    """

    total: int
    wrong: int
    labels: Sequence[str]
    confusion: Sequence[ConfusionRow]
    mistakes: Sequence[Mistake]


def read_predictions(lines: Sequence[Json]) -> Predictions | None:
    """Return what is shown of the lines of predictions.jsonl; None where there are none."""
    if not lines:
        return None
    pairs = Counter(pair for line in lines for pair in zip(line["labels"], line["predicted"], strict=True))
    labels = sorted({label for pair in pairs for label in pair})
    is_table = len(labels) <= _MOST_LABELS
    return Predictions(
        total=sum(pairs.values()),
        wrong=sum(count for (true, found), count in pairs.items() if true != found),
        labels=labels if is_table else [],
        confusion=[_row(label, labels, pairs) for label in labels] if is_table else [],
        mistakes=_mistakes(lines),
    )


def _row(label: str, labels: Sequence[str], pairs: Counter[tuple[str, str]]) -> ConfusionRow:
    counts = [pairs[label, other] for other in labels]
    return ConfusionRow(label, counts, [count / max(1, sum(counts)) for count in counts])


def _mistakes(lines: Sequence[Json]) -> list[Mistake]:
    """Return the surest mistakes, one of each text."""
    worst = []
    for line in lines:
        words = line.get("words") or [""] * len(line["labels"])
        answers = zip(words, line["labels"], line["predicted"], line["probabilities"], strict=True)
        wrong = [answer for answer in answers if answer[1] != answer[2]]
        if wrong:
            worst.append((max(wrong, key=lambda answer: answer[3]), line))
    worst.sort(key=lambda pair: -pair[0][3])
    return [
        Mistake(line["index"], _cut(line["text"]), word, true, found, f"{probability:.0%}")
        for (word, true, found, probability), line in worst[:_MISTAKES]
    ]


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else text[:_LONGEST].rsplit(" ", 1)[0] + " …"
