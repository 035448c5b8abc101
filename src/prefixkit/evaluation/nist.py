"""NIST: n-gram matches weighed by how much they tell (Doddington, 2002).

This is NIST as mteval-v13a and the E2E challenge's script have it: a text's n-grams are matched with those of all its
references together, and its length is held against their mean. nltk's `corpus_nist` takes for each order the one
reference that fits best, which with several references is another number; with one reference both are the same.

The information of an n-gram is how much rarer it is than its beginning in the references, ``log2(count(w1..wn-1) /
count(w1..wn))``; when texts are resampled for an interval it stays what all references together say.
"""

import math
from collections import Counter
from collections.abc import Sequence
from itertools import chain

import numpy as np

from prefixkit.evaluation.intervals import Numbers, Sums

_ORDERS = 5
_BETA = math.log(0.5) / math.log(1.5) ** 2
"""Makes the penalty 0.5 for texts of two thirds of the references' length."""

Gram = tuple[str, ...]


def nist_sums(texts: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]) -> Sums:
    """Return NIST of tokenised texts, of orders up to 5.

    Args:
        texts: the tokens of each text.
        references: the tokens of each reference of each text; none is without any.
    """
    counts = [[_count(tokens) for tokens in own] for own in references]
    frequency: Counter[Gram] = Counter()
    for count in chain.from_iterable(counts):
        frequency.update(count)
    frequency[()] = sum(map(len, chain.from_iterable(references)))
    parts = []
    for tokens, own, known in zip(texts, references, counts, strict=True):
        matches, length = _matches(_count(tokens), known, frequency), len(tokens)
        totals = [max(0, length - order) for order in range(_ORDERS)]
        parts.append([*matches, *totals, length, sum(map(len, own)) / len(own)])
    return Sums(np.array(parts, dtype=np.float64), _score)


def _count(tokens: Sequence[str]) -> Counter[Gram]:
    starts = range(len(tokens))
    return Counter(tuple(tokens[start : start + n]) for n in range(1, _ORDERS + 1) for start in starts[: 1 - n or None])


def _matches(own: Counter[Gram], known: Sequence[Counter[Gram]], frequency: Counter[Gram]) -> list[float]:
    """Return the information of a text's n-grams that its references have, each as often as one of those has it."""
    found = [0.0] * _ORDERS
    for gram, count in own.items():
        hits = min(count, max(each[gram] for each in known))
        if hits:
            found[len(gram) - 1] += hits * math.log2(frequency[gram[:-1]] / frequency[gram])
    return found


def _score(sums: Numbers) -> float:
    """Eq. 3 of Doddington (2002); an order that no text is long enough for adds nothing."""
    matches, totals, (written, expected) = sums[:_ORDERS], sums[_ORDERS : 2 * _ORDERS], sums[2 * _ORDERS :]
    if not written or not expected:
        return 0.0
    precision = sum(match / total for match, total in zip(matches, totals, strict=True) if total)
    return float(precision * math.exp(_BETA * math.log(min(1.0, written / expected)) ** 2))
