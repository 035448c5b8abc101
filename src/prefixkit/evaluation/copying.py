"""Copying: what generated texts took from the training texts, word for word."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from prefixkit.evaluation.words import split_words, word_spans

#: Word numbers: 0 separates the training texts, -1 is a word that occurs in none of them.
_BETWEEN, _UNKNOWN = 0, -1
_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd, so multiplication loses nothing modulo 2^64


@dataclass(frozen=True)
class Span:
    """A stretch of a text that stands word for word in a training text.

    Attributes:
        start: first character.
        end: one past the last character.
        words: its length in words.
    """

    start: int
    end: int
    words: int


@dataclass(frozen=True)
class Copying:
    """What one text took from the training texts.

    Attributes:
        ngrams: n-grams of the text.
        novel: those that occur in no training text.
        longest: the longest run of words that occurs in a training text, the first of several; None if no
            word does.
        spans: every copied run of at least n words that is part of no longer one, in order; they may overlap.
    """

    ngrams: int
    novel: int
    longest: Span | None
    spans: tuple[Span, ...]


@dataclass(frozen=True)
class _Grams:
    """Where every n-gram of the training texts starts, sorted by its hash."""

    hashes: NDArray[np.uint64]
    starts: NDArray[np.int64]


class TrainingTexts:
    """The training texts, searchable for runs of words; case and punctuation do not count.

    Searching is exact: hashes only propose places, where the words themselves are compared. Memory is about
    20 bytes per training word and length of n-gram asked for.

    Args:
        texts: what was trained on, whole.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        self._numbers: dict[str, int] = {}
        numbers = [_BETWEEN]
        for text in texts:
            for word in split_words(text):
                numbers.append(self._numbers.setdefault(word, len(self._numbers) + 1))
            numbers.append(_BETWEEN)
        self._words = np.array(numbers, dtype=np.int64)
        self._grams: dict[int, _Grams] = {}

    def compare(self, text: str, n: int) -> Copying:
        """Return what a text took from the training texts, counted in n-grams of words."""
        words = self._encode(text)
        runs = self._runs(words, n)
        longest = max((length for _, length in runs), default=0)
        spans = word_spans(text)
        found = next((start for start, length in runs if length == longest), None)
        for shorter in range(min(n - 1, len(words)), 0, -1):  # only where no run reaches n words
            if found is not None:
                break
            known = np.flatnonzero(self._is_known(words, shorter))
            if len(known):
                found, longest = int(known[0]), shorter
        grams = max(0, len(words) - n + 1)
        return Copying(
            ngrams=grams,
            novel=grams - int(self._is_known(words, n).sum()),
            longest=None if found is None else _span(spans, found, longest),
            spans=tuple(_span(spans, start, length) for start, length in runs),
        )

    def _encode(self, text: str) -> NDArray[np.int64]:
        return np.array([self._numbers.get(word, _UNKNOWN) for word in split_words(text)], dtype=np.int64)

    def _runs(self, words: NDArray[np.int64], n: int) -> list[tuple[int, int]]:
        """Return start and length of every copied run of at least n words that no longer one contains."""
        runs: list[tuple[int, int]] = []
        end = 0
        for start in np.flatnonzero(self._is_known(words, n)).tolist():
            length = self._extend(words, start, n)
            if start + length > end:
                runs.append((start, length))
                end = start + length
        return runs

    def _extend(self, words: NDArray[np.int64], start: int, n: int) -> int:
        """Return the length of the longest run from `start`, which is known to reach n words."""
        places = self._places(words[start : start + n])
        length = n
        while start + length < len(words):
            # The last word of all is a separator, so there is always a next one to look at.
            places = places[self._words[places + length] == words[start + length]]
            if not len(places):
                break
            length += 1
        return length

    def _is_known(self, words: NDArray[np.int64], n: int) -> NDArray[np.bool_]:
        """For every n-gram of a text, whether it occurs in a training text."""
        return np.array([len(self._places(words[i : i + n])) > 0 for i in range(len(words) - n + 1)], dtype=bool)

    def _places(self, gram: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return where an n-gram starts in the training texts."""
        grams = self._index(len(gram))
        key = _hashes(gram, len(gram))
        low, high = (
            np.searchsorted(grams.hashes, key[0], "left"),
            np.searchsorted(grams.hashes, key[0], "right"),
        )
        places = grams.starts[low:high]
        if not len(places) or (gram == _UNKNOWN).any():
            return places[:0]
        same: NDArray[np.bool_] = (self._words[places[:, None] + np.arange(len(gram))] == gram).all(axis=1)
        found: NDArray[np.int64] = places[same]
        return found

    def _index(self, n: int) -> _Grams:
        if n not in self._grams:
            hashes = _hashes(self._words, n)
            is_inside = np.ones(len(hashes), dtype=bool)
            for offset in range(n):
                is_inside &= self._words[offset : offset + len(hashes)] != _BETWEEN
            starts = np.flatnonzero(is_inside)
            order = np.argsort(hashes[starts], kind="stable")
            self._grams[n] = _Grams(hashes[starts][order], starts[order])
        return self._grams[n]


def _hashes(words: NDArray[np.int64], n: int) -> NDArray[np.uint64]:
    """Return a polynomial hash of every run of n words, modulo 2^64."""
    count = max(0, len(words) - n + 1)
    hashes = np.zeros(count, dtype=np.uint64)
    for offset in range(n):
        hashes = hashes * _FACTOR + words[offset : offset + count].astype(np.uint64)
    return hashes


def _span(spans: list[tuple[int, int]], start: int, length: int) -> Span:
    return Span(spans[start][0], spans[start + length - 1][1], length)
