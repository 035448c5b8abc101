"""Repetition: how much of a text was said before in the same text."""

from collections.abc import Sequence

from prefixkit.evaluation.words import ngrams, split_words

_N = 4


def repetition_rates(texts: Sequence[str]) -> list[float]:
    """Return, per text, the share of its 4-grams that occurred earlier in it, 0 for none.

    That is seq-rep-4 of Welleck et al. (2020), §6.1, ``1 - |distinct 4-grams| / |4-grams|``, counted in words
    instead of the model's tokens, so that models with different tokenizers compare. Texts of fewer than 4
    words have no 4-gram and are left out.
    """
    rates = []
    for text in texts:
        grams = list(ngrams(split_words(text), _N))
        if grams:
            rates.append(1 - len(set(grams)) / len(grams))
    return rates
