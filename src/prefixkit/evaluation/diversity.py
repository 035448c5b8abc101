"""Diversity of a set of generated texts: distinct-n and self-BLEU."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Sequence

from sacrebleu.metrics.bleu import BLEU

from prefixkit.evaluation.words import Gram, ngrams, split_words, tokenizer_of

_ORDER = 4


class Distinct:
    """Distinct-n (Li et al., 2016, §5): different n-grams divided by all n-grams, over all texts together.

    Depends on how much text there is, so compare sets of as many texts of the same length.

    Args:
        texts: the set.
        n: words per n-gram.
    """

    def __init__(self, texts: Sequence[str], n: int) -> None:
        self._grams = [list(ngrams(split_words(text), n)) for text in texts]

    @property
    def ngrams(self) -> int:
        """How many n-grams there are, repeated ones included."""
        return sum(map(len, self._grams))

    def __call__(self, places: Sequence[int] | None = None) -> float:
        """Return the share in [0, 1] for the texts at these places, or for all; 0 without n-grams."""
        chosen = self._grams if places is None else [self._grams[place] for place in places]
        total = sum(map(len, chosen))
        return len(set().union(*chosen)) / total if total else 0.0


class SelfBleu:
    """Self-BLEU (Zhu et al., 2018, §2.1): the mean BLEU of each text against all others as references.

    The score of one text is sacrebleu's sentence BLEU (13a tokens, or those of a script without spaces,
    orders up to 4, exponential smoothing, effective order), on its scale of 0 to 100. Only the matching is
    ours: with the two highest counts of every n-gram over the set, a text is compared with all others at once
    instead of one by one.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        tokenize = BLEU(effective_order=True, tokenize=tokenizer_of(texts)).tokenizer
        tokens = [tokenize(text.rstrip()).split() for text in texts]
        self._lengths = [len(words) for words in tokens]
        self._counts = [_count(words) for words in tokens]

    def __call__(self, places: Sequence[int] | None = None) -> float:
        """Return self-BLEU of the texts at these places; 0 for fewer than two texts."""
        chosen = range(len(self._counts)) if places is None else places
        if len(chosen) < 2:
            return 0.0
        highest = self._highest(chosen)
        lengths = sorted(self._lengths[place] for place in chosen)
        return sum(self._score(place, highest, lengths) for place in chosen) / len(chosen)

    def _highest(self, places: Iterable[int]) -> dict[Gram, tuple[int, int, int]]:
        """Per n-gram: its highest count in a text, where that text is, and the highest count elsewhere."""
        highest: dict[Gram, tuple[int, int, int]] = {}
        for place in places:
            for gram, count in self._counts[place].items():
                best, owner, second = highest.get(gram, (0, -1, 0))
                highest[gram] = (count, place, best) if count > best else (best, owner, max(second, count))
        return highest

    def _score(self, place: int, highest: dict[Gram, tuple[int, int, int]], lengths: list[int]) -> float:
        correct, total = [0] * _ORDER, [0] * _ORDER
        for gram, count in self._counts[place].items():
            best, owner, second = highest[gram]
            total[len(gram) - 1] += count
            correct[len(gram) - 1] += min(count, second if owner == place else best)
        own = self._lengths[place]
        closest = _closest(own, lengths)
        bleu = BLEU.compute_bleu(correct, total, own, closest, smooth_method="exp", effective_order=True)
        return float(bleu.score)


def _count(words: list[str]) -> Counter[Gram]:
    return Counter(gram for n in range(1, _ORDER + 1) for gram in ngrams(words, n))


def _closest(own: int, lengths: list[int]) -> int:
    """Return the length closest to a text's own among the others', the shorter of two as close."""
    at = bisect_left(lengths, own)
    # lengths[at] is the text itself (or one as long): the nearest others stand on both sides of it.
    others = lengths[max(0, at - 1) : at] + lengths[at + 1 : at + 2]
    return min(others, key=lambda length: (abs(length - own), length))
