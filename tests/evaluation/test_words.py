"""What counts as a word."""

import unicodedata

import pytest

from prefixkit.evaluation.words import ngrams, split_words, tokenizer_of, word_spans


def test_words_are_folded_and_keep_inner_apostrophes():
    assert split_words("It's GREAT -- isn't it? (Rated 9/10.)") == ["it's", "great", "isn't", "it", "rated", "9", "10"]


def test_scripts_without_spaces_count_by_character():
    assert split_words("電影很好 OK") == ["電", "影", "很", "好", "ok"]


def test_spans_point_at_the_words():
    text = "“Don’t!” she said"
    assert [text[start:end] for start, end in word_spans(text)] == ["Don’t", "she", "said"]
    assert len(word_spans(text)) == len(split_words(text))


def test_ngrams_of_short_texts_are_none():
    assert list(ngrams(["a", "b"], 3)) == []
    assert list(ngrams(["a", "b", "c"], 2)) == [("a", "b"), ("b", "c")]


def test_marks_belong_to_their_letters():
    """Hindi words that differ in a vowel sign alone, and letters written with their accents apart."""
    assert split_words("लड़का लड़की") == ["लड़का", "लड़की"]
    assert split_words("x² ½ x") == ["x²", "½", "x"]
    assert split_words("मैं घर जाता हूँ") == ["मैं", "घर", "जाता", "हूँ"]
    apart = unicodedata.normalize("NFD", "café résumé naïve")
    assert split_words(apart) == split_words("café résumé naïve") == ["café", "résumé", "naïve"]
    assert [apart[start:end] for start, end in word_spans(apart)] == apart.split()


@pytest.mark.parametrize(
    ("texts", "tokenizer"),
    [
        (["It was a film.", ""], "13a"),
        (["Фильм был хорош."], "13a"),
        (["电影很好 (OK)。"], "zh"),
        (["我非常喜欢这部关于日本的电影，名字里有一个の字，朋友们也都说好看"], "zh"),
        (["映画はとても良かった。"], "char"),
        (["หนังดีมาก"], "char"),
        (["The film 電影 was shown in Taipei."], "13a"),
        ([], "13a"),
    ],
)
def test_texts_are_split_as_their_script_is_written(texts, tokenizer):
    assert tokenizer_of(texts) == tokenizer
