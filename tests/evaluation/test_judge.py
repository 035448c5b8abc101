"""The judge: what it learns, what it refuses, and that seeds settle it."""

import pytest

from prefixkit.data import LabelledText
from prefixkit.errors import EvaluationError
from prefixkit.evaluation import SentimentJudge
from prefixkit.evaluation.judge import _with_windows, cut_words


@pytest.fixture(scope="module")
def rows(write_review):
    return [LabelledText(write_review(label, i, 40), label) for i in range(60) for label in ("negative", "positive")]


@pytest.fixture(scope="module")
def judge(rows):
    return SentimentJudge.train(rows[:80], 0, window_words=10)


def test_it_tells_the_labels_of_unseen_texts(judge, rows):
    assert judge.accuracy(rows[80:]) > 0.9
    assert judge.accuracy(rows[80:], cut=True) > 0.7
    assert judge.share(["a great and superb film", "a dull and boring film"], "positive") == [True, False]
    assert judge.share(["a great and superb film", "a dull and boring film"], "negative") == [False, True]


def test_probabilities_of_the_labels_sum_to_one(judge):
    texts = ["great fun", "the worst"]
    pairs = zip(judge.probabilities(texts, "positive"), judge.probabilities(texts, "negative"), strict=True)
    assert [sum(pair) for pair in pairs] == pytest.approx([1, 1])
    assert judge.probabilities(texts, "positive")[0] > 0.5


def test_a_text_without_words_is_never_counted(judge):
    assert judge.share(["", " ... "], "positive") == [False, False]
    assert judge.share(["", " ... "], "negative") == [False, False]
    assert judge.probabilities([""], "positive") == [0.0]
    assert judge.share([], "positive") == []


def test_a_text_of_unknown_words_is_never_counted(rows):
    """Without this it would count as the label with more rows: token salad would be judged, and well."""
    more_positive = [row for i, row in enumerate(rows[:80]) if row.label == "positive" or i % 4 == 0]
    judge = SentimentJudge.train(more_positive, 0, window_words=10)
    assert judge.share(["zzq xkcd qwfp", "great"], "positive") == [False, True]
    assert judge.probabilities(["zzq xkcd qwfp"], "positive") == [0.0]


def test_seeds_settle_the_judge(rows):
    texts = [row.text for row in rows[80:90]]
    first = SentimentJudge.train(rows[:80], 3, window_words=10).probabilities(texts, "positive")
    assert SentimentJudge.train(rows[:80], 3, window_words=10).probabilities(texts, "positive") == first
    assert SentimentJudge.train(rows[:80], 4, window_words=10).probabilities(texts, "positive") != first


def test_accuracy_is_counted_on_the_beginning_when_cut(judge):
    late = LabelledText("the film was a story with an actor and it " + "great superb " * 10, "positive")
    early = LabelledText("great superb " * 5 + "awful boring " * 30, "positive")
    assert judge.correct([early, late], cut=True)[0]
    assert not judge.correct([early])[0]
    assert judge.correct([late])[0]


def test_three_labels_are_judged_too():
    words = {"red": "rose blood", "blue": "sky sea", "green": "leaf grass"}
    rows = [LabelledText(f"{text} {text} number {i}", label) for label, text in words.items() for i in range(10)]
    judge = SentimentJudge.train(rows, 0)
    assert judge.labels == ("blue", "green", "red")
    assert judge.share(["the sea", "a leaf"], "green") == [False, True]


def test_training_texts_are_the_reviews_and_windows_of_the_long_ones():
    short, long = "a b c", " ".join(f"w{i}" for i in range(30))
    made = list(_with_windows([LabelledText(short, "x"), LabelledText(long, "y")], 0, 5))
    assert made[:2] == [(short, "x"), (long, "y")]
    assert len(made) == 4
    for text, label in made[2:]:
        assert label == "y"
        assert text in long
        assert len(text.split()) == 5


def test_texts_are_cut_behind_a_word():
    assert cut_words("One, two (three) four.", 3) == "One, two (three"
    assert cut_words("One.", 3) == "One."


def test_too_few_rows_are_refused():
    with pytest.raises(
        EvaluationError,
        match=r"^the judge needs at least 20 labelled rows, got 3; raise data.split.judge or set evaluation.judge ",
    ):
        SentimentJudge.train([LabelledText("a", "x")] * 3, 0)


def test_a_single_label_is_refused():
    with pytest.raises(
        EvaluationError,
        match=r"^the judge needs rows of two labels or more, all 30 are 'x'; check data.label_column or set",
    ):
        SentimentJudge.train([LabelledText("good film", "x")] * 30, 0)


def test_rows_without_common_words_are_refused():
    rows = [LabelledText(f"word{i}", "xy"[i % 2]) for i in range(30)]
    with pytest.raises(EvaluationError, match=r"^the judge finds no words that occur twice in its rows: "):
        SentimentJudge.train(rows, 0)


def test_an_unknown_label_is_refused_with_the_known_ones(judge):
    expected = r"""^the judge knows the labels negative, positive, not 'positiv'; did you mean "positive"\?$"""
    with pytest.raises(EvaluationError, match=expected):
        judge.share(["a"], "positiv")


def test_accuracy_needs_rows(judge):
    with pytest.raises(
        EvaluationError, match=r"^no labelled test rows to measure the judge on; raise data.split.test$"
    ):
        judge.accuracy([])
