"""Ranking rows by how clearly they open as their label."""

import pytest

from prefixkit.data.clearest import clearest_rows
from prefixkit.data.rows import Row
from prefixkit.errors import DataError

GOOD = ["a great film", "wonderful acting , great fun", "i loved this great story", "superb and wonderful"]
BAD = ["a dull film", "terrible acting , awful fun", "i hated this dull story", "awful and terrible"]
MUDDLED = ["dull at first , awful even , then better", "terrible , terrible , hated half of it"]


def rows(texts, start=0):
    return [Row(number, text=f"{text} {number}", label="any") for number, text in enumerate(texts, start)]


def test_rows_that_read_like_the_other_label_go_first():
    good, bad = rows(GOOD * 5), rows(BAD * 5, 100)
    muddled = rows(MUDDLED, 200)
    mixed = [*good[:7], muddled[0], *good[7:], muddled[1]]
    kept = clearest_rows(mixed, bad, share=20 / 22, words=50)
    assert kept == tuple(good)


def test_only_the_opening_counts():
    good, bad = rows(GOOD * 5), rows(BAD * 5, 100)
    late = Row(
        300, text="great wonderful superb film " + "and so on " * 10 + "dull awful terrible hated " * 9, label="any"
    )
    early = Row(301, text="dull awful terrible hated film " + "and so on " * 10 + "great wonderful " * 20, label="any")
    kept = clearest_rows([early, late, *good], bad, share=21 / 22, words=6)
    assert kept == (late, *good)


def test_a_share_of_one_keeps_all_rows_and_asks_for_nothing():
    good = rows(GOOD)
    assert clearest_rows(good, [], share=1.0, words=5) == tuple(good)


def test_the_same_rows_are_kept_every_time():
    good, bad = rows([*GOOD, *MUDDLED] * 5), rows(BAD * 5, 100)
    first, again = (clearest_rows(good, bad, share=0.5, words=5) for _ in range(2))
    assert first == again
    assert len(first) == 15


def test_too_few_rows_are_refused():
    message = "data.clearest: needs at least 5 training rows with and without the label, got 4 and 20; set it to 1"
    with pytest.raises(DataError, match=message):
        clearest_rows(rows(GOOD), rows(BAD * 5), share=0.5, words=5)
