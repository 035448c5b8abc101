"""What counts as a word."""

from prefixkit.evaluation.words import ngrams, split_words, word_spans


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
