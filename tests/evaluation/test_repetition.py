"""Repetition by hand."""

import pytest

from prefixkit.evaluation import repetition


def test_the_share_of_four_grams_that_were_there_before():
    # "a b c d" "b c d a" "c d a b" "d a b c" "a b c d": the fifth is the first again.
    assert repetition(["a b c d a b c d", "one two three four five"]).parts == pytest.approx((1 / 5, 0.0))


def test_a_text_that_says_one_thing_over_and_over():
    assert repetition(["no " * 103]).value == pytest.approx(99 / 100)


def test_texts_without_a_four_gram_are_left_out():
    assert repetition(["", "a b c", "a b c d"]).weights == (0.0, 0.0, 1.0)
