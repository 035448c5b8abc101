"""What an evaluation leaves: scores with intervals, and the generated texts with what was found in them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from prefixkit.evaluation.copying import Span
from prefixkit.evaluation.intervals import Interval


@dataclass(frozen=True)
class Score:
    """One number.

    Attributes:
        value: the number.
        interval: in which it may lie, where that makes sense.
        influence: how far each text it was measured on moves it, or each group of them; see `intervals`. Empty for
            what is not of texts.
    """

    value: int | float
    interval: Interval | None = None
    influence: tuple[float, ...] = ()


@dataclass(frozen=True)
class Sample:
    """One generated text.

    Attributes:
        system: what wrote it: prefix, base or instruction.
        index: its place; samples of the same index have the same prompt and met the same dice.
        prompt: what it continues, without the instruction.
        text: the continuation.
        is_wanted: whether the judge hears the wanted label in it; None without a judge.
        probability: the judge's probability of that label; None without a judge.
        longest_copy: the longest run of words it shares with a training text; None for no word.
        copied: runs of at least `evaluation.novelty_n` such words, in characters of `text`; they may overlap.
        references: what people wrote for the same prompt, where it is an input to answer.
    """

    system: str
    index: int
    prompt: str
    text: str
    is_wanted: bool | None
    probability: float | None
    longest_copy: Span | None
    copied: tuple[Span, ...]
    references: tuple[str, ...] = ()


@dataclass(frozen=True)
class Prediction:
    """What the prefix and its head said of one held-out text.

    Attributes:
        index: its place.
        text: what was read, whole; for tags, the words with a space between them.
        words: for tags, the words that were read.
        labels: the true labels: one for a whole text, or one for each word that was read.
        predicted: the likeliest labels.
        probabilities: of those.
    """

    index: int
    text: str
    words: tuple[str, ...]
    labels: tuple[str, ...]
    predicted: tuple[str, ...]
    probabilities: tuple[float, ...]


@dataclass(frozen=True)
class Evaluation:
    """Scores by key, as scores.json has them, and what they were measured on: texts, or predicted labels.

    A measure that could not be made has no key; nothing stands in for it.

    Attributes:
        scores: by key.
        samples: what was written.
        predictions: where labels are learned, what was predicted.
        texts: hash of all texts and prompts it was made on: runs of the same ones can be compared text by text.
    """

    scores: Mapping[str, Score]
    samples: tuple[Sample, ...] = ()
    predictions: tuple[Prediction, ...] = ()
    texts: str = ""

    def to_flat(self) -> dict[str, Any]:
        """Return the content of scores.json: a number per key, and `intervals` with [low, high] per key."""
        flat: dict[str, Any] = {key: score.value for key, score in self.scores.items()}
        flat["intervals"] = {
            key: [score.interval.low, score.interval.high]
            for key, score in self.scores.items()
            if score.interval is not None
        }
        return flat

    def to_influences(self) -> dict[str, list[float]]:
        """Return how far each text moves each score, by key."""
        return {
            key: [float(f"{each:.6g}") for each in score.influence]
            for key, score in self.scores.items()
            if score.influence
        }
