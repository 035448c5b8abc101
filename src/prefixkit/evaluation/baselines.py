"""What labels texts without a prefix: a head alone, words alone, the commonest label. Each answers as a prefix does."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from prefixkit.config import Format, Pooling, Recipe
from prefixkit.data import Example, LabelledText, PreparedData
from prefixkit.errors import EvaluationError
from prefixkit.evaluation.answers import Answers
from prefixkit.evaluation.judge import SentimentJudge
from prefixkit.evaluation.labelled import expected_of, states_of
from prefixkit.evaluation.progress import Progress
from prefixkit.logs import get_logger
from prefixkit.models import Base
from prefixkit.seeding import derive

log = get_logger(__name__)

#: Inverse strengths of its regularisation to choose from; the states are scaled to a variance of 1.
_STRENGTHS = (0.001, 0.01, 0.1, 1.0)
#: No probability of a baseline is taken to be smaller: its loss would be infinite.
_LEAST = 1e-6


def head_alone(
    base: Base,
    seen: Sequence[Example],
    data: PreparedData,
    test: Sequence[Example],
    pooling: Pooling,
    validation: Sequence[Example],
    progress: Progress,
) -> Answers | None:
    """Fit a head to the frozen model's hidden states, without a prefix; validation rows choose its regularisation."""
    names = data.classes

    def states(examples: Sequence[Example], words: str) -> list[NDArray[np.float64]]:
        told = progress.stage(f"head alone: {words}", len(examples))
        hidden = states_of(base, examples, None, pooling, told)
        return [each.double().cpu().numpy() for each in hidden]

    learned = _all_expected(seen)
    if len(set(learned.tolist())) < 2:
        return None
    features = np.concatenate(states(seen, "training rows"))
    known, true = np.concatenate(states(validation, "validation rows")), _all_expected(validation)

    def loss(model: Pipeline) -> float:
        logs = _all_classes(model.predict_proba(known), model.classes_, len(names))
        return float(-logs[np.arange(len(true)), true].mean())

    models = [
        make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=1000)).fit(features, learned)
        for strength in _STRENGTHS
    ]
    best = min(models, key=loss)
    logs = tuple(
        _all_classes(best.predict_proba(each), best.classes_, len(names)) for each in states(test, "held-out rows")
    )
    return Answers(names, logs, tuple(map(expected_of, test)))


def words_alone(
    seen: Sequence[Example], test: Sequence[Example], names: tuple[str, ...], recipe: Recipe
) -> Answers | None:
    """Fit a logistic regression to words and word pairs; whole texts only."""
    if recipe.data.format is not Format.CLASSES:
        return None
    rows = [LabelledText(example.text, names[int(expected_of(example)[0])]) for example in seen]
    longest = max(len(example.text) for example in seen)  # no windows: what is labelled is whole
    try:
        judge = SentimentJudge.train(rows, derive(recipe.evaluation.seed, "words"), window_words=longest)
    except EvaluationError:
        log.warning("labels by words alone are not measured: too few training rows, labels or words to learn from")
        return None
    texts = [example.text for example in test]
    columns = np.array([judge.probabilities(texts, label) for label in judge.labels]).T  # [rows, labels]
    known = np.array([names.index(label) for label in judge.labels])
    logs = tuple(_all_classes(row[None], known, len(names)) for row in columns)
    return Answers(names, logs, tuple(map(expected_of, test)))


def majority(seen: Sequence[Example], test: Sequence[Example], names: tuple[str, ...]) -> Answers:
    """Answer with the training rows' shares of the labels, whatever the text."""
    counts = np.bincount(_all_expected(seen), minlength=len(names))
    shares = (counts / counts.sum())[None]
    logs = _all_classes(shares, np.arange(len(names)), len(names))
    expected = tuple(map(expected_of, test))
    return Answers(names, tuple(np.repeat(logs, len(each), axis=0) for each in expected), expected)


def _all_expected(examples: Sequence[Example]) -> NDArray[np.int64]:
    return np.concatenate([expected_of(example) for example in examples])


def _all_classes(probabilities: NDArray[np.float64], known: NDArray[np.int64], classes: int) -> NDArray[np.float64]:
    """Return log probabilities of all classes, from those of the classes a baseline met."""
    whole = np.full((len(probabilities), classes), _LEAST)
    whole[:, known] = probabilities.clip(_LEAST)
    return np.asarray(np.log(whole / whole.sum(axis=1, keepdims=True)), dtype=np.float64)
