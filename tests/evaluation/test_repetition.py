"""Repetition by hand."""

import pytest

from prefixkit.evaluation import repetition_rates


def test_the_share_of_four_grams_that_were_there_before():
    # "a b c d" "b c d a" "c d a b" "d a b c" "a b c d": the fifth is the first again.
    assert repetition_rates(["a b c d a b c d", "one two three four five"]) == pytest.approx([1 / 5, 0.0])


def test_a_text_that_says_one_thing_over_and_over():
    assert repetition_rates(["no " * 103])[0] == pytest.approx(99 / 100)


def test_texts_without_a_four_gram_are_left_out():
    assert repetition_rates(["", "a b c", "a b c d"]) == [0.0]
