"""NIST, by hand and beside nltk's."""

import math

import pytest
from nltk.translate.nist_score import corpus_nist

from prefixkit.evaluation import sums_interval
from prefixkit.evaluation.nist import nist_sums

TEXTS = ["the old inn is a pub", "it serves cheap food near the old river", "a a a a a"]
REFERENCES = ["the old inn is a cheap pub by the river", "cheap food is served near the river", "a b a c d"]


def test_a_score_by_hand():
    """References "a b" and "a c": a is said 2 times of 4, so it holds 1 bit; b and c hold 2, a pair after a holds 1."""
    found = nist_sums([["a", "b"]], [[["a", "b"], ["a", "c"]]])
    of_words, of_pairs = (1 + 2) / 2, 1 / 1
    assert found.value == pytest.approx(of_words + of_pairs)


def test_a_short_text_is_penalised_as_doddington_says():
    """Two thirds of the references' mean length halve the score."""
    whole = nist_sums([["a", "b"]], [[["a", "b"]]])
    short = nist_sums([["a", "b"]], [[["a", "b"], ["a", "b", "c", "d"]]])
    weights = {"a": math.log2(6 / 2), "b": math.log2(6 / 2), "ab": math.log2(2 / 2)}
    assert whole.value == pytest.approx(math.log2(2))
    assert short.value == pytest.approx(0.5 * ((weights["a"] + weights["b"]) / 2 + weights["ab"]))


def test_with_one_reference_each_it_is_nltks():
    texts, references = [text.split() for text in TEXTS], [[text.split()] for text in REFERENCES]
    assert nist_sums(texts, references).value == pytest.approx(corpus_nist(references, texts))


def test_several_references_are_matched_together():
    """nltk takes one of them, and finds less: "a b" and "c d" stand in different references."""
    references = [[["a", "b", "x", "y", "z"], ["c", "d", "x", "y", "z"]]]
    text = [["a", "b", "c", "d", "x"]]
    assert nist_sums(text, references).value > corpus_nist(references, text) > 0


def test_an_ngram_counts_no_more_often_than_one_reference_has_it():
    once = nist_sums([["a", "b"]], [[["a", "x"], ["y", "a"]]])
    twice = nist_sums([["a", "a"]], [[["a", "x"], ["y", "a"]]])
    assert once.value == twice.value > 0


def test_texts_too_short_for_an_order_have_a_score_all_the_same():
    assert nist_sums([["a"], ["b"]], [[["a"]], [["b"]]]).value == pytest.approx(1.0)
    assert nist_sums([[], []], [[["a"]], [["b"]]]).value == 0
    assert nist_sums([["a"]], [[[]]]).value == 0


def test_its_interval_is_over_texts():
    texts, references = [text.split() for text in TEXTS * 5], [[text.split()] for text in REFERENCES * 5]
    sums = nist_sums(texts, references)
    found = sums_interval(sums, resamples=200, seed=0)
    assert found.low < sums.value < found.high
