"""Copying against brute force over all runs of all texts."""

import numpy as np
import pytest

from prefixkit.evaluation import Span, TrainingTexts
from prefixkit.evaluation.words import split_words


def occurs(run, texts):
    return any(text[i : i + len(run)] == run for text in texts for i in range(len(text) - len(run) + 1))


def slow_compare(text, training, n):
    """Every run of words of the text, looked up in every training text."""
    words, texts = split_words(text), [split_words(each) for each in training]
    grams = [words[i : i + n] for i in range(len(words) - n + 1)]
    longest = max(
        (j - i for i in range(len(words)) for j in range(i + 1, len(words) + 1) if occurs(words[i:j], texts)),
        default=0,
    )
    maximal = [
        (i, j)
        for i in range(len(words))
        for j in range(i + n, len(words) + 1)
        if occurs(words[i:j], texts)
        and not (j < len(words) and occurs(words[i : j + 1], texts))
        and not (i > 0 and occurs(words[i - 1 : j], texts))
    ]
    return len(grams), sum(not occurs(gram, texts) for gram in grams), longest, maximal


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("n", [2, 3, 5])
def test_everything_equals_brute_force(seed, n):
    generator = np.random.default_rng(seed)
    vocabulary = np.array([*"abcdefgh"][: 3 + seed % 6])
    training = [" ".join(generator.choice(vocabulary, size=generator.integers(0, 25))) for _ in range(6)]
    index = TrainingTexts(training)
    for _ in range(5):
        text = " ".join(generator.choice([*vocabulary, "unseen"], size=generator.integers(0, 18)))
        found = index.compare(text, n)
        grams, novel, longest, maximal = slow_compare(text, training, n)
        assert (found.ngrams, found.novel) == (grams, novel)
        assert (found.longest.words if found.longest else 0) == longest
        spans = [(len(split_words(text[: span.start])), len(split_words(text[: span.end]))) for span in found.spans]
        assert spans == maximal


def test_spans_mark_the_characters_of_the_text():
    index = TrainingTexts(["This is one of the best films I have seen.", "The end was weak."])
    text = "Well -- ONE of the best films! And the end was dull."
    found = index.compare(text, 3)
    assert found.longest == Span(8, 29, 5)
    assert text[8:29] == "ONE of the best films"
    assert [text[span.start : span.end] for span in found.spans] == ["ONE of the best films", "the end was"]


def test_a_run_never_crosses_from_one_training_text_to_the_next():
    found = TrainingTexts(["a b c", "d e f"]).compare("b c d e", 2)
    assert found.longest is not None
    assert found.longest.words == 2
    assert found.novel == 1


def test_short_runs_are_found_too():
    index = TrainingTexts(["alpha beta gamma", "delta"])
    assert index.compare("x beta gamma y", 5).longest == Span(2, 12, 2)
    assert index.compare("x delta", 5).longest == Span(2, 7, 1)
    assert index.compare("x y", 5).longest is None
    assert index.compare("", 5).longest is None


def test_without_training_texts_everything_is_novel():
    found = TrainingTexts([]).compare("a b c", 2)
    assert (found.ngrams, found.novel, found.longest, found.spans) == (2, 2, None, ())


def test_a_training_text_itself_is_one_run():
    text = "every word of this one was there before"
    found = TrainingTexts(["other words", text]).compare(text, 5)
    assert found.novel == 0
    assert found.longest == Span(0, len(text), 8)
    assert found.spans == (found.longest,)


def test_equal_hashes_are_told_apart(monkeypatch):
    monkeypatch.setattr("prefixkit.evaluation.copying._FACTOR", np.uint64(1))  # order no longer matters to hashes
    found = TrainingTexts(["a b c d"]).compare("d c b a", 3)
    assert found.novel == 2
    assert found.longest == Span(0, 1, 1)
