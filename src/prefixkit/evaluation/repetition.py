"""Repetition: how much of a text was said before in the same text."""

from collections.abc import Sequence

from prefixkit.evaluation.intervals import Ratio
from prefixkit.evaluation.words import ngrams, split_words

_N = 4


def repetition(texts: Sequence[str]) -> Ratio:
    """Return the mean over texts of the share of their 4-grams that occurred earlier in them.

    That is seq-rep-4 of Welleck et al. (2020), §6.1, ``1 - |distinct 4-grams| / |4-grams|``, counted in words
    instead of the model's tokens, so that models with different tokenizers compare. Texts of fewer than 4
    words have no 4-gram and no weight.
    """
    counts = [(len(set(grams)), len(grams)) for grams in (list(ngrams(split_words(text), _N)) for text in texts)]
    return Ratio(
        tuple(1 - distinct / count if count else 0.0 for distinct, count in counts),
        tuple(float(count > 0) for _, count in counts),
    )
