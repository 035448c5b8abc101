"""The protocol where labels are learned: the same held-out texts, labelled by four systems.

    prefix      the prefix, and the head that was trained with it
    head        the frozen model without a prefix: a logistic regression on the same hidden states
    words       no language model at all: a logistic regression on words and word pairs, of whole texts
    majority    the training rows' shares of the labels, whatever the text

The second says what the prefix adds to the model's own features, the third whether the task needs a language model.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from prefixkit.classification import hidden_at
from prefixkit.config import Format, Pooling, Recipe
from prefixkit.data import NO_LOSS, Example, LabelledText, PreparedData
from prefixkit.errors import EvaluationError
from prefixkit.evaluation.answers import Answers
from prefixkit.evaluation.judge import SentimentJudge
from prefixkit.evaluation.loss import TokenLosses
from prefixkit.evaluation.measures import Measures
from prefixkit.evaluation.picking import pick, validation_rows
from prefixkit.evaluation.progress import OnProgress, OnTexts, Progress
from prefixkit.evaluation.scores import Evaluation, Prediction, Score
from prefixkit.logs import get_logger
from prefixkit.models import Base
from prefixkit.prefix import Head, Prefix
from prefixkit.seeding import derive

log = get_logger(__name__)

HEAD, WORDS, MAJORITY = "head.", "words.", "majority."
"""What stands before the baselines' keys in scores.json."""

#: Labels the baselines learn from, at most.
_MOST_LABELS = 20_000
#: Inverse strengths of its regularisation to choose from; the states are scaled to a variance of 1.
_STRENGTHS = (0.001, 0.01, 0.1, 1.0)
#: No probability of a baseline is taken to be smaller: its loss would be infinite.
_LEAST = 1e-6


def label_losses(base: Base, examples: Sequence[Example], prefix: Prefix) -> TokenLosses:
    """Measure what the labels of each example cost the prefix and its head, in nats.

    Args:
        base: the frozen model, with nothing attached.
        examples: texts with labels.
        prefix: has a head.

    Raises:
        EvaluationError: the prefix has no head, or one for other labels; or a loss is not finite.
    """
    head = _require_head(prefix, ())
    losses = _answers(base, examples, prefix, head).losses
    return TokenLosses(losses.parts, tuple(map(int, losses.weights)))


def evaluate_labels(
    base: Base, prefix: Prefix, data: PreparedData, recipe: Recipe, *, on_progress: OnProgress | None = None
) -> Evaluation:
    """Measure a prefix and its head beside what labels texts without them.

    The same arguments give the same scores. The baselines learn from as many training rows as training took.

    Args:
        base: the frozen model, with nothing attached.
        prefix: has a head.
        data: the run's data.
        recipe: its evaluation settings; and what was trained on, for the baselines.
        on_progress: told about progress.

    Raises:
        EvaluationError: the prefix has no head, or one for other labels; or a loss is not finite.
    """
    head = _require_head(prefix, data.classes)
    test, seen = pick(data.test, recipe.evaluation.heldout_rows), _seen(prefix, data, recipe)
    validation = validation_rows(data, recipe)
    progress = Progress(on_progress, 2 * len(test) + len(seen) + len(validation))
    measures = Measures(recipe.evaluation)
    answers = _answers(base, test, prefix, head, progress.stage("prefix: labels", len(test)))
    scores = measures.labels(answers) | {"trainable_parameters": _trained_parameters(prefix, head)}
    baselines = {
        HEAD: _head_alone(base, seen, data, test, head.pooling, validation, progress),
        WORDS: _words_alone(seen, test, data.classes, recipe),
        MAJORITY: _majority(seen, test, data.classes),
    }
    for key, found in baselines.items():
        if found is not None:
            scores |= {key + name: score for name, score in measures.labels(found).items()}
    return Evaluation(scores, predictions=_predictions(test, answers))


def _require_head(prefix: Prefix, classes: Sequence[str]) -> Head:
    """Return the prefix's head; `classes`, where given, are those of the data.

    Raises:
        EvaluationError: there is none, or it knows other labels.
    """
    if prefix.head is None:
        raise EvaluationError("this prefix learned text and has no head, so there are no labels to measure")
    if classes and prefix.head.labels != tuple(classes):
        raise EvaluationError(
            f"the head knows the labels {', '.join(prefix.head.labels)}, the data have {', '.join(classes)}; "
            "measure it on the data it was trained on"
        )
    return prefix.head


def _seen(prefix: Prefix, data: PreparedData, recipe: Recipe) -> list[Example]:
    """Return as many training rows as training took, of at most so many labels in all."""
    steps = recipe.train.steps if prefix.card.training is None else prefix.card.training.steps
    rows = pick(data.train, steps * recipe.train.batch_size * recipe.train.accumulation)
    ends = accumulate(len(_places(example)) for example in rows)
    return [example for example, end in zip(rows, ends, strict=True) if end <= _MOST_LABELS]


def _answers(
    base: Base, examples: Sequence[Example], prefix: Prefix, head: Head, told: OnTexts | None = None
) -> Answers:
    hidden = _hidden(base, examples, prefix, head.pooling, told)
    logs = [head(states).double().log_softmax(-1).cpu().numpy() for states in hidden]
    if not all(np.isfinite(each).all() for each in logs):
        raise EvaluationError(
            "the loss of a held-out text is not finite: the prefix is damaged or the dtype too narrow; "
            "try model.dtype=float32"
        )
    return Answers(head.labels, tuple(logs), tuple(map(_expected, examples)))


def _hidden(
    base: Base, examples: Sequence[Example], prefix: Prefix | None, pooling: Pooling, told: OnTexts | None
) -> list[Any]:
    ids = [example.input_ids for example in examples]
    places = [None if pooling is Pooling.MEAN else _places(example) for example in examples]
    return hidden_at(base, ids, places, prefix=prefix, on_progress=told)


def _places(example: Example) -> list[int]:
    return [place for place, label in enumerate(example.labels) if label != NO_LOSS]


def _expected(example: Example) -> NDArray[np.int64]:
    return np.array([label for label in example.labels if label != NO_LOSS])


def _all_expected(examples: Sequence[Example]) -> NDArray[np.int64]:
    return np.concatenate([_expected(example) for example in examples])


def _trained_parameters(prefix: Prefix, head: Head) -> Score:
    training, states = prefix.card.training, prefix.states
    held = states.geometry.num_parameters(states.lengths) + head.weight.numel() + head.bias.numel()
    return Score(held if training is None else training.trained_parameters)


def _head_alone(
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
        hidden = _hidden(base, examples, None, pooling, told)
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
    return Answers(names, logs, tuple(map(_expected, test)))


def _words_alone(
    seen: Sequence[Example], test: Sequence[Example], names: tuple[str, ...], recipe: Recipe
) -> Answers | None:
    """Fit a logistic regression to words and word pairs; whole texts only."""
    if recipe.data.format is not Format.CLASSES:
        return None
    rows = [LabelledText(example.text, names[int(_expected(example)[0])]) for example in seen]
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
    return Answers(names, logs, tuple(map(_expected, test)))


def _majority(seen: Sequence[Example], test: Sequence[Example], names: tuple[str, ...]) -> Answers:
    counts = np.bincount(_all_expected(seen), minlength=len(names))
    shares = (counts / counts.sum())[None]
    logs = _all_classes(shares, np.arange(len(names)), len(names))
    expected = tuple(map(_expected, test))
    return Answers(names, tuple(np.repeat(logs, len(each), axis=0) for each in expected), expected)


def _all_classes(probabilities: NDArray[np.float64], known: NDArray[np.int64], classes: int) -> NDArray[np.float64]:
    """Return log probabilities of all classes, from those of the classes a baseline met."""
    whole = np.full((len(probabilities), classes), _LEAST)
    whole[:, known] = probabilities.clip(_LEAST)
    return np.asarray(np.log(whole / whole.sum(axis=1, keepdims=True)), dtype=np.float64)


def _predictions(test: Sequence[Example], answers: Answers) -> tuple[Prediction, ...]:
    names = answers.names
    return tuple(
        Prediction(
            index=index,
            text=example.text,
            words=example.words,
            labels=tuple(names[each] for each in expected),
            predicted=tuple(names[each] for each in logs.argmax(axis=1)),
            probabilities=tuple(np.exp(logs.max(axis=1)).tolist()),
        )
        for index, (example, expected, logs) in enumerate(zip(test, answers.expected, answers.logs, strict=True))
    )
