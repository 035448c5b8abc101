"""Diversity by hand, and against sacrebleu itself."""

import numpy as np
import pytest
from sacrebleu.metrics.bleu import BLEU

from prefixkit.evaluation import Distinct, SelfBleu


def random_texts(count, seed=0, words=40, longest=30):
    generator = np.random.default_rng(seed)
    vocabulary = [f"w{i}" for i in range(words)]
    return [" ".join(generator.choice(vocabulary, size=generator.integers(3, longest))) + "." for _ in range(count)]


def test_distinct_by_hand():
    texts = ["The cat saw the cat.", "the dog"]
    assert Distinct(texts, 1)() == 4 / 7  # the, cat, saw, dog of seven words
    assert Distinct(texts, 2)() == 4 / 5  # the-cat twice
    assert Distinct(texts, 3)() == 1.0
    assert Distinct(texts, 1)([1]) == 1.0
    assert Distinct(texts, 2).ngrams == 5


def test_distinct_without_ngrams_is_zero():
    assert Distinct(["a", ""], 2)() == 0.0
    assert Distinct([], 1).ngrams == 0


def slow_self_bleu(texts):
    bleu = BLEU(effective_order=True)
    scores = [bleu.sentence_score(text, texts[:i] + texts[i + 1 :]).score for i, text in enumerate(texts)]
    return sum(scores) / len(scores)


@pytest.mark.parametrize(
    "texts",
    [
        random_texts(12),
        random_texts(7, seed=1, words=6),
        [*random_texts(5, seed=2), *random_texts(5, seed=2)],
        ["I loved it! It's great.", "I loved it, it's bad.", "", "No.", "I loved it! It's great."],
        ["a b c d e", "f g h"],
        ["a a a a a b", "a a b b", "a"],
    ],
)
def test_self_bleu_equals_sacrebleu_on_every_text_against_the_others(texts):
    assert SelfBleu(texts)() == pytest.approx(slow_self_bleu(texts), abs=1e-9)


def test_self_bleu_of_some_places_is_that_of_the_texts_there():
    texts = random_texts(10, seed=3, words=8)
    places = [0, 2, 3, 7, 9]
    assert SelfBleu(texts)(places) == pytest.approx(slow_self_bleu([texts[i] for i in places]), abs=1e-9)


def test_copies_score_a_hundred_and_strangers_none():
    assert SelfBleu(["we saw the film twice"] * 3)() == pytest.approx(100)
    assert SelfBleu(["a b c d", "e f g h", "i j k l"])() == 0


def test_one_text_resembles_nothing():
    assert SelfBleu(["alone"])() == 0.0


def test_texts_without_spaces_resemble_each_other_by_their_characters():
    texts = [f"这部电影非常好看，我很喜欢{end}" for end in "它他她吗呢"]
    assert SelfBleu(texts)() > 80
