"""The judge: a small classifier, trained on rows nobody else sees, that says what a text sounds like.

TF-IDF of words and word pairs with logistic regression: weights one can look at, trained in seconds on any
machine, and independent of the language model it judges. It is as good as its accuracy on real texts, which
is therefore reported beside what it says, for whole texts and for texts cut to the length of generations.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline

from prefixkit.data import LabelledText
from prefixkit.errors import EvaluationError, did_you_mean
from prefixkit.evaluation.words import split_words, word_spans
from prefixkit.seeding import derive

_FEWEST_ROWS = 20
#: Windows cut from each training text, beside the text itself.
_WINDOWS = 2
_MOST_FEATURES = 60_000
#: Inverse strength of the regularisation; larger than scikit-learn's 1 because TF-IDF rows have length 1.
_C = 4.0


@dataclass(frozen=True)
class SentimentJudge:
    """Tells labels apart by the words of a text. Made by `train`.

    Attributes:
        labels: the labels it knows, sorted.
        window_words: length of the windows it was also trained on.
    """

    labels: tuple[str, ...]
    window_words: int
    _pipeline: Pipeline

    @classmethod
    def train(cls, rows: Sequence[LabelledText], seed: int, *, window_words: int = 60) -> "SentimentJudge":
        """Train a judge; the same rows and seed give the same judge.

        Args:
            rows: labelled texts that neither the prefix nor any reported number is made from.
            seed: places the windows.
            window_words: about the length of the texts it will judge. Generations are much shorter than most
                reviews, so two random windows of every longer text are training texts too.

        Raises:
            EvaluationError: there are fewer than 20 rows, only one label, or no words.
        """
        labels = sorted({row.label for row in rows})
        if len(rows) < _FEWEST_ROWS:
            raise EvaluationError(
                f"the judge needs at least {_FEWEST_ROWS} labelled rows, got {len(rows)}; "
                "raise data.split.judge or set evaluation.judge to false"
            )
        if len(labels) < 2:
            raise EvaluationError(
                f"the judge needs rows of two labels or more, all {len(rows)} are {labels[0]!r}; "
                "check data.label_column or set evaluation.judge to false"
            )
        texts, targets = zip(*_with_windows(rows, seed, window_words), strict=True)
        pipeline = make_pipeline(
            TfidfVectorizer(
                tokenizer=split_words, token_pattern=None, lowercase=False, ngram_range=(1, 2),
                sublinear_tf=True, min_df=2, max_features=_MOST_FEATURES, dtype=np.float32,
            ),
            LogisticRegression(C=_C, solver="lbfgs", max_iter=200),
        )  # fmt: skip
        try:
            pipeline.fit(texts, targets)
        except ValueError as error:  # scikit-learn's only complaint about such input: an empty vocabulary
            raise EvaluationError(f"the judge finds no words that occur twice in its rows: {error}") from None
        return cls(tuple(labels), window_words, pipeline)

    def probabilities(self, texts: Sequence[str], label: str) -> list[float]:
        """Return the judge's probability that each text has this label; 0 for a text without a word it knows.

        Raises:
            EvaluationError: the judge was not trained on this label.
        """
        return [float(row[self._place(label)]) for row in self._predict(texts)]

    def share(self, texts: Sequence[str], label: str) -> list[bool]:
        """Say of each text whether it sounds like this label more than like any other.

        A text without a word the judge knows sounds like nothing and never counts.

        Raises:
            EvaluationError: the judge was not trained on this label.
        """
        place = self._place(label)
        return [bool(row.any() and row.argmax() == place) for row in self._predict(texts)]

    def correct(self, rows: Sequence[LabelledText], *, cut: bool = False) -> list[bool]:
        """Say of each real text whether the judge finds its label.

        Args:
            rows: texts the judge was not trained on.
            cut: judge only the first `window_words` words of each, as much as there is of a generation.
        """
        texts = [cut_words(row.text, self.window_words) if cut else row.text for row in rows]
        return [
            bool(row.any() and self.labels[row.argmax()] == expected.label)
            for row, expected in zip(self._predict(texts), rows, strict=True)
        ]

    def accuracy(self, rows: Sequence[LabelledText], *, cut: bool = False) -> float:
        """Return the share of real texts whose label the judge finds; see `correct`.

        Raises:
            EvaluationError: there are no rows.
        """
        if not rows:
            raise EvaluationError("no labelled test rows to measure the judge on; raise data.split.test")
        return sum(self.correct(rows, cut=cut)) / len(rows)

    def _predict(self, texts: Sequence[str]) -> NDArray[np.float64]:
        """Return probabilities, [texts, labels]; a row of zeros for a text without a word the judge knows."""
        if not texts:
            return np.zeros((0, len(self.labels)))
        features = self._pipeline[:-1].transform(texts)
        found = np.asarray(self._pipeline[-1].predict_proba(features), dtype=np.float64)
        found[features.getnnz(axis=1) == 0] = 0
        return found

    def _place(self, label: str) -> int:
        if label not in self.labels:
            known = ", ".join(self.labels)
            raise EvaluationError(
                f"the judge knows the labels {known}, not {label!r}{did_you_mean(label, self.labels)}"
            )
        return self.labels.index(label)


def cut_words(text: str, words: int) -> str:
    """Return the beginning of a text, up to and with this many words."""
    spans = word_spans(text)
    return text if len(spans) <= words else text[: spans[words - 1][1]]


def _with_windows(rows: Sequence[LabelledText], seed: int, words: int) -> Iterator[tuple[str, str]]:
    """Yield every text and random windows of those that are longer than a window, with their labels."""
    generator = np.random.default_rng(derive(seed, "judge.windows"))
    for row in rows:
        yield row.text, row.label
        spans = word_spans(row.text)
        if len(spans) <= words:
            continue
        for start in generator.integers(len(spans) - words + 1, size=_WINDOWS):
            yield row.text[spans[start][0] : spans[start + words - 1][1]], row.label
