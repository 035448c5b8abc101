"""The protocol where labels are learned: the same held-out texts, labelled by four systems.

    prefix      the prefix, and the head that was trained with it
    head        the frozen model without a prefix: a logistic regression on the same hidden states
    words       no language model at all: a logistic regression on words and word pairs, of whole texts
    majority    the training rows' shares of the labels, whatever the text

The second says what the prefix adds to the model's own features, the third whether the task needs a language model.
"""

from collections.abc import Sequence
from itertools import accumulate

import numpy as np

from prefixkit.config import Pooling, Recipe
from prefixkit.data import Example, PreparedData
from prefixkit.errors import EvaluationError, NotFiniteError
from prefixkit.evaluation.answers import Answers
from prefixkit.evaluation.baselines import head_alone, majority, words_alone
from prefixkit.evaluation.labelled import expected_of, places_of, states_of
from prefixkit.evaluation.loss import TokenLosses
from prefixkit.evaluation.measures import Measures
from prefixkit.evaluation.picking import hash_of_texts, pick, validation_rows
from prefixkit.evaluation.progress import OnProgress, OnTexts, Progress
from prefixkit.evaluation.scores import Evaluation, Prediction, Score
from prefixkit.models import Base
from prefixkit.prefix import Head, Prefix

HEAD, WORDS, MAJORITY = "head.", "words.", "majority."
"""What stands before the baselines' keys in scores.json."""

#: Labels the baselines learn from, at most.
_MOST_LABELS = 20_000


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
    scores = measures.labels(answers) | {"trainable_parameters": Score(prefix.trained_parameters)}
    baselines = {
        HEAD: head_alone(base, seen, data, test, head.pooling, validation, progress),
        WORDS: words_alone(seen, test, data.classes, recipe),
        MAJORITY: majority(seen, test, data.classes),
    }
    for key, found in baselines.items():
        if found is not None:
            scores |= {key + name: score for name, score in measures.labels(found).items()}
    return Evaluation(scores, predictions=_predictions(test, answers), texts=hash_of_texts(test))


def _require_head(prefix: Prefix, classes: Sequence[str]) -> Head:
    """Return the prefix's head; `classes`, where given, are those of the data.

    Raises:
        EvaluationError: there is none, it knows other labels, or reads texts in another way than they were encoded.
    """
    if prefix.head is None:
        raise EvaluationError("this artefact learned text and has no head, so there are no labels to measure")
    if prefix.head.pooling is Pooling.LAST:
        raise EvaluationError(
            "this head was imported from PEFT and reads a text's own last token, where a recipe's examples end "
            "otherwise; measure what prefixkit.classify says of the texts"
        )
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
    ends = accumulate(len(places_of(example)) for example in rows)
    return [example for example, end in zip(rows, ends, strict=True) if end <= _MOST_LABELS]


def _answers(
    base: Base, examples: Sequence[Example], prefix: Prefix, head: Head, told: OnTexts | None = None
) -> Answers:
    hidden = states_of(base, examples, prefix, head.pooling, told)
    logs = [head(states).double().log_softmax(-1).cpu().numpy() for states in hidden]
    if not all(np.isfinite(each).all() for each in logs):
        raise NotFiniteError(
            "the loss of a held-out text is not finite: the artefact is damaged or the dtype too narrow; "
            "try model.dtype=float32"
        )
    return Answers(head.labels, tuple(logs), tuple(map(expected_of, examples)))


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
