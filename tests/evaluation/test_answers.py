"""Scores of labels against numbers worked out by hand."""

import numpy as np
import pytest
from sklearn.metrics import f1_score

from prefixkit.config import EvaluationConfig
from prefixkit.evaluation.answers import Answers
from prefixkit.evaluation.measures import Measures


def answers(names, rows):
    """Rows of (true label, probabilities) per place."""
    logs = tuple(np.log(np.array([p for _, p in row])) for row in rows)
    return Answers(tuple(names), logs, tuple(np.array([names.index(true) for true, _ in row]) for row in rows))


WHOLE = answers(["a", "b", "c"], [
    [("a", [0.7, 0.2, 0.1])],  # right
    [("a", [0.1, 0.8, 0.1])],  # taken for b
    [("b", [0.2, 0.5, 0.3])],  # right
    [("c", [0.6, 0.1, 0.3])],  # taken for a
])  # fmt: skip


def test_accuracy_loss_and_f1_of_whole_texts():
    scores = Measures(EvaluationConfig()).labels(WHOLE)
    assert scores["accuracy"].value == 0.5
    assert scores["heldout_nll"].value == pytest.approx(-np.log([0.7, 0.1, 0.5, 0.3]).mean(), abs=1e-12)
    # a: 1 right of 2 true, 2 predicted; b: 1 right of 1 true, 2 predicted; c: never right
    assert scores["macro_f1"].value == pytest.approx((0.5 + 2 / 3 + 0) / 3)
    assert "entity_f1" not in scores
    low, high = scores["accuracy"].interval.low, scores["accuracy"].interval.high
    assert (round(low, 3), round(high, 3)) == (0.15, 0.85)  # Wilson, 2 of 4


def test_every_word_counts_the_same_whatever_the_length_of_its_text():
    sure = [0.9, 0.1]
    tags = answers(["x", "y"], [[("x", sure)] * 3 + [("y", sure)], [("y", sure)]])
    scores = Measures(EvaluationConfig()).labels(tags)
    assert scores["accuracy"].value == pytest.approx(3 / 5)
    assert scores["heldout_nll"].value == pytest.approx(-(3 * np.log(0.9) + 2 * np.log(0.1)) / 5)


def test_an_entity_counts_only_whole():
    names = ["B-PER", "I-PER", "O"]

    def sure_of(name):
        return [0.9 if each == name else 0.05 for each in names]

    true = ["B-PER", "I-PER", "O", "B-PER", "O"]
    found = ["B-PER", "O", "O", "B-PER", "O"]  # the first is cut short, the second whole
    tags = answers(names, [[(t, sure_of(f)) for t, f in zip(true, found, strict=True)]] * 3)
    scores = Measures(EvaluationConfig()).labels(tags)
    assert scores["entity_f1"].value == pytest.approx(0.5)
    assert scores["accuracy"].value == pytest.approx(0.8)


@pytest.mark.parametrize(
    ("names", "marks"),
    [(["O", "B-PER", "I-PER"], True), (["B-X", "I-X"], True), (["O"], False), (["O", "B-"], False),
     (["NN", "O"], False), (["good", "bad"], False)],
)  # fmt: skip
def test_tags_that_mark_entities_are_known_by_their_names(names, marks):
    assert Answers(tuple(names), (), ()).has_entities is marks


def test_a_text_without_a_place_costs_nothing():
    empty = Answers(("a", "b"), (np.zeros((0, 2)), np.log([[0.5, 0.5]])), (np.array([], dtype=np.int64), np.array([1])))
    assert empty.losses.value == pytest.approx(np.log(2))
    assert empty.hits.value == 0.0


def test_a_label_that_is_predicted_and_never_true_counts():
    """As scikit-learn has it: one that is given wrongly is a class found in none of its texts."""
    sure = {"a": [0.8, 0.1, 0.1], "b": [0.1, 0.8, 0.1], "c": [0.1, 0.1, 0.8]}
    found = answers("abc", [[(true, sure[own])] for true, own in ("aa", "ac", "bb", "bb")])
    expected = f1_score(list("aabb"), list("acbb"), average="macro", zero_division=0)
    assert found.macro_f1(range(4)) == pytest.approx(expected) == pytest.approx(5 / 9)
