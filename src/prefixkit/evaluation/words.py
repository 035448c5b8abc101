"""Words of a text: what repetition, diversity and copying are counted in."""

import re
from collections.abc import Iterator, Sequence

#: Kana and Chinese characters: scripts written without spaces.
_SPACELESS = "\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
#: One such character, or a run of other letters and digits with apostrophes inside.
_WORD = re.compile(rf"[{_SPACELESS}]|[^\W{_SPACELESS}]+(?:['’][^\W{_SPACELESS}]+)*")

Gram = tuple[str, ...]


def split_words(text: str) -> list[str]:
    """Return the words of a text, folded to lower case, without punctuation."""
    return [match[0].casefold() for match in _WORD.finditer(text)]


def word_spans(text: str) -> list[tuple[int, int]]:
    """Return where each word of `split_words` starts and ends in the text, in characters."""
    return [match.span() for match in _WORD.finditer(text)]


def ngrams(words: Sequence[str], n: int) -> Iterator[Gram]:
    """Yield every run of n words."""
    return (tuple(words[i : i + n]) for i in range(len(words) - n + 1))
